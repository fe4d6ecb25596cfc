"""What is not trusted: models, datasets, teachers and their replies; and where a key may go.

tests/test_teacher.py has the key inside the client, addresses and redirects; test_gpt2.py pickle
files and paths in a shard index; test_page.py hostile text in a real browser."""

import ast
import json
import shutil
import socket
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, make_tiny_model
from fake_server import FakeServer, by_body, error, ok, raw
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

import distill
import evaluate
import sample
import train
from sert_min import tasks
from sert_min.finetune import encode_example
from sert_min.io import endpoint
from sert_min.io.errors import run_script
from sert_min.io.files import read_jsonl, to_line
from sert_min.io.hub import model_label
from sert_min.io.vocabulary import END
from sert_min.prompts import question_prompt, rd_pair
from sert_min.questions import Question
from sert_min.report.likelihood import make_tree
from sert_min.tokenizer import load_tokenizer

KEY = "sk-test-0123456789abcdefKEY"
EVIL = "\x1b[31m\x1b]0;owned\x07\x9b2J\r\u202e</script><img src=x onerror=alert(1)> ../../x "


# --- the program's own text -----------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BAD_CODE = [
    "import pickle", "from pickle import loads", "import os, marshal", "eval('1')", "exec(text)",
    "compile('1', '', 'eval')", "__import__('os')", "subprocess.run(c, shell=True)",
    "os.system('ls')", "os.popen('ls')", "torch.load(f)", "torch.load(f, weights_only=False)",
    "yaml.load(f)", "requests.get(u, verify=False)", "np.load(f, allow_pickle=True)",
    "from_pretrained(n, trust_remote_code=True)", "httpx.Client(verify=False)",
    "from builtins import eval", "ssl._create_unverified_context()",
]  # fmt: skip
GOOD_CODE = ["model.eval()", "re.compile('a')", "torch.compile(f)", "torch.load(f, weights_only=True)",
             "subprocess.run(c)", "np.load(f)", "yaml.safe_load(f)"]  # fmt: skip


def dangers(code: str) -> list[str]:
    """Lines that run what they read, a shell, or skip a certificate."""
    found = []
    for node in ast.walk(ast.parse(code)):
        bad = False
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            bad = any(n.split(".")[0] in FORBIDDEN | {"builtins"} for n in names)
        elif isinstance(node, ast.Attribute):
            bad = node.attr in ("_create_unverified_context", "popen") or (
                node.attr == "system" and ast.unparse(node.value) == "os"
            )
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            bad = name in ("eval", "exec", "compile", "__import__", "yaml.load")
            bad |= given.get("shell", "False") != "False" or given.get("verify") == "False"
            bad |= given.get("allow_pickle", "False") != "False" or "trust_remote_code" in given
            bad |= name == "torch.load" and given.get("weights_only") != "True"
        if bad:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_no_program_file_runs_what_it_reads():
    """The walk finds what it looks for, and finds none of it."""
    assert all(map(dangers, BAD_CODE)) and not any(map(dangers, GOOD_CODE))
    files = [
        f for f in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(f.relative_to(ROOT).parts)
    ]
    assert len(files) > 20
    found = {str(f.relative_to(ROOT)): bad for f in files if (bad := dangers(f.read_text()))}
    assert not found


# --- the key --------------------------------------------------------------------------------------

QUESTIONS = [Question("strategy_qa", str(i), f"Is {i} even?", "yes") for i in range(6)]


@pytest.fixture(autouse=True)
def no_bars_of_other_tests():
    """A bar that a failed run of another test left open would move ours to a second line, by an
    escape sequence of tqdm's own."""
    tqdm._instances.clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("security") / "model", n_positions=1024)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, a key, and six questions for every task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    monkeypatch.setattr(endpoint, "DRAIN", 0.1)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(tasks, "load", lambda *_, **__: QUESTIONS)


def said_by(script, words, capfd) -> str:
    """All that a command prints, as run_script ends it; a SystemExit message goes to stderr."""
    try:
        run_script(script.main, script.parse_args(list(map(str, words))))
    except SystemExit as e:
        print(e.code)
    out = capfd.readouterr()
    return out.out + out.err


@by_body
def sends_it_back(body):
    """The key in every field of a good reply."""
    return ok(f"It is {KEY}. So the answer is yes.", finish=KEY, model=KEY, id=KEY)


ANSWERS = {
    "the key in each field": [sends_it_back],
    "401": [error(401, f"Incorrect API key provided: {KEY}", code=KEY)],
    "429 and then good": [error(429, f"slow down {KEY}", retry_after="0"), ok("So it is yes.")],
    "429 for hours": [error(429, KEY, retry_after="9999")],
    "500": [error(500, f"at {KEY}")],
    "400": [error(400, f"bad {KEY}", param=KEY)],
    "404": [error(404, f"no model for {KEY}")],
    "malformed": [raw(200, f'{{"key":"{KEY}"'.encode())],
    "cut": [raw(200, f'{{"key":"{KEY}"}}'.encode(), cut=9)],
    "a web page": [raw(200, f"<html>{KEY}</html>".encode(), content_type="text/html")],
    "no choices": [raw(200, f'{{"choices":[],"error":"{KEY}"}}'.encode())],
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
        judge = ["--judge-model", "m", "--max-new-tokens", "2"]
        said += said_by(evaluate, [*words, *judge], capfd)
        assert set(server.auths) == {f"Bearer {KEY}"} and len(server.bodies) >= 2
    files = b"".join(p.read_bytes() + str(p).encode() for p in Path().rglob("*") if p.is_file())
    assert files and KEY.encode() not in files and KEY not in said
    assert "teacher m" in said and "judge m" in said


@pytest.mark.parametrize(
    "script, flag", [(distill, "--teacher-model"), (evaluate, "--judge-model")]
)
def test_no_key_over_http_to_another_machine(script, flag, model, capfd, monkeypatch):
    """192.0.2.1 is nobody; nothing may even be tried."""
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    words = ["--task", "strategy_qa", "--model", model, flag, "m", "--limit", "2"]
    words += ["--base-url", "http://192.0.2.1/v1"]
    words += ["--max-new-tokens", "2"] if script is evaluate else ["--collect-only"]
    said = said_by(script, words, capfd)
    assert "unencrypted" in said and "--insecure" in said and not tried


def test_plain_sampling_needs_no_network(model, monkeypatch, tmp_path):
    """Not even this machine's."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was reached for: {args}")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    words = ["--limit", "2", "--max-new-tokens", "4", "--out-dir", str(tmp_path / "o")]
    sample.main(sample.parse_args(words))  # the micro-world's own student
    assert (tmp_path / "o/paths.jsonl").exists()


# --- hostile text ---------------------------------------------------------------------------------


def controls(said: str) -> set[str]:
    """Characters that a terminal acts upon, but for line ends and tqdm's carriage return."""
    return {c for c in said if not c.isprintable()} - set("\n\r")


def evil_model(model: Path, folder: Path) -> Path:
    """A checkpoint whose own description is hostile."""
    shutil.copytree(model, folder)
    about = {"method": "sert", "root": "..", "seed": "/../../../../../escaped", "parents": [EVIL],
             "task": EVIL, "prompt_suffix": f" {EVIL}"}  # fmt: skip
    (folder / "sert.json").write_text(json.dumps(about))
    return folder


def test_hostile_text_stays_text(model, tmp_path, capfd, monkeypatch):
    """Questions, a checkpoint's description, a teacher, a judge, texts and metrics of others: what
    is printed holds no control character, the page no live tag. What was paid for is stored whole.
    Names of models, of a checkpoint's root and of its seed become one part of a folder's name."""
    choices = tuple(f"{EVIL}{i}" for i in range(5))
    listed = ", ".join(f"({a}) {c}" for a, c in zip("ABCDE", choices))
    text = f"{EVIL}? Answer choices: {listed}"
    evil = [Question("commonsense_qa", f"{EVIL}{i}", text, "C", choices) for i in range(2)]
    monkeypatch.setattr(tasks, "load", lambda *_, **__: evil)
    student = evil_model(model, tmp_path / "evil")
    said, inside = "", Path("out/commonsense_qa")  # where results go without --out-dir

    def run(script, *words):
        nonlocal said
        own = ["--task", "commonsense_qa", "--model", student, "--device", "cpu"]
        said += said_by(script, [*own, *words], capfd)

    short = ["--max-new-tokens", "4"]
    loose = ["--patterns", "none", "--min-tokens", "1", "--max-rep2", "1", "--min-perplexity", "0"]
    run(sample, *short, "--dry-run")
    run(sample, *short, *loose, "--html", "p.html", "--no-early-reject")
    (paths,) = inside.rglob("selected.jsonl")
    few = ["--max-steps", "1", "--report", "2"]
    run(train, *few, "--paths", paths, "--out-dir", "t")
    assert Path("t/last").is_dir(), said
    with FakeServer(ok(EVIL, finish=EVIL, model=EVIL, id=EVIL), error(400, EVIL)) as server:
        ask = ["--base-url", server.url, "--concurrency", "1"]
        teach = [*ask, "--teacher-model", EVIL, "--keep", "all", "--collect-only", "--out-dir", "d"]
        judge = [*ask, *short, "--judge-model", EVIL]
        for words in (teach, judge):
            for dry in (["--dry-run"], []):
                run(distill if words is teach else evaluate, *words, *dry)
        assert len(server.bodies) >= 2
    (reply, *_) = read_jsonl(next(Path("d").rglob("responses.jsonl")))
    assert reply["text"] == EVIL
    assert list(inside.rglob("predictions.jsonl"))
    assert len(list(inside.rglob("sent.jsonl"))) == 1  # the judge's
    row = {"id": EVIL, "question": EVIL, "answer": "yes", "rationale": EVIL,
           "teacher_completion": EVIL, "teacher_answer": EVIL}  # fmt: skip
    Path("texts.jsonl").write_text(to_line(row))
    said += said_by(evaluate, ["--task", "strategy_qa", "--predictions", "texts.jsonl"], capfd)
    metrics = {"task": EVIL, "model": EVIL, "n": 1, "majority": [EVIL, 0.5], "split": "test",
               "method": "sert", "acc": [0.5, 0.1, 0.9]}  # fmt: skip
    Path("table").mkdir()
    Path("table/metrics.json").write_text(json.dumps(metrics))
    said += said_by(evaluate, ["--table", "table"], capfd)
    assert "scores 50.00 %" in said and "prompt of question" in said
    assert not controls(said), [line for line in said.split("\n") if controls(line)][:3]
    html = Path("p.html").read_text()
    assert "onerror" in html and "<img" not in html and html.count("</script>") == 2  # data, code
    assert "Content-Security-Policy" in html


@given(st.one_of(st.text(max_size=12), st.sampled_from(["..", ".", "../..", "/", "a/../..", EVIL])))
def test_names_stay_in_their_folder(text):
    """A name that a checkpoint gives is one part of a path, and not `..`."""
    with mock.patch("sert_min.io.hub.read_sert", lambda folder: {"root": text}):
        name = model_label("no/where", Path(".")) if text else "x"
    assert name == Path(name).name and name not in ("", ".", "..")


def test_end_of_text_in_a_question_is_ordinary_text(model):
    """In every prompt and training text the special token stands only where we put it."""
    tokenizer = load_tokenizer(model)
    q = Question("strategy_qa", "1", f"Is {END} the end? {END}", "yes")
    prompt = tokenizer.encode(question_prompt(q))
    ids, targets = encode_example(tokenizer, *rd_pair(q, f"It is {END}."), "all")
    tree = make_tree(tokenizer, q, f"{END} it is.", "", 1000)
    for some in (prompt, ids, tree.ids):
        assert tokenizer.eot not in some and END in tokenizer.decode(some)
    assert targets.count(tokenizer.eot) == 1 and targets[-1] == tokenizer.eot
