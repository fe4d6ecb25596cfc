"""train.py: runs that are killed, stopped, moved, repeated or continued; what a checkpoint says."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_model

import train
from sert_min import tasks
from sert_min.io import hub, machine
from sert_min.io.errors import SertError
from sert_min.io.files import read_json, read_jsonl, to_line
from sert_min.io.hub import read_sert
from sert_min.models import load_model
from sert_min.prompts import answer_sentence
from sert_min.report import figures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("train") / "tiny", n_embd=16, n_layer=1, n_head=2
    )


@pytest.fixture
def run(tmp_path, tiny, monkeypatch):
    """run("--flags") trains in tmp_path and returns the default output folder."""
    monkeypatch.chdir(tmp_path)
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


def weights(out: Path) -> dict:
    return load_model(out / "last").state_dict()


def assert_same_run(a: Path, b: Path) -> None:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def stop_at(monkeypatch, owner, name: str, call: int, number=signal.SIGTERM) -> None:
    """Send this process a signal at the given call of `owner.name`."""
    real, calls = getattr(owner, name), [0]

    def signalling(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalling)


# --- killed, stopped, repeated --------------------------------------------------------------------


@pytest.mark.parametrize(
    "owner, name, call, number",
    [
        ("sert_min.finetune", "train_step", 3, signal.SIGINT),  # in a step
        ("train", "mean_loss", 1, signal.SIGTERM),  # in the first validation
        ("train", "greedy", 2, signal.SIGINT),  # before validation decodes (1 is the report)
        ("sert_min.finetune", "save_state", 1, signal.SIGTERM),  # while the last state is written
    ],
)
def test_signals_save_and_name_the_command(run, monkeypatch, capsys, owner, name, call, number):
    """Guards a lost epoch, a validation line that is missing or there twice after a stop, and a
    validation that can't be stopped."""
    whole = run("--holdout --out-dir whole")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out-dir", "a b"])
    with monkeypatch.context() as m:
        stop_at(m, sys.modules[owner], name, call, number)
        if name == "save_state":
            out = run("--holdout --out-dir run")  # nothing left to do: it ends by itself
        else:
            with pytest.raises(SystemExit) as e:
                run("--holdout --out-dir run")
            assert e.value.code == 128 + number
            assert "continue with: python train.py --out-dir 'a b'" in capsys.readouterr().out
            out = run("--holdout --out-dir run")
            assert "going on from step" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same_run(out, whole)


def test_finished_run_does_nothing_on_repeat(run, capsys):
    out = run()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    capsys.readouterr()
    run()
    assert "is there already, trained for 6 steps" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}


def test_moved_run_goes_on(run, monkeypatch, tmp_path):
    """Guards paths of the run's own folder inside its settings or state."""
    whole = run("--out-dir whole")
    with monkeypatch.context() as m:
        stop_at(m, sys.modules["sert_min.finetune"], "train_step", 4)
        with pytest.raises(SystemExit):
            run("--out-dir here")
    os.rename(tmp_path / "here", tmp_path / "there")
    assert_same_run(run("--out-dir there"), whole)


def test_more_epochs_continue(run, capsys):
    """The flags --epochs and --max-steps may be raised: the result is that of a longer run."""
    whole = run("--out-dir whole --epochs 3")
    run("--out-dir run --max-steps 3")
    run("--out-dir run --epochs 2")
    out = run("--out-dir run --epochs 3")
    assert_same_run(out, whole)
    assert read_sert(out / "last")["step"] == 9
    with pytest.raises(SertError, match="9 steps already, asked are 6"):
        run("--out-dir run --epochs 2")


def test_a_folder_of_an_earlier_version_goes_on(run):
    """Guards work that was begun when `clip` and `compile` were settings still."""
    whole, out = run("--out-dir whole"), run("--out-dir run --max-steps 3")
    older = read_json(out / "settings.json") | {"clip": 1.0, "compile": False}
    (out / "settings.json").write_text(json.dumps(older))
    assert_same_run(run("--out-dir run"), whole)


@pytest.mark.parametrize("flag", ["--lr 1e-3", "--seed 1", "--limit 16", "--loss-on all"])
def test_other_settings_are_refused(run, flag):
    """Guards two trainings mixed in one folder."""
    run("--out-dir run")
    with pytest.raises(SertError, match="other settings .* choose another --out-dir"):
        run(f"--out-dir run {flag}")


def test_what_was_resolved_is_kept(run, monkeypatch):
    """Guards a resume that measures threads and dtype anew and then differs or is refused."""
    with monkeypatch.context() as m:
        m.setattr(machine, "pick_dtype", lambda name, device, n: torch.bfloat16)
        out = run("--max-steps 2")
    assert read_json(out / "settings.json")["dtype"] == "bf16"
    monkeypatch.setattr(machine, "pick_threads", lambda n: pytest.fail("asked again"))
    run("--max-steps 3")
    with pytest.raises(SertError, match="dtype: bf16 there, fp32 now"):
        run("--max-steps 4", dtype="fp32")


# --- validation -----------------------------------------------------------------------------------


def test_holdout_is_the_fixed_tenth(monkeypatch):
    """Guards a tenth of what happens to have a path or to lie under --limit."""
    questions = tasks.load("micro", "train")
    held = {q.id for q in tasks.load("micro", "validation")}
    with_paths = [(q, "p", "c") for q in questions[::3]]
    o = train.options(train.parse_args(["--holdout", "--limit", "50"]))
    rest, out = train.split_pairs(with_paths, o)
    assert len(rest) == 50 and {p[0].id for p in out} == held & {p[0].id for p in with_paths}
    assert not {p[0].id for p in rest} & held
    assert train.split_pairs(with_paths, o._replace(holdout=False)) == (with_paths[:50], [])


def test_best_on_validation_is_kept_beside_the_last(run, monkeypatch):
    """Guards `best` being the last, and a best that a resume forgets."""
    losses = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(train, "mean_loss", lambda *a: next(losses))
    run("--holdout --epochs 3 --out-dir run")
    out = run("--holdout --epochs 4 --out-dir run")
    records = [r for r in read_jsonl(out / "metrics.jsonl") if "validation_loss" in r]
    assert [(r["epoch"], r["validation_loss"]) for r in records] == [(1, 3), (2, 1), (3, 2), (4, 4)]
    assert read_sert(out / "best")["validation_loss"] == 1.0
    losses = iter([3.0, 1.0])
    two = load_model(run("--holdout --epochs 2 --out-dir two") / "last").state_dict()
    best = load_model(out / "best").state_dict()
    assert all(torch.equal(best[k], two[k]) for k in two)


# --- examples -------------------------------------------------------------------------------------


def path_record(q, path: str, **changes) -> dict:
    return {"id": q.id, "question": q.text, "text": path, "verdict": "selected", **changes}


def test_paths_lose_their_own_answer_sentence(tmp_path, capsys):
    """Guards a training text that states two answers, and rejected paths in it."""
    questions = tasks.load("micro", "train")[:4]
    a, b, c, _ = questions
    records = [
        path_record(a, " One fact. So the answer is no."),
        path_record(b, "So the answer is yes."),
        path_record(c, "never", verdict="kept"),
    ]
    (tmp_path / "selected.jsonl").write_text("".join(map(to_line, records)))
    pairs = train.sert_pairs(tmp_path / "selected.jsonl", questions)
    assert pairs == [(a, f"Question: {a.text}\nAnswer:", f" One fact. {answer_sentence(a)}")]
    printed = capsys.readouterr().out
    assert "2 lost a closing answer sentence" in printed and "1 were nothing else" in printed


@pytest.mark.parametrize("change", [{"id": "x"}, {"question": "another?"}, {"text": None}])
def test_paths_of_another_task_are_refused(tmp_path, change):
    q = tasks.load("micro", "train")[0]
    (tmp_path / "p.jsonl").write_text(to_line(path_record(q, "A fact.", **change)))
    with pytest.raises(SertError, match="not in this task's train split"):
        train.sert_pairs(tmp_path / "p.jsonl", [q])


def test_missing_sample_output_names_the_command(run):
    with pytest.raises(
        SertError, match=r"run `python sample.py --task micro --model \S+tiny --seed 0`"
    ):
        run("--method sert")


def test_text_beyond_the_context_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = make_tiny_model(tmp_path / "short", n_positions=40)
    flags = f"--method finetune --limit 3 --model {short}"
    with pytest.raises(SertError, match="question .* tokens, the model's context is 40"):
        train.main(train.parse_args(flags.split()))


# --- the checkpoint -------------------------------------------------------------------------------


def test_checkpoint_opens_in_transformers_and_continues(run, tiny):
    """Must-show 7: same logits there; RUN and RUN/last are both a --model here."""
    first = run("--max-steps 2 --out-dir first")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(first / "last").eval()
    ours, ids = load_model(first / "last"), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert (theirs(ids).logits - ours.logits(ours(ids))).abs().max() < 1e-5
    assert not torch.equal(ours.wte.weight, load_model(tiny).wte.weight)
    root = hub.model_label(str(tiny), tiny)
    for name in (first, first / "last"):
        out = run("--max-steps 2 --out-dir " + name.name + "-child", model=str(name))
        sert = read_sert(out / "last")
        assert sert["root"] == root and sert["parents"] == [str(tiny), str(name)]
        assert sert["method"] == "finetune" and sert["step"] == 2
    assert sert["settings"]["weights"] == hub.weights_hash(first / "last")


def test_default_folder_of_a_child_run_is_not_its_parents(run):
    """Guards a checkpoint that trains over itself: the names agree, the weights do not."""
    parent = run("--max-steps 2")
    with pytest.raises(SertError, match="other settings .*weights"):
        run("--max-steps 4", model=str(parent))


def test_before_and_after_table(run, capsys):
    run("--report 4 --max-steps 1")
    printed = capsys.readouterr().out
    assert "greedy decoding, 4 test questions" in printed
    assert "reasoning outputs" in printed and "accuracy (strict)" in printed
    assert printed.count("before: ") == printed.count("after: ") == 3


def test_curve_is_drawn(run, tmp_path):
    """The PNG comes from metrics.jsonl alone, with and without validation."""
    out = run("--holdout")
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    metrics = tmp_path / "m.jsonl"
    metrics.write_text(json.dumps({"step": 1, "epoch": 1, "loss": 2.0}) + "\n")
    figures.plot_training(metrics, tmp_path / "m.png", "one step")
    assert (tmp_path / "m.png").stat().st_size > 1000
