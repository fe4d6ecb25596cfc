"""distill.py from flags to checkpoint, with a fake teacher and a tiny student."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY, ROOT, make_checkpoint, refuses, shared, start
from fake_server import FakeServer, error, ok

import distill
from sert_min import prompts, tasks
from sert_min.finetune import encode_example
from sert_min.io.files import read_jsonl, to_line
from sert_min.models import read_config
from sert_min.questions import Question
from sert_min.script import Student
from sert_min.tokenizer import load_tokenizer

TRIGGER = "Therefore, the answer (Yes or No) is"  # the second request, arXiv 2205.11916
pytestmark = pytest.mark.usefixtures("empty_folder", "keyed")
YES = "Things are so. So the answer is yes."
GOLD = ("yes", "no") * 15
QUESTIONS = [Question("strategy_qa", str(10 * i), f"Is {i} even?", a) for i, a in enumerate(GOLD)]


def answers_apart(body):
    """A teacher that answers in the second request only."""
    return ok("(no)" if TRIGGER in str(body) else " Reasoning. Is it?")


@pytest.fixture
def student(tiny_model_folder, monkeypatch):
    """The student; there are 30 questions instead of a dataset."""

    def load(task, split, data_dir=None, real=tasks.load):
        return QUESTIONS if task == "strategy_qa" and not data_dir else real(task, split, data_dir)

    monkeypatch.setattr(tasks, "load", load)
    return tiny_model_folder


def run(student, server, *more):
    """Without a student its own choice is left to distill.py, without a server the teacher's."""
    words = ["--task", "strategy_qa", *(["--model", student] if student else [])]
    if server:
        words += ["--teacher-model", "org/m", "--base-url", server.url, "--concurrency", 4]
    start(distill, *words, *more)


def records(folder="out"):
    (path,) = Path(folder).rglob("rationales.jsonl")
    return list(read_jsonl(path))


def test_collect_clean_train_and_repeat(student, capsys):
    """The whole of it; the same command again asks nothing, trains nothing, changes no byte."""
    with FakeServer(ok(YES)) as server:
        prices = "--price-in", 1, "--price-out", 2
        run(student, server, "--out-dir", "run", "--max-steps", 2, *prices)
        assert len(server.bodies) == 30
        said = capsys.readouterr()
        before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
        run(student, server, "--out-dir", "run", "--max-steps", 2)
        assert len(server.bodies) == 30
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    rows = records("run")
    assert [r["id"] for r in rows] == [q.id for q in QUESTIONS]
    assert [r["kept"] for r in rows] == [q.answer == "yes" for q in QUESTIONS]
    assert {r["rationale"] for r in rows} == {"Things are so."}
    assert "300 tokens in, 150 out; 0.0006 USD" in said.out
    assert KEY.encode() not in b"".join(before.values()) and KEY not in said.out + said.err
    assert json.loads(Path("run/last/sert.json").read_text())["method"] == "rd"
    prompt = server.bodies[0]["messages"][0]["content"]
    assert prompt == "Question: Is 0 even?\nAnswer: Let's think step by step."


def test_collect_only_shares_replies_between_students(student, tmp_path):
    """Replies are bought once for all students of a task; another prompt is another request."""
    other = "no/such/student"
    with FakeServer(ok(YES)) as server:
        run(student, server, "--collect-only", "--out-dir", "one")
        run(other, server, "--collect-only", "--keep", "all")
        run(student, server, "--max-steps", 1)
        assert len(server.bodies) == 30
        run(other, server, "--collect-only", "--limit", 3, "--teacher-suffix", " End well.")
        assert server.bodies[30]["messages"][0]["content"].endswith("step by step. End well.")
    assert len(list(Path(".").rglob("rationales.jsonl"))) == 3 and len(records("one")) == 30
    (replies,) = Path(".").rglob("responses.jsonl")
    assert str(replies.parent) == "out/strategy_qa/teacher-org-m"
    with FakeServer(ok(YES)) as server:  # replies of an earlier version lie in --out-dir
        run(student, server, "--collect-only", "--limit", 3, "--teacher-dir", "run")
        run(student, server, "--out-dir", "run", "--limit", 3, "--max-steps", 1)
        assert len(server.bodies) == 3 and Path("run/last/config.json").exists()


def test_dry_run_asks_nothing_and_writes_nothing(student, capsys, monkeypatch):
    """What it says is a bound: neither a key nor the student is needed for it."""
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeServer(ok(YES)) as server:
        run("no/such/model", server, "--dry-run", "--price-in", 1, "--price-out", 1, "--two-step")
        assert server.bodies == []
    said = capsys.readouterr().out
    assert "Question: Is 0 even?\nAnswer: Let's think step by step." in said
    assert "plan: 60 teacher requests (0 replies are there)" in said and "USD" in said
    assert f"{30 * (512 + 64):,} out" in said and not Path("out").exists()
    line = {"question": "Is 0 even?", "rationale": "It is. So the answer is yes."}
    Path("t.jsonl").write_text(to_line(line))
    run(student, None, "--teacher-file", "t.jsonl", "--dry-run")
    assert "1 rationales for 30 questions" in capsys.readouterr().out
    assert not Path("out").exists()
    path = Path("out/strategy_qa/teacher-org-m/responses.jsonl")
    with FakeServer(ok(YES)) as server:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        run(student, server, "--collect-only", "--limit", 5)
        path.write_bytes(path.read_bytes() + b'{"torn')  # another process may be writing that line
        run(student, server, "--dry-run")
        said = capsys.readouterr().out
        assert "a torn last line" in said and "25 teacher requests (5 replies are there)" in said
        assert path.read_bytes().endswith(b'{"torn')
        run(student, server, "--collect-only", "--limit", 6)
        assert len(list(read_jsonl(path))) == 6  # nothing was glued to it


def test_missing_rows_and_training_on_what_is_there(student, capsys):
    """One question without a reply blocked training; later replies don't change that student."""
    broken = [" 7 "]

    def step(body):
        bad = any(word in body["messages"][0]["content"] for word in broken)
        return error(500, "\x1b[31moops") if bad else ok(YES)

    with FakeServer(answer=step) as server:
        for more in (["--collect-only"], ["--max-steps", 1]):
            with pytest.raises(SystemExit) as end:
                run(student, server, *more)
            said = capsys.readouterr()
            assert end.value.code == 2 and "missing: strategy_qa/70: HTTP 500" in said.err
            assert "Repeat" in said.err and "--allow-missing trains" in said.err
            assert "\x1b[31m" not in said.out + said.err
        assert len(records("out/strategy_qa/teacher-org-m")) == 29
        assert not list(Path("out").rglob("last"))  # no student is trained on a part unasked
        run(student, server, "--max-steps", 1, "--allow-missing")
        trained = next(Path("out").rglob("last/model.safetensors"))
        before, requests = trained.read_bytes(), len(server.bodies)
        broken.clear()
        run(student, server, "--max-steps", 1, "--allow-missing")
        assert trained.read_bytes() == before and len(server.bodies) == requests
        refuses("of other rationales; .*another --out-dir", run, student, server, "--max-steps", 1)


def test_two_step(student):
    with FakeServer(answer=answers_apart) as server:
        for _ in range(2):
            run(student, server, "--collect-only", "--two-step")
            assert len(server.bodies) == 60
        first, second = server.bodies[0]["messages"], server.bodies[-1]["messages"]
        assert [m["role"] for m in second] == ["user", "assistant", "user"] and len(first) == 1
    assert {r["teacher_answer"] for r in records()} == {"no"}
    assert [r["kept"] for r in records()] == [q.answer == "no" for q in QUESTIONS]
    with FakeServer(ok(None, "content_filter")) as server:  # no answer is asked to nothing
        run(student, server, "--collect-only", "--two-step", "--limit", 5)
        assert len(server.bodies) == 5
    assert {r["reason"] for r in records()} == {"empty"}
    with FakeServer(answer=answers_apart) as server:
        run(student, server, "--collect-only", "--two-step", "--completions", "--limit", 2)
        prompts = sorted(body["prompt"] for body in server.bodies)
    assert prompts[1] == f"{prompts[0]} Reasoning. Is it?\n{TRIGGER}" and len(prompts) == 4


def test_unreadable_answers_stop_after_20(student):
    """9,741 replies were bought before somebody looked; the same command buys no 20 more."""
    with FakeServer(ok("I like trains.")) as server:
        told = "only 0 of the first 2.*--teacher-suffix.*--two-step only adds"
        for _ in range(2):
            refuses(told, run, student, server, "--collect-only")
        assert 20 <= len(server.bodies) < 20 + 4  # and those in flight
        kept = Path("out/strategy_qa/teacher-org-m/responses.jsonl").read_text().count("\n")
        assert kept == len(server.bodies)
        run(student, server, "--collect-only", "--keep", "all", "--limit", 25)
        assert len(server.bodies) == 25
        run(student, server, "--collect-only", "--go-on")
        assert len(server.bodies) == 30
        assert {r["reason"] for r in records()} == {"answer not readable"}
        refuses("no rationale was kept", run, student, server, "--max-steps", 2)
        told = refuses("--go-on", run, student, server, "--collect-only", "--two-step")
        assert "--two-step only" not in told


def test_several_samples_and_shots(student, capsys):
    """All right replies of a question are kept, or --per-question of them; examples are sent first."""
    row = {"question": "Is 900 even?", "rationale": "900 is twice 450.", "answer": "yes"}
    Path("shots.jsonl").write_text(to_line(row))
    more = "--collect-only", "--limit", 2, "--teacher-samples", 3, "--teacher-temperature", 0.7
    with FakeServer(ok(YES)) as server:
        run(student, server, *more, "--shots", "shots.jsonl")
        run(student, server, *more, "--shots", "shots.jsonl", "--per-question", 2)
        assert len(server.bodies) == 6
        asked, told, last = server.bodies[0]["messages"]
        assert asked["content"] == "Question: Is 900 even?\nAnswer: Let's think step by step."
        assert told == {"role": "assistant", "content": "900 is twice 450. So the answer is yes."}
    rows, numbers = records(), [(q.id, i) for q in QUESTIONS[:2] for i in range(3)]
    assert [(r["id"], r["sample"]) for r in rows] == numbers
    reasons = [r["reason"] for r in rows if r["answer"] == "yes"]
    assert reasons == ["ok", "ok", "enough of this question"]
    refuses("above 1 needs a --teacher-temperature", run, student, server, *more[:5])
    Path("shots.jsonl").write_text(to_line(row | {"question": QUESTIONS[0].text.upper()}))
    refuses("1 is a question of this task", run, student, server, *more, "--shots", "shots.jsonl")
    said = capsys.readouterr().out
    assert (
        "kept: ok" in said and "dropped: answer wrong" in said and "teacher's answer: yes" in said
    )


def test_bad_flags_are_refused_before_anything_is_sent(student):
    """All flags of an endpoint are tested in test_endpoint.py."""
    with FakeServer(ok(YES)) as server:
        refuses("not both", run, student, server, "--teacher-file", "x")
        refuses("above 0", run, student, server, "--concurrency", 0)
        assert server.bodies == []
    refuses("--teacher-model NAME.*--teacher-file FILE", run, student, None)
    for flag in (["--max-cost", "1"], ["--system-prompt", "x"], ["--teacher-suffix", " x"]):
        refuses("needs --teacher-model", run, student, None, "--teacher-file", "x", *flag)


def test_rationales_that_do_not_fit_the_student_are_counted(student):
    """A longer text would fail in the middle of training."""
    with FakeServer(ok("Word. " * 300 + "So the answer is yes.")) as server:
        refuses("no rationale was kept", run, student, server, "--limit", 2, "--keep", "all")
    assert {r["reason"] for r in records()} == {"too long"}


def test_what_fits_counts_as_training_does(tiny_model_folder, monkeypatch):
    """Guards a text one token too long behind a start token (Llama 3's): it ends the training."""
    q, tokenizer = tasks.load("micro", "train")[0], load_tokenizer(tiny_model_folder)
    student, config = Student("tiny", tiny_model_folder, "tiny", {}), read_config(tiny_model_folder)
    config.n_positions = len(encode_example(tokenizer, *prompts.rd_pair(q, "We think."))[0])
    monkeypatch.setattr(distill, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(distill, "read_config", lambda folder: config)
    assert distill.fits_in(student)(q, "We think.")
    tokenizer.start = [tokenizer.eot]
    assert not distill.fits_in(student)(q, "We think.")


def test_the_sert_checkpoint_is_the_default_student(student, monkeypatch, capsys):
    """SERT+RD if self-training is done, RD else; both said. --model decides by its own record."""
    row = tasks.get("strategy_qa")._replace(student=str(student))
    monkeypatch.setitem(tasks.TASKS, "strategy_qa", row)
    with FakeServer(ok(YES)) as server:
        more = "--limit", 4, "--max-steps", 1
        run(None, server, *more)
        assert "starting from the raw student" in capsys.readouterr().out
        (label,) = [p.name for p in Path("out/strategy_qa").iterdir() if "teacher" not in p.name]
        sert = Path(f"out/strategy_qa/{label}/sert/seed0/last")
        make_checkpoint(student, sert, root=label, method="sert")
        run(None, server, *more)
        assert "starting from the SERT checkpoint" in capsys.readouterr().out
        run(sert, server, *more)
        assert len(server.bodies) == 4
        make_checkpoint(student, Path("finetuned/last"), root=label, method="finetune")
        refuses("trained by finetune already.*--out-dir", run, "finetuned", server, "--limit", 4)
    found = {str(p.relative_to(sert.parents[2])) for p in Path("out").rglob("rationales.jsonl")}
    assert found == {"rd/seed0/rationales.jsonl", "sert-rd/seed0/rationales.jsonl"}


def test_micro_teacher_is_offline_and_right(student):
    """The default needs no teacher: the generator explains its own questions."""
    run(student, None, "--task", "micro", "--collect-only", "--limit", 40)
    rows = records()
    assert len(rows) == 40 and all(r["kept"] and r["source"] == "micro" for r in rows)


def test_real_davinci_rationales_train(model):
    """Real questions and rationales through the whole script; a real context holds them all."""
    more = ["--data-dir", shared("data"), "--max-steps", 2, "--batch-size", 2, "--out-dir", "run"]
    more += ["--teacher-file", shared("data/teacher/strategy_qa.train.text-davinci-002.jsonl")]
    run(model, None, *more)
    refuses("of other rationales", run, model, None, *more, "--keep", "all")
    assert sum(r["kept"] for r in records("run")) == 874


def test_help_is_quick_and_asks_nothing():
    words = [sys.executable, "-X", "importtime", "distill.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "--teacher-model" in done.stdout and "argparse" in done.stderr
    assert "openai" not in done.stderr
