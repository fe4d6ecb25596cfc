"""bench/training.py: its embedded lengths are those of the real data, its peer takes the same step."""

import torch
from conftest import shared

from bench import gpu, training
from sert_min import answers, prompts, tasks
from sert_min.finetune import n_supervised
from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io.files import read_jsonl
from sert_min.models import save_model
from sert_min.tokenizer import load_tokenizer


def test_lengths_are_those_of_commonsense_qa(tmp_path):
    """Guards figures for lengths that no real example has."""
    data = shared("data")
    for file in shared(
        "tiktoken"
    ).iterdir():  # GPT-2's two files under the hashes of their addresses
        text = file.read_text()
        name = "vocab.json" if text.startswith("{") else "merges.txt"
        (tmp_path / name).write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    teacher = {
        r["id"]: r["rationale"]
        for r in read_jsonl(data / "teacher" / "commonsense_qa.train.palm-540b.jsonl")
    }
    found = []
    for q in tasks.load("commonsense_qa", "train", str(data))[::76][:128]:
        path, _ = answers.strip_answer_sentence(teacher[q.id])
        prompt, completion = prompts.sert_pair(q, path)
        found.append(f"{len(tokenizer.encode(prompt))}+{len(tokenizer.encode(completion)) + 1}")
        label = prompts.finetune_pair(q)[1]
        assert len(tokenizer.encode(label)) + 1 == training.LABEL
    assert found == training.LENGTHS.split()


def test_both_sides_take_the_same_steps(tmp_path):
    """Guards a race between two different losses or optimisers (a mask or a shift that is off)."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16)).init_weights_(0)
    save_model(model, tmp_path / "model", tmp_path, {})
    batches = training.make_batches(4, 3, paths=True)
    steps = [
        make(str(tmp_path / "model"), "cpu", False)
        for make in (training.ours, training.transformers_step)
    ]
    losses = torch.tensor([[step(batch) for step in steps] for batch in batches])
    assert (losses[:, 0] - losses[:, 1]).abs().max() < 1e-4
    assert n_supervised(batches[0]) == sum(
        int(pair.split("+")[1]) for pair in training.LENGTHS.split()[:3]
    )


def test_gpu_keeps_the_figures_of_a_benchmark_that_fails(monkeypatch, tmp_path):
    """Guards figures lost with a later failure, and headlines that fail on what is missing."""
    (tmp_path / "bench").mkdir()
    write = "import sys; open(sys.argv[2], 'w').write('{\"fp32\": 1}'); "
    (tmp_path / "bench" / "a.py").write_text(write + "raise ValueError('broken')")
    (tmp_path / "bench" / "b.py").write_text("nonsense(")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    figures = gpu.run_benchmark("a", [])
    assert figures["fp32"] == 1 and "ValueError: broken" in figures["error"]
    assert "SyntaxError" in gpu.run_benchmark("b", ["--quick"])["error"]
    assert all("None" in line for line in gpu.headlines({name: {} for name in gpu.BENCHMARKS}))
