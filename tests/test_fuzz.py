"""Whatever stands in a file of others, a reply, a text or a flag: a result, or one line of error.

Files are valid ones with JSON values exchanged, keys dropped, bytes changed, or nothing but noise.
No other exception, no hang, no memory beyond a limit. FUZZ=100 tries 100 times as many inputs.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import struct
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import make_tiny_model
from fake_server import FakeServer, by_body, ok
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import distill
import evaluate
import sample
import train
from sert_min import answers, metrics, patterns, rationales, tasks, teacher_files
from sert_min.io import endpoint
from sert_min.io.errors import SertError
from sert_min.io.files import check_settings, sha256_file, stored_settings
from sert_min.io.hub import model_label, read_sert
from sert_min.io.machine import resolve_machine
from sert_min.io.state import read_state
from sert_min.models import load_model, read_config
from sert_min.questions import LETTERS, Question
from sert_min.report import judge
from sert_min.tokenizer import load_tokenizer

TIMES = float(os.environ.get("FUZZ", 1))
TRIED = [0]  # inputs
HOLD = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def tries(n: int):
    return settings(max_examples=max(1, int(n * TIMES)), deadline=None, suppress_health_check=HOLD)


@pytest.fixture(scope="module", autouse=True)
def limits():
    """No more than 6 GB beyond what there is now; says how much was tried (`-s` shows it)."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 6 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(f"\n{TRIED[0]:,} inputs")


@contextlib.contextmanager
def quick(seconds: int):
    """A hang is a failure: more than `seconds` of this process's own time, which a busy machine does
    not change, or ten minutes of waiting."""

    def ring(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = [signal.signal(number, ring) for number in (signal.SIGVTALRM, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.alarm(600)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for number, handler in zip((signal.SIGVTALRM, signal.SIGALRM), before):
            signal.signal(number, handler)


def holds(work, *allowed, seconds: int = 20):
    """The contract: `work()` returns, or raises SertError (one line) or one of `allowed`."""
    quiet = io.StringIO()
    TRIED[0] += 1
    with quick(seconds), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        with contextlib.suppress(*allowed):
            try:
                work()
            except SertError as e:
                assert str(e) and "\n" not in str(e)


# --- strange input --------------------------------------------------------------------------------

STRANGE = st.one_of(
    st.sampled_from([
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308,
        float("nan"), float("inf"), -float("inf"), "", "x", "0", "nan", "<|endoftext|>", "\x00",
        "\x1b[31m", "../../x", "a" * 2000, [], {}, [[]], [None], {"": None}, [0] * 50, "\ud800",
    ]),
    st.text(max_size=8), st.integers(), st.floats(),
)  # fmt: skip


def places(value) -> list[tuple]:
    """(container, key) of everything inside a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [p for key in keys for p in ((value, key), *places(value[key]))]


@st.composite
def changed(draw, value):
    """`value` with up to three of its parts exchanged or dropped, or the whole of it."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        there = places(whole)
        box, key = there[draw(st.integers(0, len(there) - 1))]
        if draw(st.integers(0, 3)) or box is whole:
            box[key] = copy.deepcopy(draw(STRANGE))
        else:
            del box[key]
    return whole[0]


@st.composite
def garbled(draw, data: bytes):
    """`data` cut, with bytes changed, put in or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        i, j = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        new = draw(st.binary(max_size=6))
        how = draw(st.sampled_from(("cut", "change", "insert", "repeat")))
        parts = {"cut": data[:i] + data[j:], "change": data[:i] + new + data[i + len(new) :],
                 "insert": data[:i] + new + data[i:], "repeat": data[:j] + data[i:]}  # fmt: skip
        data = parts[how]
    return data


def as_bytes(value) -> bytes:
    return json.dumps(value).encode()


def json_file(value):
    """Bytes of a file that should hold `value`."""
    return st.one_of(changed(value).map(as_bytes), garbled(as_bytes(value)), st.binary(max_size=40))


@st.composite
def jsonl_file(draw, records: list):
    """Bytes of a JSONL file that should hold `records`: one line is strange, seldom the whole."""
    lines = [as_bytes(r) for r in records]
    if draw(st.integers(0, 9)) == 0:
        return draw(garbled(b"\n".join(lines) + b"\n"))
    i = draw(st.integers(0, len(records) - 1))
    lines[i] = draw(json_file(records[i]))
    return b"\n".join(lines) + draw(st.sampled_from((b"\n", b"")))


@st.composite
def weights_file(draw, data: bytes):
    """A safetensors file with another header, of a wrong length, or garbled."""
    n = struct.unpack("<Q", data[:8])[0]
    how = draw(st.sampled_from(("header", "header", "length", "bytes")))
    if how == "bytes":
        return draw(garbled(data))
    if how == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + data[8:]
    header = as_bytes(draw(changed(json.loads(data[8 : 8 + n]))))
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


@contextlib.contextmanager
def place():
    """An empty folder to be in."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


# --- files ----------------------------------------------------------------------------------------

CHOICES = ("bank", "library", "mall", "park", "bus stop")
TEXT = "Where is it? Answer choices: " + ", ".join(f"({a}) {c}" for a, c in zip(LETTERS, CHOICES))
QUESTIONS = [
    Question("commonsense_qa", "a1", TEXT, "C", CHOICES),
    Question("strategy_qa", "2", "Is it so?", "yes"),
]
PATHS = [
    {"task": q.task, "id": q.id, "question": q.text, "answer": q.answer, "branch": 0, "sample": i,
     "text": "It is.", "token_ids": [40, 83, 13], "path_start": 0, "logprobs": [-1.5, -0.25, -3.0],
     "path_end": 3, "finish": "eos", "perplexity": 2.0, "rep2": 0.0, "verdict": verdict}
    for q in QUESTIONS for i, verdict in enumerate(("selected", "length"))
]  # fmt: skip
REPLY = {"key": "k", "task": "strategy_qa", "id": "2", "sample": 0, "text": "So.", "finish": "stop",
         "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "returned_model": "m",
         "request_id": "r", "attempts": 1, "time": 1.5}  # fmt: skip
SENT = [{"key": "k", "at_most": [10, 20]}, {"key": "k", "refused": True}, {"key": "l", "at_most": [1, 2]}]  # fmt: skip
TAUGHT = [
    {"task": q.task, "id": q.id, "question": q.text, "rationale": "It is so.", "answer": q.answer,
     "teacher_answer": q.answer, "kept": True, "reason": "ok", "source": "m"}
    for q in QUESTIONS
]  # fmt: skip
ROWS = [{"index": 2, "question": "Is it so?", "rationale": "Yes it is.", "teacher_completion": "yes.",
         "teacher_answer": "yes", "answer": "yes"}]  # fmt: skip
LOG = b"""*************************
1st data
Q: Is it so?
A: Let's think step by step. It is so, as all know.
Therefore, the answer (Yes or No) is Yes.
pred_before : Yes.
pred_after : yes
*************************
"""
OUTPUTS = ["It is so. So the answer is (c) mall.", "Thus. So the answer is yes.\nQ: And?"]
TEXTS = [{"task": q.task, "id": q.id, "question": q.text, "answer": q.answer, "finish": "eos",
          "text": "It is. So the answer is (C)."} for q in QUESTIONS] + ROWS  # fmt: skip
RUN = {"device": "cpu", "dtype": "fp32", "threads": 1, "rows": 20, "block_questions": 2,
       "weights": "w", "early_reject": [], "task": "micro"}  # fmt: skip
BODY = {"model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 1}, "choices": [
    {"finish_reason": "stop", "message": {"role": "assistant", "content": "So."}}]}  # fmt: skip
ENDPOINT = endpoint.Endpoint("m", "http://localhost:1/v1", price_in=1.0, price_out=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    return make_tiny_model(folder, n_embd=8, n_layer=1, n_head=2, n_positions=512)


def read_collection(path: Path) -> None:
    collection = endpoint.Collection(path.parent, ENDPOINT).load()
    collection.summary(), collection.most_usd(), collection.open_bills()


def read_taught(path: Path) -> None:
    outputs, _ = teacher_files.read_teacher_file(str(path), QUESTIONS)
    for keep in ("right", "all"):
        rationales.rationale_records(QUESTIONS, outputs, keep, lambda q, text: len(text) < 50)


def run_evaluate(*words) -> None:
    evaluate.main(evaluate.parse_args(["--task", "strategy_qa", *map(str, words)]))


def judge_texts(path: Path) -> None:
    run_evaluate("--predictions", path, "--out-dir", "out")


def judge_paths(path: Path) -> None:
    run_evaluate(
        "--paths", path, "--dry-run", "--judge-model", "m", "--base-url", "http://localhost:1/v1"
    )


def go_on(path: Path) -> None:
    """A run of sample.py that finds settings."""
    resolve_machine("auto", "auto", stored_settings(path), 10)
    check_settings(path, RUN, "choose another --out-dir")


FILES = {  # name -> (bytes, what reads them)
    "rationales.jsonl": (jsonl_file(TAUGHT), read_taught),
    "teacher.jsonl": (jsonl_file(ROWS), read_taught),
    "a.log": (garbled(LOG), read_taught),
    "train_CoT_0.json": (json_file(OUTPUTS), read_taught),
    "responses.jsonl": (jsonl_file([REPLY]), read_collection),
    "sent.jsonl": (jsonl_file(SENT), read_collection),
    "selected.jsonl": (jsonl_file(PATHS), lambda path: train.sert_pairs(path, QUESTIONS)),
    "texts.jsonl": (jsonl_file(TEXTS), judge_texts),
    "sampled.jsonl": (jsonl_file(PATHS), judge_paths),
    "settings.json": (json_file(RUN), go_on),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@tries(40)
@given(data=st.data())
def test_files_of_any_content(name, data):
    """Guards tracebacks, and values of another kind that travel on."""
    contents, read = FILES[name]
    content = data.draw(contents)
    with place() as folder:
        (folder / name).write_bytes(content)
        holds(lambda: read(folder / name))


@tries(30)
@given(data=st.data())
def test_states_of_any_content(data):
    """Guards a run that can't go on because of a state that a kill or a disk broke."""
    weights, strange = save({"model.a": torch.zeros(2)}), data.draw(st.booleans())
    if not strange:
        weights = data.draw(garbled(weights))
    with place() as folder:
        (folder / "step-00000003").mkdir()
        file = folder / "step-00000003/state.safetensors"
        file.write_bytes(weights)
        about = {"step": 3, "sha256": sha256_file(file)}
        content = data.draw(json_file(about)) if strange else as_bytes(about)
        file.with_name("state.json").write_bytes(content)
        holds(lambda: read_state(file.parent))


def copy_with(model: Path, folder: Path, name: str, content: bytes) -> None:
    for file in model.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    (folder / name).write_bytes(content)


MODEL_FILES = ("config.json", "vocab.json", "sert.json", "tokenizer.json",
               "model.safetensors.index.json", "merges.txt", "model.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", MODEL_FILES)
@tries(30)
@given(data=st.data())
def test_model_files_of_any_content(model, name, data):
    """Guards tracebacks and huge allocations from a model of others."""
    merges = (model / "merges.txt").read_bytes()
    config, vocab, sert = (json.loads((model / n).read_text()) for n in MODEL_FILES[:3])
    small = {"model": {"type": "BPE", "vocab": vocab, "merges": merges.decode().split("\n")[1:]},
             "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}  # fmt: skip
    index = {"weight_map": {"wte.weight": "a.safetensors"}}
    contents = {
        **dict(zip(MODEL_FILES, map(json_file, (config, vocab, sert, small, index)))),
        "merges.txt": garbled(merges),
        "model.safetensors": weights_file((model / "model.safetensors").read_bytes()),
    }
    content = data.draw(contents[name])

    def work():
        folder = Path.cwd()
        if name == "tokenizer.json":
            for other in ("vocab.json", "merges.txt"):
                (folder / other).unlink()
        if name == "model.safetensors.index.json":
            shutil.move("model.safetensors", "a.safetensors")
        model_label(".", folder), read_config(folder), read_sert(folder)
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("We answer. é"))
        load_model(folder)
        if name == "sert.json":
            sample.main(sample.parse_args(["--model", str(folder), "--device", "cpu", "--dry-run"]))
            evaluate.main(evaluate.parse_args(["--model", str(folder), "--dry-run"]))

    with place() as folder:
        copy_with(model, folder, name, content)
        holds(work)


def test_a_large_claim(model):
    """Guards memory: a header of 2^60 bytes, and a config of 8 million layers."""
    with place() as folder:
        copy_with(model, folder, "model.safetensors", struct.pack("<Q", 2**60) + b"{}" * 100)
        with pytest.raises(SertError, match="not a whole safetensors file"):
            load_model(folder)
        about = json.loads((model / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**about, "n_layer": 2**23}))
        with quick(10), pytest.raises(SertError, match="n_layer"):
            load_model(folder)


# --- replies and texts ----------------------------------------------------------------------------


@tries(100)
@given(data=st.data())
def test_replies_of_any_content(data):
    """Guards a collection that ends because a server answers something else."""
    body = data.draw(changed(BODY))
    e = endpoint.Endpoint("m", completions=data.draw(st.booleans()))
    holds(lambda: json.dumps(endpoint.read_reply(body, e)), endpoint.Retry)
    header = data.draw(st.one_of(st.text(max_size=30), st.sampled_from(("nan", "inf", "1e400"))))
    waits = {data.draw(st.sampled_from(("retry-after", "retry-after-ms"))): header}
    after = endpoint.retry_after(waits)
    assert after is None or after >= 0


READERS = [  # of a text that answers a question
    answers.extract_lenient,
    lambda text, q: metrics.grade(q, text, "length"),
    lambda text, q: patterns.pattern_break(text, q, final=False),
    lambda text, q: answers.strip_answer_sentence(text),
    lambda text, q: rationales.clean(rationales.Output(text, None, "length", "m")),
    lambda text, q: teacher_files.log_entries(text.encode("utf-8", "replace")),
    lambda text, q: judge.parse_scores(text),
]
PIECES = ("the answer is ", "So the answer is ", "yes", "no", "(C)", "C. ", "mall", "either ", "\n",
          "not ", ". ", ", ", "Question:", "Answer:", "(A) bank (B) library", "probably ", "**", "é",
          "\ufffd", "\x00", "<|endoftext|>", "of your ", "?", "10 kg, so ", "bus stop",
          "Score for Coherence:", "score for relevance", " 7", "/10", "7,5", "<number>", "0-10",
          "1e400", "nan", "٣", "9" * 400, " out of ", "- ", "(", ")")  # fmt: skip
ANY_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=25).map(
    "".join
)


@tries(250)
@given(text=ANY_TEXT, q=st.sampled_from(QUESTIONS))
def test_texts_of_any_content(text, q):
    """Guards a crash after hours of generation, and scores outside 0 to 10."""
    for read in READERS:
        holds(lambda read=read: read(text, q))
    assert all(v is None or 0 <= v <= 10 for v in judge.parse_scores(text).values())


SLOW = ["the answer is ", "the answer is no. ", "Q: x\n", "A: Let's think step by step.", "(A) ",
        "yes or no ", "Score for Coherence: ", "\n", " ", ".", "a ", "(", "Therefore, the answer is ",
        "pred_before : ", "Q: x\nA: Let's think step by step.\nTherefore, the answer is\n",
        "mall, bank ", ". So ", '."', "**", "so, ", "Question:", "1", "x"]  # fmt: skip


@pytest.mark.parametrize("piece", SLOW)
@pytest.mark.parametrize("n", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_long_texts_are_quick(piece, n):
    """Guards quadratic time: up to a million characters of one piece are what a looping teacher can
    send (its replies are cut there). What is quadratic takes many seconds for the smaller one."""
    text = (piece * (n // len(piece) + 1))[:n]
    for i, read in enumerate(READERS):
        for q in QUESTIONS[: 2 if i < 3 else 1]:
            holds(lambda read=read, q=q: read(text, q), seconds=n // 25_000)


# --- numbers on the command line ------------------------------------------------------------------

NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1", "1e400", "-1e400", "1e308", "1e-320", "", " ", "x",
           "0.5", "2147483648", "9223372036854775808", "1" + 30 * "0", "1" + 400 * "0", "9" * 5000,
           "0x10", "1_0", "٣", "-0", "1e3", "None")  # fmt: skip
BASE = {
    sample: "--limit 1 --max-new-tokens 2 --branches 1 --samples 1",
    train: "--method finetune --max-steps 1 --epochs 1 --limit 2 --batch-size 2 --report 0",
    distill: "--collect-only --limit 1 --teacher-model m --price-in 1 --price-out 1 --keep all",
    evaluate: "--limit 1 --max-new-tokens 2 --judge-model m --price-in 1 --price-out 1",
}


def numeric_flags(script) -> list[str]:
    with mock.patch.object(argparse.ArgumentParser, "parse_args", lambda self, argv: self):
        actions = script.parse_args()._actions
    named = ("judge_temperature",)
    return [a.option_strings[0] for a in actions if a.type in (int, float) or a.dest in named]


REAL = tasks.load
FLAGS = [(script, flag) for script in BASE for flag in numeric_flags(script)]


@tries(30)
@given(
    st.sampled_from(FLAGS),
    st.one_of(st.sampled_from(NUMBERS), st.integers().map(str), st.floats().map(str)),
)
def test_numbers_of_any_size(model, monkeypatch, chosen, value):
    """Guards a traceback, and a run under another number than the one that was given."""
    check_number(model, monkeypatch, *chosen, value)


@pytest.mark.slow
@pytest.mark.parametrize("value", NUMBERS)
def test_every_number_in_every_flag(model, monkeypatch, value):
    for script, flag in FLAGS:
        check_number(model, monkeypatch, script, flag, value)


@by_body
def answer_any(body):
    if "max_tokens" in body and body["max_tokens"] > 2**31:
        return ok("It is.", usage={"prompt_tokens": 10**30, "completion_tokens": 10**400})
    return ok("\n".join(f"Score for {name}: 7" for name in judge.CRITERIA))


def check_number(model, monkeypatch, script, flag: str, value: str) -> None:
    monkeypatch.setattr(tasks, "load", lambda task, split, data_dir=None: REAL(task, split)[:3])
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    monkeypatch.setattr(endpoint, "DRAIN", 0.5)
    words = [*BASE[script].split(), "--model", str(model), "--device", "cpu", "--out-dir", "out"]
    with place(), FakeServer(answer_any) as server:
        if script in (distill, evaluate):
            words += ["--base-url", server.url]

        def work():
            try:
                script.main(script.parse_args([*words, f"{flag}={value}"]))
            except SystemExit as e:
                if e.code != 2:
                    raise

        holds(work)
