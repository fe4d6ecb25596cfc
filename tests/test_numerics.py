"""Numbers that are not finite: named with the place where they arise, never sampled from, never
written down. (NaN in the weights themselves: test_gpt2.py; in a training step: test_finetune.py.)"""

import json

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from sert_min import tasks
from sert_min.io.errors import SertError
from sert_min.models import first_broken, load_model
from sert_min.questions import Question
from sert_min.report import check
from sert_min.report.likelihood import answer_logprobs
from sert_min.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions = [Question("strategy_qa", f"q{i}", f"Is {i} even?", "yes") for i in range(3)]
    monkeypatch.setattr(tasks, "load", lambda *_, **__: questions)


def broken_model(folder, name="h.1.mlp.c_fc.weight", value=1e38):
    """A tiny model with finite weights that overflow when it runs."""
    make_tiny_model(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], value)
    tensors[name].view(-1)[1::2] *= -1 if name == "h.1.mlp.c_fc.weight" else 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("place", ["embeddings", "attention", "MLP", "LayerNorm", "head", None])
def test_the_first_broken_layer_is_named(place, tmp_path):
    """Each place breaks alone: a later one may not be blamed, and a sound model not at all."""
    model = load_model(make_tiny_model(tmp_path / "m"))
    spoilt = {
        "embeddings": model.wpe.weight,
        "attention": model.h[1].attn.c_proj.bias,
        "MLP": model.h[0].mlp.c_fc.bias,
        "LayerNorm": model.ln_f.bias,
    }
    wanted = {
        "embeddings": "first in the embeddings",
        "attention": "first in layer 1 of 0 to 1, attention",
        "MLP": "first in layer 0 of 0 to 1, MLP",
        "LayerNorm": "first in the last norm",
        "head": "first in the head",
        None: "not when run again",
    }
    if place in spoilt:
        spoilt[place].data[0] = float("nan")
    elif place == "head":
        model.wte.weight.data[7] = float("nan")  # a token that the text does not hold
    assert first_broken(model, [40, 83, 13]) == wanted[place]


COMMANDS = {
    "sample": (sample, "--max-new-tokens 4", "q0.*NaN"),
    "raw": (sample, "--max-new-tokens 4 --raw", "q0.*NaN"),
    "evaluate": (evaluate, "--max-new-tokens 4", "q0.*NaN"),
    "train": (train, "--method finetune --max-steps 2", "epoch 1, questions .*q0.*step 1: loss nan.*layer 1 of 0 to 1, MLP"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_overflow_is_an_error_that_names_the_question(name, tmp_path):
    """Weights are finite, so loading can't see it; nothing may be drawn or saved."""
    script, flags, message = COMMANDS[name]
    words = ["--task", "strategy_qa", "--model", str(broken_model(tmp_path / "m"))]
    with pytest.raises(SertError, match=message) as e:
        script.main(
            script.parse_args([*words, "--out-dir", "o", "--device", "cpu", *flags.split()])
        )
    assert "weights" in str(e.value) and "\n" not in str(e.value)
    for file in ("paths.jsonl", "predictions.jsonl", "metrics.jsonl", "last"):
        path = tmp_path / "o" / file
        assert not path.exists() or path.read_bytes() == b""
    assert not list((tmp_path / "o").rglob("*-*.jsonl"))  # block files


def test_likelihood_names_question_and_layer(tmp_path):
    """A NaN was rounded, and then json refused it with a traceback."""
    folder = broken_model(tmp_path / "m")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    asked = tasks.load("strategy_qa", "test")
    with pytest.raises(SertError, match="question q0: .*NaN.*layer 1 of 0 to 1, MLP.*--dtype fp32"):
        answer_logprobs(model, tokenizer, asked, ["It is."] * 3)


def test_check_refuses_nan(monkeypatch):
    """Python's max(0.0, nan) is 0.0: weights that overflow passed for gpt2's."""
    known = json.loads(check.KNOWN.read_text())
    ids = {row["prompt"]: row["token_ids"] for row in known["prompts"]}

    class Tokenizer:
        encode = encode_prompt = staticmethod(ids.get)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(1, 1)

        def forward(self, ids):
            return torch.zeros(1, 1, 1)

        def logits(self, hidden):
            return torch.full((50257,), float("nan"))

    with pytest.raises(SertError, match="off by up to nan"):
        check.check_known_outputs(Model(), Tokenizer())
