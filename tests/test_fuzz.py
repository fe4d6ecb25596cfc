"""Whatever stands in a file of others, a reply, a text or a flag: a result, or one line of error.

Files are valid ones with values exchanged, keys dropped or bytes changed, or noise. FUZZ=100 tries
100 times as many inputs."""

import argparse
import contextlib
import copy
import itertools
import json
import os
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from conftest import start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distill
import evaluate
import sample
import train
from sert_min import answers, metrics, patterns, rationales, tasks, teacher_files
from sert_min.io import asking, endpoint
from sert_min.io.errors import SertError
from sert_min.io.files import check_settings, stored_settings
from sert_min.io.hub import model_label, read_sert
from sert_min.io.machine import resolve_machine
from sert_min.models import load_model, read_config
from sert_min.questions import LETTERS, Question
from sert_min.report import judge
from sert_min.tokenizer import load_tokenizer


def tries(n: int):
    n = max(1, int(n * float(os.environ.get("FUZZ", 1))))
    return settings(max_examples=n, suppress_health_check=list(HealthCheck))


def holds(work, *allowed, seconds: int = 20):
    """`work()` returns, or raises SertError or one of `allowed`, within `seconds` of CPU time."""
    signal.signal(signal.SIGVTALRM, mock.Mock(side_effect=TimeoutError(f"more than {seconds} s")))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        work()
    except SertError as e:
        assert str(e) and "\n" not in str(e)
    except allowed:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


STRANGE = st.text(max_size=8) | st.integers() | st.floats() | st.sampled_from([
    None, True, -1, 0, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "0",
    "nan", "\x00", "\x1b[31m", "../../x", "a" * 2000, [], {}, [[]], {"": None}, [0] * 50, "\ud800",
])  # fmt: skip


@st.composite
def changed(draw, value):
    """`value` with up to three of its parts exchanged or dropped, or the whole of it."""

    def places(value) -> list[tuple]:
        if not isinstance(value, (dict, list)):
            return []
        keys = value if isinstance(value, dict) else range(len(value))
        return [p for key in keys for p in ((value, key), *places(value[key]))]

    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        box, key = draw(st.sampled_from(places(whole)))
        box[key] = copy.deepcopy(draw(STRANGE))
        if box is not whole and not draw(st.integers(0, 3)):
            del box[key]
    return whole[0]


@st.composite
def garbled(draw, data: bytes):
    """`data` with a part cut out or repeated and bytes put in."""
    for _ in range(draw(st.integers(1, 3))):
        i, j = draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))
        data = data[:i] + draw(st.binary(max_size=6)) + data[j:]
    return data


def as_bytes(value) -> bytes:
    return json.dumps(value).encode()


def json_file(value):
    """Bytes of a file that should hold `value`."""
    return st.one_of(changed(value).map(as_bytes), garbled(as_bytes(value)), st.binary(max_size=40))


def jsonl_file(records: list):
    """Bytes of a JSONL file that should hold `records`."""
    whole = b"\n".join(map(as_bytes, records))
    return st.one_of(json_file(records[0]).map(lambda line: line + b"\n" + whole), garbled(whole))


@contextlib.contextmanager
def place():
    """An empty folder to be in."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        yield Path(name)


CHOICES = ("bank", "library", "mall", "park", "bus stop")
TEXT = "Where? Answer choices: " + ", ".join(f"({a}) {c}" for a, c in zip(LETTERS, CHOICES))
QUESTIONS = [Question("commonsense_qa", "a1", TEXT, "C", CHOICES),
             Question("strategy_qa", "2", "Is it so?", "yes")]  # fmt: skip
ABOUT = [{"task": q.task, "id": q.id, "question": q.text, "answer": q.answer} for q in QUESTIONS]
PATHS = [{**about, "branch": 0, "sample": 1, "text": "It is.", "token_ids": [40, 83, 13], "rep2": 0.0,
          "logprobs": [-1.5, -0.25, -3.0], "path_start": 0, "path_end": 3, "finish": "eos",
          "perplexity": 2.0, "verdict": "selected"} for about in ABOUT]  # fmt: skip
USAGE = {"prompt_tokens": 3, "completion_tokens": 4}
REPLY = {"key": "k", "text": "So.", "finish": "stop", "usage": USAGE, "returned_model": "m"}
SENT = [{"key": "k", "at_most": [10, 20]}, {"key": "k", "refused": True}]
TAUGHT = [{**about, "rationale": "It is so.", "teacher_answer": about["answer"], "kept": True,
           "reason": "ok", "source": "m"} for about in ABOUT]  # fmt: skip
ROWS = [{"index": 2, "question": "Is it so?", "rationale": "Yes it is.", "answer": "yes",
         "teacher_completion": "yes.", "teacher_answer": "yes"}]  # fmt: skip
LOG = b"\n".join([b"*" * 25, b"1st data", b"Q: Is it so?", b"A: Let's think step by step. It is so.",
                  b"Therefore, the answer (Yes or No) is Yes.", b"pred_before : Yes.", b"*" * 25])  # fmt: skip
TEXTS = [{**a, "finish": "eos", "text": "It is. So the answer is (C)."} for a in ABOUT] + ROWS
RUN = {"device": "cpu", "dtype": "fp32", "threads": 1, "rows": 20, "early_reject": []}
BODY = {"model": "m", "usage": USAGE, "choices": [
    {"finish_reason": "stop", "message": {"role": "assistant", "content": "So."}}]}  # fmt: skip
URL = "http://localhost:1/v1"


def read_collection(path: Path) -> None:
    e = endpoint.Endpoint("m", URL, price_in=1.0, price_out=2.0)
    collection = asking.Collection(path.parent, e).load()
    collection.summary(), collection.most_usd(), collection.open_bills()


def read_taught(path: Path) -> None:
    outputs, _ = teacher_files.read_teacher_file(str(path), QUESTIONS)
    for keep in ("right", "all"):
        several = {name: [output] for name, output in outputs.items()}
        rationales.rationale_records(QUESTIONS, several, keep, lambda q, text: len(text) < 50)


def read_settings(path: Path) -> None:
    resolve_machine("auto", "auto", stored_settings(path), 10)
    check_settings(path, RUN, "choose another --out-dir")


JUDGED = ["--dry-run", "--judge-model", "m", "--base-url", URL]
read_texts = partial(start, evaluate, "--task", "strategy_qa", "--out-dir", "out", "--predictions")
FILES = {  # name -> (bytes, what reads them)
    "rationales.jsonl": (jsonl_file(TAUGHT), read_taught),
    "teacher.jsonl": (jsonl_file(ROWS), read_taught),
    "a.log": (garbled(LOG), read_taught),
    "responses.jsonl": (jsonl_file([REPLY]), read_collection),
    "sent.jsonl": (jsonl_file(SENT), read_collection),
    "selected.jsonl": (jsonl_file(PATHS), lambda path: train.sert_pairs(path, QUESTIONS)),
    "texts.jsonl": (jsonl_file(TEXTS), read_texts),
    "sampled.jsonl": (jsonl_file(PATHS), partial(start, evaluate, *JUDGED, "--paths")),
    "settings.json": (json_file(RUN), read_settings),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@tries(40)
@given(data=st.data())
def test_files_of_any_content(name, data):
    """Guards tracebacks, and values of another kind that travel on."""
    contents, read = FILES[name]
    with place() as folder:
        (folder / name).write_bytes(data.draw(contents))
        holds(lambda: read(folder / name))


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "sert.json", "merges.txt",
                                  "tokenizer.json", "model.safetensors"])  # fmt: skip
@tries(30)
@given(data=st.data())
def test_model_files_of_any_content(model, name, data):
    """Guards tracebacks and huge allocations from a model of others."""
    with place() as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        file, vocab, merges = (folder / n for n in (name, "vocab.json", "merges.txt"))
        if name == "tokenizer.json":
            bpe = {"type": "BPE", "vocab": json.loads(vocab.read_text()),
                   "merges": merges.read_text().split("\n")[1:]}  # fmt: skip
            file.write_bytes(as_bytes({"model": bpe, "pre_tokenizer": {"type": "ByteLevel"}}))
            vocab.unlink(), merges.unlink()
        content = file.read_bytes()
        kind = json_file(json.loads(content)) if file.suffix == ".json" else garbled(content)
        file.write_bytes(data.draw(kind))

        def work():
            model_label(".", folder), read_config(folder), read_sert(folder)
            tokenizer = load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("We answer. é"))
            load_model(folder)
            if name == "sert.json":
                start(sample, "--model", folder, "--device", "cpu", "--dry-run")
                start(evaluate, "--model", folder, "--dry-run")

        holds(work)


@tries(100)
@given(data=st.data())
def test_replies_of_any_content(data):
    """Guards a collection that ends because a server answers something else."""
    body, e = data.draw(changed(BODY)), endpoint.Endpoint("m", completions=data.draw(st.booleans()))
    holds(lambda: json.dumps(endpoint.read_reply(body, e)), endpoint.Retry)


READERS = [  # of a text that answers a question
    answers.extract_lenient,
    lambda text, q: metrics.grade(q, text, "length"),
    lambda text, q: patterns.pattern_break(text, q, final=False),
    lambda text, q: answers.strip_answer_sentence(text),
    lambda text, q: rationales.clean(rationales.Output(text, None, "length", "m")),
    lambda text, q: teacher_files.log_entries(text.encode("utf-8", "replace")),
    lambda text, q: judge.parse_scores(text),
]
PIECES = ["the answer is ", "So the answer is no. ", "yes or no ", "(C)", "mall, ", "either ", "\n", ".",
          "not ", "Q: x\n", "Answer:", "(A) bank (B) library", "**", "\ufffd", "\x00", "<|endoftext|>",
          "10 kg, so ", "bus stop", "Score for Coherence:", "score for relevance", " 7", "/10", "7,5", "1e400",
          "9" * 400, " out of ", "(", "pred_before : ", "A: Let's think step by step.\n"]  # fmt: skip
STATING = ["so ", "Answer: ", "(A)", "\\boxed{", "}", " is the best choice", "option C", " not ", " but ",
           "if ", "would be ", "?", "### Answer\n", "yes", "no", "to answer your question, ", "my ",
           " and ", "Wait, ", "Q: ", " is correct", "<think>", "</think>", "the answer to it ", "depends",
           "：", "(B) or (C)", "\x1b[0m"]  # fmt: skip
PARTS = st.lists(st.one_of(st.sampled_from(PIECES + STATING), st.text(max_size=6)), max_size=25)
LISTS = "." + "a)" * 24 + " x bank, mall "  # each `a)` may be a label, or an article and a bracket


@tries(600)
@given(text=PARTS.map("".join), q=st.sampled_from(QUESTIONS))
def test_texts_of_any_content(text, q):
    """Guards a crash after hours of generation, answers or scores that there are not, a lenient
    answer other than the strict one, and a second stripping or cutting that takes more."""
    for read in READERS:
        holds(lambda read=read: read(text, q))
    assert all(v is None or 0 <= v <= 10 for v in judge.parse_scores(text).values())
    strict, lenient = answers.extract_answer(text, q), answers.extract_lenient(text, q)
    assert {strict, lenient, answers.stated_answer(text, q)} <= {None, *q.answers}
    assert strict is None or lenient == strict
    rest, had_one = answers.strip_answer_sentence(text)
    assert answers.strip_answer_sentence(rest) == (rest, False)
    assert had_one or rest == text.strip()
    said = answers.without_thinking(text)
    assert answers.without_thinking(said) == said
    taught = {q.id: [rationales.Output(text, None, "length", "m")]}
    ((record,), _) = rationales.rationale_records([q], taught, "right")
    assert record["rationale"].isprintable() and json.dumps(record)


@pytest.mark.parametrize("piece", [*PIECES, '"', " ", "A.", "the ", LISTS])
def test_long_texts_are_quick(piece):
    """Guards quadratic time (a looping teacher's 100,000 characters), and an exponential one."""
    text, free = (piece * 100_000)[:100_000], Question("own", "3", "How many?", "30", free=True)
    for read, t in itertools.product(READERS, (text, "the answer is bank" + text)):
        holds(lambda read=read, t=t: [read(t, q) for q in (*QUESTIONS, free)], seconds=6)


NUMBERS = ("nan", "inf", "-1", "0", "1", "1e400", "1e308", "1e-320", "", "x", "0.5", "2147483648",
           "9223372036854775808", "1" + 400 * "0", "9" * 5000, "0x10", "1_0", "٣", "-0")  # fmt: skip
ASK = f"--base-url {URL} --dry-run --limit 1 --price-in 1 --price-out 1"
BASE = {
    sample: "--limit 1 --max-new-tokens 2 --branches 1 --samples 1 --dry-run",
    train: "--method finetune --max-steps 1 --epochs 1 --limit 2 --batch-size 2 --report 0",
    distill: f"{ASK} --collect-only --teacher-model m --keep all",
    evaluate: f"{ASK} --max-new-tokens 2 --judge-model m",
}
LOAD = tasks.load


def numeric_flags(script) -> list[str]:
    args, found = argparse.Namespace(task="micro", fields=None, test_file=None), []
    record = lambda self, argv: found.extend(self._actions) or args  # noqa: E731
    with mock.patch.object(argparse.ArgumentParser, "parse_args", record):
        script.parse_args()
    return [a.option_strings[0] for a in found if a.type in (int, float)]


FLAGS = [(script, flag) for script in BASE for flag in numeric_flags(script)]


@tries(40)
@given(st.sampled_from(FLAGS), st.one_of(st.sampled_from(NUMBERS), st.floats().map(str)))
def test_numbers_of_any_size(model, monkeypatch, chosen, value):
    """Guards a traceback from a number without meaning."""
    script, flag = chosen
    monkeypatch.setattr(tasks, "load", lambda task, split, data_dir=None: LOAD(task, split)[:3])
    words = [*BASE[script].split(), "--model", model, "--device", "cpu", "--out-dir", "out"]
    with place(), contextlib.suppress(SystemExit):  # argparse's
        holds(lambda: start(script, *words, f"{flag}={value}"))
