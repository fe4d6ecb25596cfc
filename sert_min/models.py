"""A student from its Hugging Face folder, and back.

config.json says which architecture it is. GPT2 (gpt2.py) and Llama (llama.py) have one form, so
nothing else asks which of them runs; where a signature says GPT2, a Llama will do:

    model(ids, positions, attend) -> hidden     model.logits(hidden)     model.head_weight
    model.cast_(dtype)     model.init_weights_(seed)     model.n_params()
    model.wte, .h (blocks of .ln_1, .attn, .ln_2, .mlp), .ln_f, .lm_head
    model.config: vocab_size, n_positions, n_embd, n_layer, n_head, n_kv_head, head_dim

What a config.json asks for and these models do not compute is refused by name.
"""

import contextlib
import math
import re
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from sert_min.gpt2 import ACTIVATIONS, GPT2, GPT2Config
from sert_min.io.errors import SertError, need
from sert_min.io.hub import read_raw_config, read_tensors, write_folder
from sert_min.llama import Llama, LlamaConfig
from sert_min.tokenizer import load_tokenizer

# What folders hold beside the parameters: causal masks (old GPT-2 files), RoPE's frequencies.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")
# What torch.compile and several GPUs leave in names, before a model or its layers.
WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
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
    raw, where = read_raw_config(folder), f"{folder}/config.json"
    return (gpt2_config if raw["model_type"] == "gpt2" else llama_config)(raw, where)


def gpt2_config(raw: dict, where: str) -> GPT2Config:
    sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    check(where, raw, **are_sizes(raw, sizes + ["n_inner"] * (raw.get("n_inner") is not None)))
    c = asdict(GPT2Config()) | raw
    check(
        where,
        c,
        add_cross_attention=not c.get("add_cross_attention"),
        activation_function=str(c["activation_function"]) in ACTIVATIONS,
        n_head=c["n_embd"] % c["n_head"] == 0,
        layer_norm_epsilon=is_positive(c["layer_norm_epsilon"]),
    )
    return GPT2Config(**{f.name: c[f.name] for f in fields(GPT2Config)})


def llama_config(raw: dict, where: str) -> LlamaConfig:
    c = {k: v for k, v in raw.items() if v is not None}
    c = {"num_key_value_heads": c.get("num_attention_heads"), "rms_norm_eps": 1e-6} | c
    check(where, c, **are_sizes(c, {*SIZES.values()} - {"head_dim"}))
    heads = c["num_attention_heads"]
    c = {"head_dim": c["hidden_size"] // heads, "rope_theta": 10000.0, "hidden_act": "silu"} | c
    c |= c.get("rope_scaling") or c.get("rope_parameters") or {}  # older and newer files
    c = {"rope_type": c.get("type", "default")} | c
    if c["model_type"] == "qwen2":
        c |= {"attention_bias": True, "mlp_bias": False}
    scaling = SCALING if c["rope_type"] == "llama3" else ()
    check(
        where,
        c,
        hidden_act=c["hidden_act"] == "silu",
        num_key_value_heads=heads % c["num_key_value_heads"] == 0,
        head_dim=type(c["head_dim"]) is int and c["head_dim"] > 0 == c["head_dim"] % 2,
        rope_type=c["rope_type"] in ("default", "llama3"),
        partial_rotary_factor=c.get("partial_rotary_factor", 1) == 1,
        use_sliding_window=not c.get("use_sliding_window"),
        layer_types="sliding_attention" not in c.get("layer_types", ()),
        **{name: is_positive(c.get(name)) for name in ("rope_theta", "rms_norm_eps", *scaling)},
    )
    c |= {ours: c[name] for ours, name in SIZES.items()}
    c["rope_scaling"] = {name: c[name] for name in scaling} or None
    return LlamaConfig(**{f.name: c[f.name] for f in fields(LlamaConfig) if f.name in c})


def check(where: str, config: dict, **fine: bool) -> None:
    """Refuse the first entry of config.json that is not fine, by its name."""
    for name, ok in fine.items():
        need(ok, f"{where}: {name} {config.get(name)!r} is not supported; choose another model")


def are_sizes(config: dict, names) -> dict[str, bool]:
    """Is each value a whole number of a possible size? Layers are built one by one."""
    most = {name: 1000 if "layer" in name else 2**24 for name in names}
    return {k: type(config.get(k)) is int and 0 < config[k] < top for k, top in most.items()}


def is_positive(x) -> bool:
    return type(x) in (int, float) and 0 < x < math.inf


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
    """The model of a Hugging Face folder. All names and shapes are checked, and NaN is refused."""
    config = read_config(folder)
    kind = GPT2 if isinstance(config, GPT2Config) else Llama
    with torch.device("meta"):  # initial values are not needed, and drawing them takes seconds
        model = kind(config)
    wanted, head = hub_tensors(model.to_empty(device="cpu")), None
    missing = set(wanted)
    for raw_name, t in read_tensors(folder):
        name = WRAPPERS.sub("", raw_name).removeprefix("transformer.")
        if BUFFERS.fullmatch(name):
            continue
        if name == "lm_head.weight" and name not in wanted:
            head = t  # a stored copy of the tied head
            continue
        where = f"{folder}: tensor {name}"
        need(name in wanted, f"{where} is unexpected; is this a {kind.__name__}?")
        shape = list(wanted[name].shape)
        fits = list(t.shape) == shape
        need(fits, f"{where} has shape {list(t.shape)}, config.json needs {shape}; {UNFIT}")
        need(t.isfinite().all(), f"{where} holds NaN or infinite weights; use another checkpoint")
        wanted[name].copy_(t)
        missing.discard(name)
    need(not missing, f"{folder}: tensor {min(missing, default='')} is missing; {UNFIT}")
    tied = head is None or torch.equal(head.float(), model.wte.weight)
    need(tied, f"{folder}: lm_head.weight is not the token embedding, though config.json ties them; "
         "set tie_word_embeddings to false there")  # fmt: skip
    return model.cast_(dtype).to(device).eval()


def save_model(model: GPT2 | Llama, folder: Path, tokenizer_from: Path, sert: dict) -> None:
    """Write a Hugging Face folder, all or nothing. It opens in transformers, vLLM and lm-eval as it
    is. `tokenizer_from` is the folder whose tokenizer files are copied; `sert` becomes sert.json."""
    config = asdict(c := model.config)
    if isinstance(c, GPT2Config):
        kind = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        config = kind | config | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        kind = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[c.model_type]
        told = {SIZES.get(name, name): value for name, value in config.items()}
        scaling = c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}
        config = {"architectures": [kind], **told, "rope_scaling": scaling, "hidden_act": "silu"}
    with contextlib.suppress(SertError):  # there is no tokenizer
        eot, ends = load_tokenizer(tokenizer_from).eot, config["eos_token_id"]
        if eot not in (ends if isinstance(ends, list) else [ends]):
            config["eos_token_id"] = eot  # training writes this one: others must end there, too
    tensors = {name: t.float().cpu().contiguous() for name, t in hub_tensors(model).items()}
    write_folder(folder, tensors, {"config.json": config, "sert.json": sert}, tokenizer_from)


@torch.inference_mode()
def first_not_finite(model: GPT2 | Llama, ids: list[int]) -> str:
    """Where the numbers first stop being finite when the model runs once more on a text. This is for
    the error message of a caller that has seen a NaN."""
    names, broken = {module: name for name, module in model.named_modules()}, []

    def look(module, given, out) -> None:
        if not out.isfinite().all():
            broken.append(names[module])

    with nn.modules.module.register_module_forward_hook(look):
        logits = model.logits(model(torch.tensor([ids], device=model.wte.weight.device)))
    if not broken and logits.isfinite().all():
        return "not when run again"
    return f"first in {(broken or ['the head'])[0]}"  # h.1.mlp, say
