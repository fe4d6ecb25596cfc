"""Numbers that are not finite: named with the place where they arise, never sampled from or written."""

import json
import math
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import make_tiny_model, refuses, start
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from sert_min import tasks
from sert_min.models import first_not_finite, load_model
from sert_min.questions import Question
from sert_min.report import check
from sert_min.report.likelihood import answer_logprobs
from sert_min.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def here(empty_folder, monkeypatch):
    questions = [Question("strategy_qa", f"q{i}", f"Is {i} even?", "yes") for i in range(3)]
    monkeypatch.setattr(tasks, "load", lambda *_, **__: questions)


def broken_model(folder):
    """A tiny model with finite weights that overflow when it runs."""
    make_tiny_model(folder)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["h.1.mlp.c_fc.weight"].fill_(1e38)
    weight.view(-1)[1::2] *= -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("place, said", [
    ("wpe.weight", "first in wpe"), ("h.1.attn.c_proj.bias", "first in h.1.attn"),
    ("h.0.mlp.c_fc.bias", "first in h.0.mlp"), ("ln_f.bias", "first in ln_f"),
    ("wte.weight", "first in the head"), (None, "not when run again"),
])  # fmt: skip
def test_the_first_broken_layer_is_named(place, said, tmp_path):
    """Guards the blame of a later place, or of a sound model."""
    model = load_model(make_tiny_model(tmp_path / "m"))
    if place:  # token 0 is none of the text
        model.get_parameter(place).data[0] = float("nan")
    assert first_not_finite(model, [40, 83, 13]) == said


@pytest.mark.parametrize("script, flags, message", [
    (sample, "--max-new-tokens 4", "q0.*NaN"),
    (evaluate, "--max-new-tokens 4", "q0.*NaN"),
    (train, "--method finetune --max-steps 2",
     "epoch 1, questions .*q0.*step 1: loss nan.*h.1.mlp"),
])  # fmt: skip
def test_overflow_is_an_error_that_names_the_question(script, flags, message, tmp_path):
    """Weights are finite, so loading can't see it; nothing may be drawn or saved."""
    words = f"--task strategy_qa --model {broken_model(tmp_path / 'm')} --out-dir o --device cpu"
    assert "weights" in refuses(message, start, script, *words.split(), *flags.split())
    written = [p for p in Path("o").rglob("*") if p.suffix in (".jsonl", ".safetensors")]
    assert not any(p.read_bytes() for p in written)


def test_likelihood_names_question_and_layer(tmp_path):
    folder = broken_model(tmp_path / "m")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    questions, told = tasks.load("strategy_qa", "test"), "question q0: .*NaN.*h.1.mlp.*--dtype fp32"
    refuses(told, answer_logprobs, model, tokenizer, questions, ["It is."] * 3)


def test_check_refuses_nan():
    """Python's max(0.0, nan) is 0.0: weights that overflow passed for gpt2's."""
    known = json.loads(check.KNOWN.read_text())
    ids = {row["prompt"]: row["token_ids"] for row in known["prompts"]}
    nan = torch.full((50257,), math.nan)
    model = MagicMock(logits=lambda hidden: nan)
    model.wte.weight.device = "cpu"
    refuses("off by up to nan", check.check_known_outputs, model, Mock(encode=ids.get))
