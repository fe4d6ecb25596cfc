"""A student from its Hugging Face folder, and back.

config.json says which architecture it is. GPT2 (gpt2.py) and Llama (llama.py) have one form, so
nothing else asks which of them runs; where a signature says GPT2, a Llama will do:

    model(ids, positions, attend) -> hidden     model.logits(hidden)     model.head_weight
    model.cast_(dtype)     model.init_weights_(seed)     model.n_params()
    model.wte, .h (blocks of .ln_1, .attn, .ln_2, .mlp), .ln_f, .lm_head
    model.config: vocab_size, n_positions, n_embd, n_layer, n_head, n_kv_head, head_dim

What a config.json asks for and these models do not compute is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from sert_min.gpt2 import ACTIVATIONS, GPT2, GPT2Config
from sert_min.io.errors import need
from sert_min.io.hub import read_raw_config, read_tensors, write_folder
from sert_min.llama import Llama, LlamaConfig

# What folders hold beside the parameters: causal masks (old GPT-2 files), RoPE's frequencies.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")
# Conv1D of GPT-2's published weights stores [in, out]; nn.Linear wants [out, in]. One of the four,
# attn.c_proj, is square: no shape check would notice a forgotten transpose.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
LLAMA_NAMES = {  # our layer: what its parts, one after another, are called in a Llama's folder
    "wte": ["model.embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
}
ALIASES = {  # other names of a GPT-2's fields that transformers reads
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
SIZES = {  # of a Llama, our name: that of config.json
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_inner": "intermediate_size",
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

UNFIT = "the weights do not fit config.json"

# --- config.json ----------------------------------------------------------------------------------


def read_config(folder: Path) -> GPT2Config | LlamaConfig:
    """The config of a folder."""
    raw, where = read_raw_config(folder), f"{folder}/config.json"
    return (gpt2_config if raw["model_type"] == "gpt2" else llama_config)(raw, where)


def gpt2_config(raw: dict, where: str) -> GPT2Config:
    raw = {ALIASES.get(k, k): v for k, v in raw.items() if ALIASES.get(k) not in raw}
    c = GPT2Config(**{f.name: raw[f.name] for f in fields(GPT2Config) if f.name in raw})
    sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    check_sizes(where, {k: getattr(c, k) for k in sizes + ["n_inner"] * (c.n_inner is not None)})
    epsilon = c.layer_norm_epsilon
    check_supported(
        where,
        asdict(c) | raw,
        add_cross_attention=not raw.get("add_cross_attention"),
        activation_function=str(c.activation_function) in ACTIVATIONS,
        n_head=c.n_embd % c.n_head == 0,
        layer_norm_epsilon=type(epsilon) in (int, float) and 0 <= epsilon < 1,
    )
    return c


def llama_config(raw: dict, where: str) -> LlamaConfig:
    c = {k: v for k, v in raw.items() if v is not None}
    c = {"num_key_value_heads": c.get("num_attention_heads"), "rms_norm_eps": 1e-6} | c
    check_sizes(where, {name: c.get(name) for name in SIZES.values() if name != "head_dim"})
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    c = {"head_dim": c["hidden_size"] // heads, "rope_theta": 10000.0, "hidden_act": "silu"} | c
    c |= c.get("rope_scaling") or c.get("rope_parameters") or {}  # older and newer files
    c = {"rope_type": c.get("type", "default")} | c
    if c["model_type"] == "qwen2":
        c |= {"attention_bias": True, "mlp_bias": False}
    scaling = SCALING if c["rope_type"] == "llama3" else ()
    positive = {
        name: type(c.get(name)) in (int, float) and 0 < c[name] < math.inf
        for name in ("rope_theta", "rms_norm_eps", *scaling)
    }
    check_supported(
        where,
        c,
        hidden_act=c["hidden_act"] == "silu",
        num_key_value_heads=heads % kv_heads == 0,
        head_dim=type(c["head_dim"]) is int and c["head_dim"] > 0 == c["head_dim"] % 2,
        rope_type=c["rope_type"] in ("default", "llama3"),
        partial_rotary_factor=c.get("partial_rotary_factor", 1) == 1,
        use_sliding_window=not c.get("use_sliding_window"),
        layer_types="sliding_attention" not in c.get("layer_types", ()),
        **positive,
    )
    c |= {ours: c[name] for ours, name in SIZES.items()}
    c["rope_scaling"] = {name: c[name] for name in scaling} or None
    return LlamaConfig(**{f.name: c[f.name] for f in fields(LlamaConfig) if f.name in c})


def check_sizes(where: str, sizes: Mapping) -> None:
    """Every value must be a positive whole number of a possible size (layers are built one by one)."""
    for name, n in sizes.items():
        possible = type(n) is int and 0 < n < (1000 if "layer" in name else 2**24)
        need(possible, f"{where}: {name} {n!r} is no size; fix the file")


def check_supported(where: str, config: Mapping, **supported: bool) -> None:
    for name, fine in supported.items():
        value = config.get(name)
        need(fine, f"{where}: {name} {value!r} is not supported; choose another model")


def config_json(c: GPT2Config | LlamaConfig) -> dict:
    """What config.json says of a model."""
    if isinstance(c, GPT2Config):
        kind = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        return {**kind, **asdict(c), "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    kind = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[c.model_type]
    told = {SIZES.get(name, name): value for name, value in asdict(c).items()}
    scaling = c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}
    return {"architectures": [kind], **told, "rope_scaling": scaling, "hidden_act": "silu"}


# --- weights --------------------------------------------------------------------------------------


def hub_tensors(model: GPT2 | Llama) -> dict[str, Tensor]:
    """The parameters under the names, and in the form, that they have in a hub folder, as views."""
    c, state, found = model.config, model.state_dict(), {}
    if isinstance(model, GPT2):
        return {name: p.t() if name.endswith(TRANSPOSED) else p for name, p in state.items()}
    for name, p in state.items():
        at, (layer, kind) = "", name.rsplit(".", 1)
        if layer.startswith("h."):  # h.7.mlp.c_fc
            _, i, layer = layer.split(".", 2)
            at = f"model.layers.{i}."
        parts = LLAMA_NAMES[layer]
        heads = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        widths = heads if layer == "attn.c_attn" else len(p) // len(parts)
        found |= {f"{at}{part}.{kind}": x for part, x in zip(parts, p.split(widths))}
    return found


def load_model(folder: Path, device="cpu", dtype=torch.float32) -> GPT2 | Llama:
    """Read a model from a Hugging Face folder. Every name and shape is checked, and every number
    must be finite."""
    config = read_config(folder)
    with torch.device("meta"):  # initial values are not needed, and drawing them takes seconds
        model = (GPT2 if isinstance(config, GPT2Config) else Llama)(config)
    wanted, head = hub_tensors(model.to_empty(device="cpu")), None
    missing = set(wanted)
    for raw_name, t in read_tensors(folder):
        name = raw_name.removeprefix("transformer.")
        if BUFFERS.fullmatch(name):
            continue
        if name == "lm_head.weight" and name not in wanted:
            head = t  # a stored copy of the tied head
            continue
        architecture = type(model).__name__
        need(name in wanted, f"{folder}: unexpected tensor {raw_name}; is this a {architecture}?")
        shapes = f"has shape {list(t.shape)}, config.json needs {list(wanted[name].shape)}"
        need(t.shape == wanted[name].shape, f"{folder}: {name} {shapes}; {UNFIT}")
        need(
            t.isfinite().all(),
            f"{folder}: {name} holds NaN or infinite weights; use another checkpoint",
        )
        wanted[name].copy_(t)
        missing.discard(name)
    need(not missing, f"{folder}: tensor {min(missing, default='')} is missing; {UNFIT}")
    need(
        head is None or torch.equal(head.float(), model.wte.weight),
        f"{folder}: lm_head.weight is not the token embedding, though config.json ties them; set "
        "tie_word_embeddings to false there",
    )
    return model.cast_(dtype).to(device).eval()


def save_model(model: GPT2 | Llama, folder: Path, tokenizer_from: Path, sert: dict) -> None:
    """Write a Hugging Face folder, all or nothing. It opens in transformers, vLLM and lm-eval as it
    is. `tokenizer_from` is the folder whose tokenizer files are copied; `sert` becomes sert.json."""
    tensors = {name: t.float().cpu().contiguous() for name, t in hub_tensors(model).items()}
    write_folder(folder, tensors, config_json(model.config), tokenizer_from, sert)


@torch.inference_mode()
def first_broken(model: GPT2 | Llama, ids: list[int]) -> str:
    """Where the numbers first stop being finite: the model runs once more on a text. This is for the
    error message of a caller that has seen a NaN."""
    broken: list[str] = []

    def watch(module, where: str):
        def look(module, given, out) -> None:
            if not out.isfinite().all():
                broken.append(where)

        return module.register_forward_hook(look)

    tables = [m for m in model.children() if isinstance(m, torch.nn.Embedding)]
    hooks = [watch(m, "the embeddings") for m in tables]
    for i, block in enumerate(model.h):
        where = f"layer {i} of 0 to {len(model.h) - 1}"
        hooks += [watch(m, f"{where}, attention") for m in (block.ln_1, block.attn)]
        hooks += [watch(m, f"{where}, MLP") for m in (block.ln_2, block.mlp)]
    hooks.append(watch(model.ln_f, "the last norm"))
    try:
        logits = model.logits(model(torch.tensor(ids, device=model.wte.weight.device)[None]))
    finally:
        for hook in hooks:
            hook.remove()
    if not broken and logits.isfinite().all():
        return "not when run again"
    return f"first in {(broken or ['the head'])[0]}"
