"""What is not trusted: models, datasets, teachers and their replies; and where a key may go. Pickle
files are in test_gpt2.py, hostile text in a real browser in test_page.py."""

import json
import re
import socket
from pathlib import Path

import pytest
from conftest import KEY, NO_RULES, ROOT, make_checkpoint, start
from fake_server import FakeServer, error, ok, raw

import distill
import evaluate
import sample
import train
from sert_min import tasks
from sert_min.finetune import encode_example
from sert_min.io import asking
from sert_min.io.errors import run_script
from sert_min.io.files import read_jsonl, to_line
from sert_min.io.vocabulary import END
from sert_min.prompts import question_prompt, rd_pair
from sert_min.questions import Question, with_choices
from sert_min.report.likelihood import make_tree
from sert_min.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder", "keyed")
EVIL = "\x1b[31m\x1b]0;owned\x07\x9b2J\r\u202e</script><img src=x onerror=alert(1)> ../../x "
DANGER = re.compile(r"""^\s*(import|from)\ .*\b(c?pickle|dill|cloudpickle|joblib|marshal|shelve|builtins)\b
    |(?<![\w.])(eval|exec|compile|__import__)\(|\bos\.(system|popen)\b|\byaml\.load\(|shell=True
    |verify=False|_create_unverified|allow_pickle=True|trust_remote_code
    |torch\.load\((?!.*weights_only=True)""", re.VERBOSE | re.MULTILINE)  # fmt: skip
BAD = ["import os, marshal", "from pickle import loads", "eval('1')", "run(c, shell=True)",
       "os.system('ls')", "torch.load(f)", "yaml.load(f)", "httpx.Client(verify=False)"]  # fmt: skip
GOOD = ["model.eval()", "re.compile('a')", "torch.load(f, weights_only=True)", "run(c)"]


def test_no_program_file_runs_what_it_reads():
    """Guards pickles, shells, code from text and skipped certificates."""
    assert all(map(DANGER.search, BAD)) and not any(map(DANGER.search, GOOD))
    files = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & {*p.relative_to(ROOT).parts}]
    assert len(files) > 20
    assert not {str(p): found[0] for p in files if (found := DANGER.search(p.read_text()))}


@pytest.fixture(autouse=True)
def six_questions(monkeypatch):
    """Six questions for every task; no long wait for what is in flight."""
    questions = [Question("strategy_qa", str(i), f"Is {i} even?", "yes") for i in range(6)]
    monkeypatch.setattr(asking, "DRAIN", 0.1)
    monkeypatch.setattr(tasks, "load", lambda *_, **__: questions)


def said_by(script, words, capfd) -> str:
    """All that a command prints, as run_script ends it; a SystemExit message goes to stderr."""
    try:
        run_script(script.main, script.parse_args(list(map(str, words))))
    except SystemExit as e:
        print(e.code)
    out = capfd.readouterr()
    return out.out + out.err


ANSWERS = {
    "the key in each field": [ok(f"{KEY}. So the answer is yes.", finish=KEY, model=KEY, id=KEY)],
    "401": [error(401, f"Incorrect API key provided: {KEY}", code=KEY)],
    "429 and then good": [error(429, f"slow down {KEY}", retry_after="0"), ok("So it is yes.")],
    "500": [error(500, f"at {KEY}")],
    "cut": [raw(200, f'{{"key":"{KEY}"}}'.encode(), cut=9)],
    "a web page": [raw(200, f"<html>{KEY}</html>".encode(), content_type="text/html")],
    "redirect": [raw(302, b"", location=f"http://127.0.0.1:9/{KEY}")],
}


@pytest.mark.parametrize("what", ANSWERS)
def test_the_key_is_in_no_byte(what, model, capfd):
    """Whatever the server does with it, at the teacher's and at the judge's endpoint."""
    with FakeServer(*ANSWERS[what]) as server:
        words = ["--task", "strategy_qa", "--model", model, "--base-url", server.url]
        words += ["--limit", "4", "--deadline", "0.4"]
        collect = ["--teacher-model", "m", "--collect-only", "--keep", "all"]
        said = said_by(distill, [*words, *collect], capfd)
        said += said_by(evaluate, [*words, "--judge-model", "m", "--max-new-tokens", "2"], capfd)
        assert set(server.auths) == {f"Bearer {KEY}"} and len(server.bodies) >= 2
    files = b"".join(p.read_bytes() + str(p).encode() for p in Path().rglob("*") if p.is_file())
    assert files and KEY.encode() not in files and KEY not in said
    assert "teacher m" in said and "judge m" in said


def test_plain_sampling_needs_no_network(monkeypatch):
    """Not even this machine's."""
    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    start(sample, "--limit", 2, "--max-new-tokens", 4, "--out-dir", "o")
    assert Path("o/paths.jsonl").exists()


def test_hostile_text_stays_text(model, tmp_path, capfd, monkeypatch):
    """What is printed holds no control character, the page no live tag; what was paid for is stored
    whole; names of models, of a checkpoint's root and seed become one part of a folder's name."""
    choices = tuple(f"{EVIL}{i}" for i in range(5))
    text = with_choices(f"{EVIL}?", choices)
    evil = [Question("commonsense_qa", f"{EVIL}{i}", text, "C", choices) for i in range(2)]
    monkeypatch.setattr(tasks, "load", lambda *_, **__: evil)
    about = {"method": "sert", "root": "..", "seed": "/../../../../../escaped", "parents": [EVIL],
             "task": EVIL, "prompt_suffix": f" {EVIL}"}  # fmt: skip
    student = make_checkpoint(model, tmp_path / "evil", **about)
    inside = Path("out/commonsense_qa")  # where results go without --out-dir
    told = []

    def run(script, *words):
        base = ["--task", "commonsense_qa", "--model", student, "--device", "cpu"]
        told.append(said_by(script, [*base, *words], capfd))

    short = ["--max-new-tokens", "4"]
    run(sample, *short, "--dry-run")
    run(sample, *short, *NO_RULES, "--html", "p.html", "--no-early-reject")
    (paths,) = inside.rglob("selected.jsonl")
    run(train, "--max-steps", "1", "--report", "2", "--paths", paths, "--out-dir", "t")
    assert Path("t/last").is_dir(), told
    with FakeServer(ok(EVIL, finish=EVIL, model=EVIL, id=EVIL), error(400, EVIL)) as server:
        ask = ["--base-url", server.url, "--concurrency", "1"]
        teach = [*ask, "--teacher-model", EVIL, "--keep", "all", "--collect-only", "--out-dir", "d"]
        for dry in (["--dry-run"], []):
            run(distill, *teach, *dry)
            run(evaluate, *ask, *short, "--judge-model", EVIL, *dry)
    (reply, *_) = read_jsonl(next(Path("out").rglob("teacher-*/responses.jsonl")))
    assert reply["text"] == EVIL and len(server.bodies) >= 2
    assert list(inside.rglob("predictions.jsonl"))
    assert len(list(inside.rglob("sent.jsonl"))) == 2  # the teacher's and the judge's
    names = ("id", "question", "answer", "rationale", "teacher_completion", "teacher_answer")
    Path("texts.jsonl").write_text(to_line({**dict.fromkeys(names, EVIL), "answer": "yes"}))
    run(evaluate, "--task", "strategy_qa", "--predictions", "texts.jsonl")
    metrics = {"task": EVIL, "model": EVIL, "n": 1, "majority": [EVIL, 0.5], "split": "test",
               "method": "sert", "acc": [0.5, 0.1, 0.9]}  # fmt: skip
    Path("t/metrics.json").write_text(json.dumps(metrics))
    run(evaluate, "--table", "t")
    said = "".join(told)
    assert "scores 50.00 %" in said and "prompt of question" in said
    bad = [i for i, c in enumerate(said) if not (c.isprintable() or c in "\n\r")]
    assert not bad, said[: bad[0] + 1][-90:]
    html = Path("p.html").read_text()
    assert "onerror" in html and "<img" not in html and html.count("</script>") == 2  # data, code
    assert "Content-Security-Policy" in html


def test_end_of_text_in_a_question_is_ordinary_text(model):
    """In every prompt and training text the special token stands only where we put it."""
    tokenizer = load_tokenizer(model)
    q = Question("strategy_qa", "1", f"Is {END} the end? {END}", "yes")
    prompt = tokenizer.encode(question_prompt(q))
    ids, targets = encode_example(tokenizer, *rd_pair(q, f"It is {END}."), "all")
    for some in (prompt, ids, make_tree(tokenizer, q, f"{END} it is.", "", 1000).ids):
        assert tokenizer.eot not in some and END in tokenizer.decode(some)
    assert targets.count(tokenizer.eot) == 1 and targets[-1] == tokenizer.eot
