"""bench/training.py: its embedded lengths are those of the real data, its peer takes the same step."""

import pytest
import torch
from conftest import shared

from bench import common, training
from sert_min import answers, prompts, tasks
from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io.files import read_jsonl
from sert_min.models import save_model
from sert_min.tokenizer import load_tokenizer


def test_lengths_are_those_of_commonsense_qa(tmp_path):
    """Guards figures for lengths that no real example has."""
    data = shared("data")
    for file in shared("tiktoken").iterdir():  # GPT-2's two files under hashes
        text = file.read_text()
        (tmp_path / ("vocab.json" if text[0] == "{" else "merges.txt")).write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    rows = read_jsonl(data / "teacher" / "commonsense_qa.train.palm-540b.jsonl")
    teacher = {r["id"]: r["rationale"] for r in rows}
    found = []
    for q in tasks.load("commonsense_qa", "train", str(data))[::76][:128]:
        pair = prompts.sert_pair(q, answers.strip_answer_sentence(teacher[q.id])[0])
        prompt, completion = (len(tokenizer.encode(text)) for text in pair)
        found.append(f"{prompt}+{completion + 1}")
        assert len(tokenizer.encode(prompts.finetune_pair(q)[1])) + 1 == training.LABEL
    assert found == training.LENGTHS.split()


def test_both_sides_take_the_same_steps(tmp_path):
    """Guards a race between two different losses or optimisers (a mask or a shift that is off)."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16)).init_weights_(0)
    save_model(model, tmp_path / "model", tmp_path, {})
    sides = training.ours, training.transformers_step
    ours, theirs = (make(tmp_path / "model", False) for make in sides)
    for batch in training.make_batches(4, 3, paths=True):
        assert abs(float(ours(batch)) - float(theirs(batch))) < 1e-4


def test_chains_draw_what_they_should():
    """Guards peers that draw from another distribution, or are spared the log-prob."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    from bench.kernels import eager, without_sort

    torch.manual_seed(0)
    row = torch.randn(300) * 2
    best, ids = row.log_softmax(0).topk(common.TOP_K)
    share = best.softmax(0)
    kept = share.cumsum(0) - share < common.TOP_P
    wanted = torch.zeros(300).index_put((ids[kept],), best[kept].softmax(0))
    for chain in (eager, without_sort):
        tokens, logprobs = chain(row.expand(4000, 300))
        assert torch.allclose(logprobs, row.log_softmax(0)[tokens], atol=1e-5)
        counts = tokens.flatten().bincount(minlength=300) / 4000
        assert (counts - wanted).abs().max() < 0.03  # four standard deviations
