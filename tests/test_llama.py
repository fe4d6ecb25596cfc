"""llama.py against transformers: five Llama and Qwen2 configs, saved folders, grouped heads."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import refuses
from test_generate import Words, logprob_error, make_prompts
from test_gpt2 import logit_difference, make_loud
from transformers import LlamaConfig as HFLlama
from transformers import Qwen2Config as HFQwen2

from sert_min.finetune import loss_sum, pack
from sert_min.generate import SampleSettings, sample_block
from sert_min.llama import Llama
from sert_min.models import load_model, read_config, save_model

SMALL = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, max_position_embeddings=40)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
CONFIGS = {
    "groups of 1": (HFLlama, dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "groups of 2, untied": (HFLlama, dict(num_key_value_heads=3)),
    "groups of 3, llama3": (HFLlama, dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "all biases, wide heads": (HFLlama, dict(num_key_value_heads=2, attention_bias=True,
                                             mlp_bias=True, head_dim=12)),
    "qwen2": (HFQwen2, dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5)),
}  # fmt: skip


def hf_model(name: str):
    kind, config = CONFIGS[name]
    return make_loud(transformers.AutoModelForCausalLM.from_config(kind(**SMALL | config)), 0.2)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    """transformers' own folder of each config."""
    folder = tmp_path_factory.mktemp("hf")
    hf_model(request.param).save_pretrained(folder)
    return folder


def open_hf(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_logits_equal_transformers_and_a_saved_folder_opens_there(folder, tmp_path):
    """Guards parts of a fused product, RoPE, grouped heads, biases, eps, head_dim, ties."""
    theirs, ours = open_hf(folder), load_model(folder)
    assert isinstance(ours, Llama) and logit_difference(ours, theirs) < 1e-4
    save_model(ours, tmp_path / "saved", tmp_path, {"method": "sert"})
    again = load_model(tmp_path / "saved")
    assert all(map(torch.equal, ours.state_dict().values(), again.state_dict().values()))
    assert again.config == ours.config
    back = open_hf(tmp_path / "saved")
    assert type(back) is type(theirs) and logit_difference(ours, back) < 1e-4


def test_files_of_older_transformers_are_read(tmp_path):
    """Guards the form of the hub's files: rope_theta at the top, rope_scaling beside it."""
    hf_model("groups of 3, llama3").save_pretrained(tmp_path)
    new, path = read_config(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = config.pop("rope_parameters")
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    path.write_text(json.dumps(config))
    assert new.rope_scaling["factor"] == 8.0 and read_config(tmp_path) == new


def test_logprobs_of_sampled_tokens_equal_a_plain_forward(folder):
    """Guards decoding with K < H: grouped heads, turned keys, refilled slots, pieces of keys."""
    model, (prompts, names) = load_model(folder), make_prompts(3)
    model.config = replace(model.config, n_positions=128)
    got = sample_block(model, Words(), prompts, names, SampleSettings(max_new_tokens=36, rows=20))
    assert {row.finish for row in got} == {"eos", "length"}
    assert logprob_error(model, prompts, got, n_vocab=61).abs().max() < 1e-4
    other = [p[1:] or [(p[0] + 1) % 60] for p in prompts]
    assert logprob_error(model, other, got, n_vocab=61).abs().median() > 0.02


def test_loss_and_gradients_equal_transformers(folder):
    """Guards packed training: positions of each example, and the gradient of shared heads."""
    ours, theirs = load_model(folder).train(), open_hf(folder)
    g = torch.Generator().manual_seed(2)
    texts = [torch.randint(131, (n,), generator=g).tolist() for n in (7, 30, 19)]
    loss = loss_sum(ours, pack([(t[:-1], t[1:]) for t in texts]))
    logits = torch.cat([theirs(torch.tensor([t[:-1]])).logits[0] for t in texts])
    targets = torch.tensor([i for t in texts for i in t[1:]])
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (loss / 10).backward(), (wanted / 10).backward()
    assert abs(loss - wanted) < 1e-3
    layer, K = theirs.model.layers[1].self_attn, ours.config.n_kv_head * ours.config.head_dim
    mine = ours.h[1].attn.c_attn.weight.grad
    for part, name in zip(mine.split([len(mine) - 2 * K, K, K]), "qkv"):
        error = (part - getattr(layer, f"{name}_proj").weight.grad).abs().max()
        assert error < 1e-4 * part.abs().max(), name


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mistral"}, "mistral"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim"),
    ({"hidden_size": None}, "hidden_size"), ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"num_hidden_layers": 2}, "model.layers.2."),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_theta": "big", "rope_parameters": None}, "rope_theta"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ({"attention_bias": True}, "self_attn.k_proj.bias is missing"),
    ({"tie_word_embeddings": True}, "lm_head.weight"),
])  # fmt: skip
def test_configs_are_refused_by_name(change, named, tmp_path):
    """Guards against computing something else than the config asks for."""
    hf_model("groups of 2, untied").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refuses(named, load_model, tmp_path)
