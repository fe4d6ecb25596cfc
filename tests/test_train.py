"""train.py: runs that are killed, stopped, moved, repeated or continued; what a checkpoint says."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, refuses

import train
from sert_min import filters, tasks
from sert_min.io import hub, machine
from sert_min.io.files import read_json, read_jsonl, to_line, write_atomic
from sert_min.io.hub import read_sert
from sert_min.models import load_model
from sert_min.prompts import answer_sentence
from sert_min.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "tiny"
    return make_tiny_model(folder, n_embd=16, n_layer=1, n_head=2)


@pytest.fixture
def run(empty_folder, tmp_path, tiny, monkeypatch):
    """run("--flags") trains in tmp_path and returns the default output folder."""
    monkeypatch.setattr(train, "VALIDATE", 2)
    monkeypatch.setitem(tasks.TASKS, "micro", tasks.get("micro")._replace(greedy_cap=6))

    def train_now(flags: str = "", **given) -> Path:
        words = f"--method finetune --limit 24 --epochs 2 --report 0 {flags}".split()
        args = train.parse_args(["--model", str(tiny), *words])
        vars(args).update(given)
        train.main(args)
        out = args.out_dir or f"out/micro/{hub.model_label(str(tiny), tiny)}/finetune/seed0"
        return tmp_path / out

    return train_now


def assert_same_run(a: Path, b: Path) -> None:
    x, y = (load_model(out / "last").state_dict() for out in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("module, name, call, number", [
    ("sert_min.finetune", "train_step", 3, signal.SIGINT),
    ("train", "mean_loss", 1, signal.SIGTERM),  # in the first validation
    ("train", "greedy", 2, signal.SIGINT),  # before validation decodes (1 is the report)
])  # fmt: skip
def test_signals_save_and_name_the_command(run, monkeypatch, capsys, module, name, call, number):
    """Guards a lost epoch, and a validation that is missing, there twice or can't be stopped."""
    whole = run("--holdout --out-dir whole")
    real, calls = getattr(sys.modules[module], name), itertools.count(1)

    def signalling(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out-dir", "a b"])
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(f"{module}.{name}", signalling)
        run("--holdout --out-dir run")
    assert e.value.code == 128 + number
    assert "continue with: python train.py --out-dir 'a b'" in capsys.readouterr().out
    out = run("--holdout --out-dir run")
    assert "going on from step" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same_run(out, whole)


def test_finished_run_does_nothing_on_repeat(run, monkeypatch, capsys):
    """Guards a picture that is drawn before the model is saved, as it may fail."""

    def plot(metrics, png, title):
        assert (png.parent / "last/model.safetensors").exists()
        raise RuntimeError("no fonts")

    with monkeypatch.context() as m:
        m.setattr("sert_min.report.figures.plot_training", plot)
        out = run("--report 4")
    printed = capsys.readouterr().out
    assert "greedy decoding, 4 test questions" in printed and "reasoning outputs" in printed
    assert printed.count("before: ") == printed.count("after: ") == 3
    assert "loss.png was not drawn (RuntimeError: no fonts)" in printed
    assert not (out / "loss.png").exists()
    run()
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    assert run() == out and "is there already, trained for 6 steps" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}


def test_more_epochs_continue(run, tmp_path):
    """The result is that of a longer run, also of a folder that was moved or is older."""
    whole = run("--out-dir whole --epochs 3")
    older = run("--out-dir older --max-steps 3")
    settings = read_json(older / "settings.json") | {"clip": 1.0, "compile": False}
    write_atomic(older / "settings.json", json.dumps(settings))
    os.rename(older, tmp_path / "run")
    run("--out-dir run --epochs 2")
    out = run("--out-dir run --epochs 3")
    assert_same_run(out, whole)
    assert read_sert(out / "last")["step"] == 9
    refuses("9 steps already, asked are 6", run, "--out-dir run --epochs 2")


def test_other_settings_are_refused(run, monkeypatch, tmp_path):
    """Guards two trainings mixed in one folder, and a resume that measures dtype anew."""
    refuses(r"run `python sample.py --task micro --model \S+tiny", run, "--method sert")
    Path("p").mkdir()
    Path("p/selected.jsonl").touch()
    for flags, message in (("--method sert --paths p", "no path of p/selected.jsonl is selected"),
                           ("--method star --answer any", "--method star is --answer right"),
                           ("--method finetune --paths p", "leave --paths and the rules out")):  # fmt: skip
        refuses(message, run, flags)
    short = make_tiny_model(tmp_path / "short", n_positions=40)
    told = "question .* tokens, the model's context is 40"
    refuses(told, run, "--limit 3 --out-dir short-run", model=str(short))
    with monkeypatch.context() as m:
        m.setattr(machine, "pick_dtype", lambda name, device, n: torch.bfloat16)
        run("--out-dir run --max-steps 1")
    for flag in ("--lr 1e-3", "--seed 1", "--limit 16", "--loss-on all"):
        told = "other settings .* choose another --out-dir"
        refuses(told, run, f"--out-dir run --max-steps 1 {flag}")
    refuses("dtype: bf16 there, fp32 now", run, "--out-dir run --max-steps 2", dtype="fp32")
    assert read_json(run("--out-dir run --max-steps 2") / "settings.json")["dtype"] == "bf16"


def test_holdout_is_the_fixed_tenth():
    """Guards a tenth of what happens to have a path or to lie under --limit."""
    held = {q.id for q in tasks.load("micro", "validation")}
    with_paths = [(q, "p", "c") for q in tasks.load("micro", "train")[::3]]
    o = train.options(train.parse_args(["--holdout", "--limit", "50"]), "micro")
    rest, out = train.split_pairs(with_paths, o)
    assert len(rest) == 50 and {p[0].id for p in out} == held & {p[0].id for p in with_paths}
    assert not {p[0].id for p in rest} & held


def test_best_on_validation_is_kept_beside_the_last(run, monkeypatch):
    """Guards `best` being the last, and a best that a resume forgets."""
    losses = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(train, "mean_loss", lambda *a: next(losses))
    want = load_model(run("--holdout --epochs 2 --out-dir run") / "last").state_dict()
    run("--holdout --epochs 3 --out-dir run")
    out = run("--holdout --epochs 4 --out-dir run")
    logged = [r.get("validation_loss") for r in read_jsonl(out / "metrics.jsonl")]
    assert [loss for loss in logged if loss] == [3, 1, 2, 4]
    assert read_sert(out / "best")["validation_loss"] == 1.0
    best = load_model(out / "best").state_dict()
    assert all(torch.equal(best[k], want[k]) for k in want)


def test_what_is_learnt_from_a_file_of_paths(tmp_path, capsys):
    """Guards a training text that states two answers, rejected paths, and those of another task."""
    a, b, c = questions = tasks.load("micro", "train")[:3]
    texts = " One fact. So the answer is no.", "So the answer is yes.", "never"
    records = [{"id": q.id, "question": q.text, "text": text, "verdict": "selected"}
               for q, text in zip(questions, texts)]  # fmt: skip
    records[2]["verdict"] = "kept"
    (tmp_path / "selected.jsonl").write_text("".join(map(to_line, records)))
    pairs = train.sert_pairs(tmp_path / "selected.jsonl", questions)
    assert pairs == [(a, f"Question: {a.text}\nAnswer:", f" One fact. {answer_sentence(a)}")]
    printed = capsys.readouterr().out
    assert "2 lost a closing answer sentence" in printed and "1 were nothing else" in printed
    for change in ({"id": "x"}, {"question": "another?"}, {"text": None}):
        (tmp_path / "p.jsonl").write_text(to_line(records[0] | change))
        told = "not in this task's train split|text is missing"
        refuses(told, train.sert_pairs, tmp_path / "p.jsonl", questions)


def test_a_checkpoint_continues(run, tiny):
    """RUN and RUN/last are both a --model (transformers', too: test_gpt2.py); the root is kept."""
    first = run("--max-steps 2")
    for name in (first, first / "last"):
        out = run(f"--max-steps 2 --out-dir {name.name}-child", model=str(name))
        sert = read_sert(out / "last")
        assert sert["root"] == hub.model_label(str(tiny), tiny)
        assert sert["parents"] == [str(tiny), str(name)]
        assert sert["method"] == "finetune" and sert["step"] == 2
        assert sert["settings"]["weights"] == hub.weights_hash(first / "last")
    refuses("other settings .*weights", run, "--max-steps 4", model=str(first))


def write_paths(folder: Path, tiny: Path) -> Path:
    """Of eight questions: a selected path with a wrong answer, another with the right one."""
    tokenizer, sampled, loose = load_tokenizer(tiny), [], {**tasks.preset("micro"), "max_rep2": 1.0}
    questions = [q for q in tasks.load("micro", "train") if not q.choices][:8]
    for q, right in itertools.product(questions, (False, True)):
        told = {"yes": "no", "no": "yes"}[q.answer] if not right else q.answer
        text = f" Kalan plays golf{' golf golf' * right} on Sundays. So the answer is {told}."
        ids = tokenizer.encode(text)
        about = {"id": q.id, "question": q.text, "branch": int(right), "sample": 0, "path_start": 0}
        sampled.append({**about, "token_ids": ids, "logprobs": [-1.0] * len(ids), "finish": "eos"})
    records = filters.path_records(sampled, questions, tokenizer, filters.limits(loose))
    chosen = [r for r in records if r["verdict"] == "selected"]
    assert [r["branch"] for r in chosen] == [0] * 8
    folder.mkdir()
    write_atomic(folder / "paths.jsonl", map(to_line, records))
    write_atomic(folder / "selected.jsonl", map(to_line, chosen))
    return folder / "selected.jsonl"


def test_sert_and_star_from_one_folder(run, tmp_path, tiny, monkeypatch, capsys):
    """Guards a method that changes what the other one learns from, and rules not written down."""
    paths, learnt = write_paths(tmp_path / "paths", tiny), {}
    paths.with_name("funnel.json").write_text('{"rules": {"min_tokens": 11}}')  # sample.py's
    before = {p.name: p.read_bytes() for p in paths.parent.iterdir()}
    real = train.sert_pairs
    monkeypatch.setattr(train, "sert_pairs", lambda *a: learnt.setdefault(method, real(*a)))
    for order in ("sert star", "star sert"):
        for method in order.split():
            flags = "--max-rep2 1" if method == "star" else ""
            run(f"--method {method} {flags} --out-dir {order[:4]}-{method}", paths=str(paths))
    warned = capsys.readouterr().out.count("8 of these paths state another answer")
    assert warned == 2  # twice for sert, never for star
    for method in ("sert", "star"):
        texts = [text for _, _, text in learnt[method]]
        assert ["golf golf" in text for text in texts] == [method == "star"] * 8
        assert all(text.count(" is ") == 1 for text in texts)
        assert_same_run(*(tmp_path / f"{first}-{method}" for first in ("sert", "star")))
    assert {p.name: p.read_bytes() for p in paths.parent.iterdir()} == before
    rules = read_sert(tmp_path / "star-star/last")["rules"]
    assert rules["answer"] == "right" and rules["max_rep2"] == 1.0 and rules["min_tokens"] == 11
    assert "rules" not in read_sert(tmp_path / "sert-sert/last")
