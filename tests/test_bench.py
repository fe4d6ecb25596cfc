"""bench/training.py: its embedded lengths are those of the real data, its peer takes the same step."""

import json

import pytest
import torch
from conftest import shared

from bench import common, gpu, training
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


def test_gpu_keeps_the_figures_of_a_part_that_fails(monkeypatch, tmp_path, capsys):
    """Guards figures lost with a later failure or a time limit, and headlines that fail on what is
    missing."""
    (tmp_path / "bench").mkdir()
    write = "import sys, time; open(sys.argv[2], 'w').write('{\"fp32\": 1}'); print('there'); "
    (tmp_path / "bench" / "a.py").write_text(write + "raise ValueError('broken')")
    (tmp_path / "bench" / "b.py").write_text("nonsense(")
    (tmp_path / "bench" / "c.py").write_text(write + "time.sleep(60)")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for name, seconds, error in (("a", 30, "ValueError: broken"), ("c", 3, "stopped after 3 s")):
        part = tmp_path / f"gpu-{name}.json"
        figures = gpu.run_part(name, part, quick=False, seconds=seconds)
        assert figures["fp32"] == 1 and error in figures["error"]
        assert json.loads(part.read_text()) == figures
        assert "there" in capsys.readouterr().out
    assert "SyntaxError" in gpu.run_part("b", tmp_path / "gpu-b.json", True, 30)["error"]
    assert len(gpu.headlines({})) == 2 and all("None" in line for line in gpu.headlines({}))


@pytest.mark.parametrize("processes", [0, 2])
def test_gpu_counts_the_tests_that_ran(monkeypatch, tmp_path, processes):
    """Guards counts that are only in pytest's last line, which a time limit cuts off."""
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): print('told')\ndef test_b(): assert 0\n"
        "@pytest.mark.parametrize('x', [1, 2])\ndef test_c(x): pytest.skip('no GPU')\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setitem(
        gpu.TESTS, "decoder", ["-q", f"-n{processes}", "test_x.py"]
    )  # -q as in pyproject.toml
    found = gpu.run_part("decoder", tmp_path / "gpu-decoder.json", False, 60)
    assert {k: found[k] for k in ("passed", "failed", "skipped")} == {
        "passed": 1,
        "failed": 1,
        "skipped": 2,
    }
    assert found["names"] == ["test_x.py::test_b"]


def test_chains_draw_what_they_should():
    """Guards peers that draw from another distribution, or are spared the log-prob."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    row = torch.randn(300, generator=g) * 2
    best, ids = row.log_softmax(0).topk(common.TOP_K)
    share = best.softmax(0)
    kept = share.cumsum(0) - share < common.TOP_P
    wanted = torch.zeros(300).index_put((ids[kept],), best[kept].softmax(0))
    for chain in (common.eager, common.without_sort):
        tokens, logprobs = chain(row.expand(4000, 300))
        assert torch.allclose(logprobs, row.log_softmax(0)[tokens], atol=1e-5)
        counts = tokens.flatten().bincount(minlength=300) / 4000
        assert (counts - wanted).abs().max() < 0.03  # four standard deviations
