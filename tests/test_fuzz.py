"""Whatever stands in a file, a reply, a text or a flag: a result, or one line that names the fix.

Files are valid ones with JSON values exchanged, keys dropped, bytes changed, or nothing but noise.
No other exception, no hang (a timer), no memory beyond a limit. The table of what was tried, or a
long run:

    python -m pytest tests/test_fuzz.py -s
    FUZZ=100 python -m pytest tests/test_fuzz.py -s      # times as many inputs
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
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from conftest import make_tiny_model
from fake_server import FakeServer, by_body, ok
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distill
import evaluate
import sample
import train
from sert_min import (
    answers,
    filters,
    finetune,
    patterns,
    rationales,
    tasks,
    teacher_files,
)
from sert_min.io import endpoint
from sert_min.io.errors import SertError
from sert_min.io.files import (
    check_settings,
    read_json,
    read_jsonl,
    set_torn_tail_aside,
    stored_settings,
)
from sert_min.io.hub import model_label, read_sert
from sert_min.io.machine import resolve_machine
from sert_min.models import load_model, read_config
from sert_min.questions import LETTERS, Question
from sert_min.report import figures, judge, page, table
from sert_min.tokenizer import load_tokenizer

TIMES = float(os.environ.get("FUZZ", 1))
TRIED: Counter = Counter()  # inputs by target and outcome
HOLD = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def tries(n: int):
    return settings(max_examples=max(1, int(n * TIMES)), deadline=None, suppress_health_check=HOLD)


@pytest.fixture(scope="module", autouse=True)
def limits():
    """No more than 6 GB beyond what there is now; at the end, the table."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 6 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    names = sorted({name for name, _ in TRIED})
    print("\n| target | inputs | results | one-line errors |\n|---|---|---|---|")
    for name in names:
        good, bad = TRIED[name, "result"], TRIED[name, "error"]
        print(f"| {name} | {good + bad:,} | {good:,} | {bad:,} |")


@contextlib.contextmanager
def quick(seconds: int):
    """A hang is a failure."""

    def ring(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def holds(target: str, work, *allowed, seconds: int = 20):
    """The contract: `work()` returns, or raises SertError (one line) or one of `allowed`."""
    with quick(seconds), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                work()
                TRIED[target, "result"] += 1
            except SertError as e:
                TRIED[target, "error"] += 1
                assert str(e) and "\n" not in str(e)
            except allowed:
                TRIED[target, "error"] += 1


# --- strange input --------------------------------------------------------------------------------

STRANGE = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            2**31,
            2**63,
            -(2**63),
            10**30,
            10**400,
            0.5,
            -0.0,
            1e308,
            float("nan"),
            float("inf"),
            -float("inf"),
            "",
            "x",
            "0",
            "nan",
            "<|endoftext|>",
            "\x00",
            "\x1b[31m",
            "../../x",
            "a" * 2000,
            [],
            {},
            [[]],
            [None],
            {"": None},
            [0] * 50,
            "\ud800",
        ]
    ),  # fmt: skip
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)


def places(value, found: list) -> list:
    """(container, key) of everything inside a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


@st.composite
def changed(draw, value):
    """`value` with up to three of its parts exchanged, dropped, added or moved."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        there = places(whole, [])
        box, key = there[draw(st.integers(0, len(there) - 1))]
        how = draw(st.sampled_from(("exchange", "exchange", "drop", "add", "move")))
        if how == "drop" and box is not whole:
            del box[key]
        elif how == "add" and isinstance(box, dict):
            box[draw(st.text(max_size=4))] = copy.deepcopy(draw(STRANGE))
        elif how == "move":
            other, name = there[draw(st.integers(0, len(there) - 1))]
            box[key] = copy.deepcopy(other[name])
        else:
            box[key] = copy.deepcopy(draw(STRANGE))
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


# --- our own files and those of others ------------------------------------------------------------

CHOICES = ("bank", "library", "mall", "park", "bus stop")
TEXT = "Where is it? Answer choices: " + ", ".join(f"({a}) {c}" for a, c in zip(LETTERS, CHOICES))
QUESTIONS = [
    Question("commonsense_qa", "a1", TEXT, "C", CHOICES),
    Question("strategy_qa", "2", "Is it so?", "yes"),
]


def path_record(q: Question, sample: int, verdict: str) -> dict:
    return {"task": q.task, "id": q.id, "question": q.text, "answer": q.answer, "branch": 0,
            "sample": sample, "text": "It is.", "token_ids": [40, 83, 13], "path_start": 0,
            "logprobs": [-1.5, -0.25, -3.0], "path_end": 3, "finish": "eos", "perplexity": 2.0,
            "rep2": 0.0, "verdict": verdict}  # fmt: skip


PATHS = [path_record(q, i, v) for q in QUESTIONS for i, v in enumerate(("selected", "length"))]
SCORES = {"coherence": 5.0, "relevance": 7.5, "logical consistency": None, "completeness": 0.0}
SCORED = [{"task": "strategy_qa", "id": "2", "branch": 0, "sample": 0, "verdict": "kept",
           "scores": SCORES, "mean": None}]  # fmt: skip
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
PREDICTIONS = [{"task": q.task, "id": q.id, "question": q.text, "answer": q.answer, "finish": "eos",
                "text": "It is. So the answer is (C)."} for q in QUESTIONS] + ROWS  # fmt: skip
METRICS = [{"step": 1, "epoch": 1, "loss": 2.5}, {"step": 2, "epoch": 1, "loss": 2.0},
           {"step": 2, "epoch": 1, "validation_loss": 2.25, "validation_acc": 0.5}]  # fmt: skip
EVALUATED = {"task": "strategy_qa", "split": "test", "model": "gpt2", "method": "sert", "seed": 0,
             "variant": "", "data": "d", "n": 2, "acc": [0.5, 0.1, 0.9], "acc_lenient": [0.5, 0, 1],
             "unparseable": 1, "fmt": [None, None, None], "len": [3.0, 2.0, 4.0],
             "rep": [0.5, None, None], "majority": ["no", 0.5], "reasons": {"ok": 2}}  # fmt: skip
BATCH = [{"custom_id": "k", "response": {"request_id": "r", "body": {
    "model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 1}, "choices": [
        {"finish_reason": "stop", "message": {"role": "assistant", "content": "So."}}]}}}]  # fmt: skip
ENDPOINT = endpoint.Endpoint("m", "http://localhost:1/v1", price_in=1.0, price_out=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    return make_tiny_model(folder, n_embd=8, n_layer=1, n_head=2, n_positions=512)


def read_collection(path: Path) -> None:
    collection = endpoint.Collection(path.with_name("responses.jsonl")).load()
    collection.summary(ENDPOINT), collection.most_usd(ENDPOINT), collection.open_bills()
    if collection.path.exists():
        endpoint.stored_replies(collection.path)


def read_batch(path: Path) -> None:
    ask = endpoint.Ask("strategy_qa", "2", 0, ({"role": "user", "content": "?"},))
    with mock.patch.object(endpoint.Ask, "key", lambda self, e: "k"):
        distill.import_batch(path, [ask], ENDPOINT, endpoint.Collection(Path("responses.jsonl")))


def read_paths(path: Path) -> None:
    sample.whole_blocks(path, [[q] for q in QUESTIONS], 2)
    sample.write_selected(path.parent)
    filters.count_verdicts(read_jsonl(path))


def read_log(path: Path) -> None:
    teacher_files.log_entries(path.read_bytes())
    read_taught(path)


def read_taught(path: Path) -> None:
    outputs, _ = teacher_files.read_teacher_file(str(path), QUESTIONS)
    for keep in ("right", "all"):
        rationales.rationale_records(QUESTIONS, outputs, keep, lambda q, text: len(text) < 50)


def read_metrics(path: Path) -> None:
    set_torn_tail_aside(path)
    finetune.keep_metrics_before(path, 1)
    train.best_so_far(path)


def read_scores(path: Path) -> None:
    judge.summary(figures.path_scores(path.parent, None), 3)


def read_predictions(path: Path) -> None:
    evaluate.rescore(path, QUESTIONS)


def judge_predictions(path: Path) -> None:
    words = ["--task", "strategy_qa", "--predictions", str(path), "--out-dir", "out"]
    evaluate.main(evaluate.parse_args(words))


def judge_paths(path: Path) -> None:
    words = ["--task", "strategy_qa", "--paths", str(path), "--dry-run", "--judge-model", "m"]
    evaluate.main(evaluate.parse_args([*words, "--base-url", "http://localhost:1/v1"]))


LINES = {  # file -> (records, what reads them)
    "rationales.jsonl": (TAUGHT, read_taught),
    "teacher.jsonl": (ROWS, read_taught),
    "responses.jsonl": ([REPLY], read_collection),
    "sent.jsonl": (SENT, read_collection),
    "batch.jsonl": (BATCH, read_batch),
    "paths.jsonl": (PATHS, read_paths),
    "selected.jsonl": (PATHS, lambda path: train.sert_pairs(path, QUESTIONS)),
    "metrics.jsonl": (METRICS, read_metrics),
    "scores-m.jsonl": (SCORED, read_scores),
    "predictions.jsonl": (PREDICTIONS[:2], read_predictions),
    "texts.jsonl": (PREDICTIONS, judge_predictions),
    "sampled.jsonl": (PATHS, judge_paths),
}


@pytest.mark.parametrize("name", LINES)
@tries(40)
@given(data=st.data())
def test_lines_of_any_content(name, data):
    records, read = LINES[name]
    content = data.draw(jsonl_file(records))
    with place() as folder:
        (folder / name).write_bytes(content)
        holds(name, lambda: read(folder / name))


@tries(40)
@given(data=st.data())
def test_logs_of_any_content(data):
    content = data.draw(garbled(LOG))
    with place() as folder:
        (folder / "a.log").write_bytes(content)
        holds("teacher .log", lambda: read_log(folder / "a.log"))


@tries(40)
@given(data=st.data())
def test_outputs_of_any_content(data):
    said = ["It is so. So the answer is (c) mall.", "Thus. So the answer is yes.\nQ: And?"]
    content = data.draw(json_file(said))
    with place() as folder:
        (folder / "train_CoT_0.json").write_bytes(content)
        holds("teacher .json", lambda: read_taught(folder / "train_CoT_0.json"))


@tries(40)
@given(data=st.data())
def test_metrics_of_any_content(data):
    content = data.draw(json_file(EVALUATED))
    with place() as folder:
        for i, value in enumerate((content, as_bytes(EVALUATED))):
            (folder / f"seed{i}").mkdir()
            (folder / f"seed{i}/metrics.json").write_bytes(value)
        holds("metrics.json", lambda: table.tables(table.find_metrics(folder)))


@tries(40)
@given(data=st.data())
def test_pages_of_any_content(model, data):
    run = {"task": "strategy_qa", "model": "m", "split": "test", "branches": 1, "samples": 2,
           "raw": False, "early_reject": [], "patterns": ["direct"], "min_tokens": 2,
           "max_rep2": 0.5, "min_perplexity": 1.0}  # fmt: skip
    strange = data.draw(st.booleans())
    tokenizer = load_tokenizer(model)
    whole = [{**r, "text": tokenizer.decode(r["token_ids"])} for r in PATHS]
    paths = data.draw(jsonl_file(whole)) if strange else b"\n".join(map(as_bytes, whole))
    about = as_bytes(run) if strange else data.draw(json_file(run))
    with place() as folder:
        (folder / "paths.jsonl").write_bytes(paths)
        (folder / "settings.json").write_bytes(about)
        holds("page", lambda: page.write_page([folder], folder / "p.html", tokenizer))


# --- settings and states --------------------------------------------------------------------------


@tries(80)
@given(data=st.data())
def test_settings_of_any_content(model, data):
    """settings.json and evaluation.json of a run that goes on."""
    script = data.draw(st.sampled_from((sample, train, evaluate)))
    name = "evaluation.json" if script is evaluate else "settings.json"
    wanted = {"device": "cpu", "dtype": "fp32", "threads": 1, "rows": 20, "block_questions": 2,
              "weights": "w", "early_reject": [], "task": "micro"}  # fmt: skip
    content = data.draw(json_file(wanted))

    def work():
        args = script.parse_args(["--model", str(model), "--out-dir", "out"])
        resolve_machine(args.device, args.dtype, stored_settings(Path("out", name)), 10)
        check_settings(Path("out", name), wanted, "choose another --out-dir")
        if script is sample:
            sample.prepare(args)
        elif script is evaluate:
            evaluate.set_old_aside(Path("out"), "w")

    with place() as folder:
        (folder / "out").mkdir()
        (folder / "out" / name).write_bytes(content)
        holds("settings.json", work)


@tries(40)
@given(data=st.data())
def test_states_of_any_content(data):
    import torch
    from safetensors.torch import save

    weights = save({"model.a": torch.zeros(2)})
    about = {"step": 3, "sha256": "0" * 64}
    strange = data.draw(st.booleans())
    state = data.draw(json_file(about)) if strange else as_bytes(about)
    weights = weights if strange else data.draw(garbled(weights))
    hashed = data.draw(st.booleans())

    with place() as folder:
        (folder / "step-00000003").mkdir()
        file = folder / "step-00000003/state.safetensors"
        file.write_bytes(weights)
        if hashed and not strange:
            state = as_bytes({"step": 3, "sha256": finetune.sha256_file(file)})
        (folder / "step-00000003/state.json").write_bytes(state)
        holds("training state", lambda: state.read_state(folder / "step-00000003"))


# --- models ---------------------------------------------------------------------------------------


def copy_with(model: Path, folder: Path, name: str, content: bytes) -> None:
    for file in model.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    (folder / name).write_bytes(content)


MODEL_FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer.json", "sert.json",
               "model.safetensors", "model.safetensors.index.json")  # fmt: skip


@st.composite
def weights_file(draw, data: bytes):
    """A safetensors file with another header, of a wrong length, or garbled."""
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    how = draw(st.sampled_from(("header", "header", "length", "bytes")))
    if how == "bytes":
        return draw(garbled(data))
    if how == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + data[8:]
    header = json.dumps(draw(changed(header))).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


@pytest.mark.parametrize("name", MODEL_FILES)
@tries(30)
@given(data=st.data())
def test_model_files_of_any_content(model, name, data):
    if name == "tokenizer.json":
        vocab = json.loads((model / "vocab.json").read_text())
        merges = (model / "merges.txt").read_text().split("\n")[1:]
        small = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "added_tokens": [],
                 "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}  # fmt: skip
        content = data.draw(json_file(small))
    elif name == "model.safetensors.index.json":
        content = data.draw(json_file({"weight_map": {"wte.weight": "a.safetensors"}}))
    elif name == "model.safetensors":
        content = data.draw(weights_file((model / name).read_bytes()))
    elif name == "merges.txt":
        content = data.draw(garbled((model / name).read_bytes()))
    else:
        content = data.draw(json_file(json.loads((model / name).read_text())))

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
            evaluate.cell_of(str(folder), evaluate.parse_args([]))
            sample.prepare(sample.parse_args(["--model", str(folder), "--device", "cpu"]))

    with place() as folder:
        copy_with(model, folder, name, content)
        holds(name, work)


# --- replies and texts ----------------------------------------------------------------------------


@tries(150)
@given(data=st.data())
def test_replies_of_any_content(data):
    body = data.draw(changed(BATCH[0]["response"]["body"]))
    e = endpoint.Endpoint("m", completions=data.draw(st.booleans()))
    holds("server reply", lambda: json.dumps(endpoint.read_reply(body, e)), endpoint.Retry)
    header = data.draw(st.one_of(st.text(max_size=30), st.sampled_from(("nan", "inf", "1e400"))))
    waits = {data.draw(st.sampled_from(("retry-after", "retry-after-ms"))): header}
    after = endpoint.retry_after(waits)
    assert after is None or after >= 0


PIECES = ("the answer is ", "So the answer is ", "yes", "no", "(C)", "C. ", "mall", "either ", "\n",
          "not ", ". ", ", ", "Question:", "Answer:", "(A) bank (B) library", "probably ", "**", "é",
          "\ufffd", "\x00", "<|endoftext|>", "of your ", "?", "10 kg, so ", "bus stop")  # fmt: skip
ANY_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=25).map(
    "".join
)


@tries(250)
@given(text=ANY_TEXT, q=st.sampled_from(QUESTIONS), done=st.sampled_from(("eos", "length", None)))
def test_texts_of_any_content(text, q, done):
    def work():
        answers.extract_answer(text, q), answers.extract_lenient(text, q)
        answers.stated_answers(text, q), answers.strip_answer_sentence(text)
        patterns.pattern_break(text, q), patterns.pattern_break(text, q, final=False)
        evaluate.score(q, text, done)
        output = teacher_files.Output(text, None, done, "m")
        rationales.teacher_answer(output, q), rationales.clean(output)
        judge.parse_scores(text.replace("the answer is", "Score for Coherence:"))

    holds("answer texts", work)


SCORE_PIECES = ("Score for Coherence:", "score for relevance", " 7", "/10", "7,5", "<number>", "\n",
                "**", "0-10", "1e400", "nan", "٣", "9" * 400, " out of ", "- ", "(", ")")  # fmt: skip


@tries(250)
@given(st.lists(st.one_of(st.sampled_from(SCORE_PIECES), st.text(max_size=6)), max_size=20))
def test_scores_of_any_content(pieces):
    def work():
        scores = judge.parse_scores("".join(pieces))
        assert all(v is None or 0 <= v <= 10 for v in scores.values())

    holds("judge scores", work)


SLOW = ["the answer is ", "the answer is no. ", "Q: x\n", "A: Let's think step by step.", "(A) ",
        "yes or no ", "Score for Coherence: ", "\n", " ", ".", "a ", "(", "Therefore, the answer is ",
        "pred_before : ", "Q: x\nA: Let's think step by step.\nTherefore, the answer is\n",
        "mall, bank ", ". So ", '."', "**", "so, ", "Question:", "1", "x"]  # fmt: skip


@pytest.mark.parametrize("piece", SLOW)
@pytest.mark.parametrize("n", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_long_texts_are_quick(piece, n):
    """Up to a million characters of one piece: what a looping teacher can send (its replies are cut
    there). What is quadratic takes half a minute for the smaller one."""
    text = (piece * (n // len(piece) + 1))[:n]
    for q in QUESTIONS:
        for name, read in (
            ("extract_lenient", lambda q=q: answers.extract_lenient(text, q)),
            ("strip_answer_sentence", lambda: answers.strip_answer_sentence(text)),
            ("score", lambda q=q: evaluate.score(q, text, "eos")),
            ("clean", lambda: rationales.clean(teacher_files.Output(text, None, "length", "m"))),
            ("log_entries", lambda: teacher_files.log_entries(text.encode())),
            ("parse_scores", lambda: judge.parse_scores(text)),
        ):
            holds(f"long text: {name}", read, seconds=8)


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


@tries(50)
@given(
    st.sampled_from(FLAGS),
    st.one_of(st.sampled_from(NUMBERS), st.integers().map(str), st.floats().map(str)),
)
def test_numbers_of_any_size(model, monkeypatch, chosen, value):
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

        holds(f"{script.__name__}.py {flag}", work)


# --- large files ----------------------------------------------------------------------------------


@pytest.fixture
def large():
    with place() as folder:
        yield folder


def peak_of(work) -> int:
    """The most memory in MB that `work()` takes in a process of its own (it may raise SertError)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            holds("large file", work, seconds=60)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, str(grown // 1024).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as f:
        said = f.read()
    assert said, "another exception than SertError, or more than 60 s"
    TRIED["large file", "result"] += 1
    return int(said)


def large_line(record: dict, key: str, piece: str) -> str:
    return json.dumps({**record, key: piece * (100_000_000 // len(piece))}) + "\n"


LARGE = {
    "one line of text": ("texts.jsonl", large_line(PREDICTIONS[0], "text", "word "), judge_predictions),
    "one rationale": ("teacher.jsonl", large_line(ROWS[0], "rationale", "It is so. "), read_taught),
    "one path": ("selected.jsonl", large_line(PATHS[0], "text", "It is so. "),
                 lambda path: train.sert_pairs(path, QUESTIONS)),
    "no line end": ("paths.jsonl", "x" * 100_000_000, read_paths),
    "deep nesting": ("texts.jsonl", "[" * 50_000_000 + "]" * 50_000_000, judge_predictions),
    "deep config": ("config.json", '{"a":' * 20_000_000, read_json),
    "log": ("a.log", "Q: x\n" * 20_000_000, read_log),
    "many digits": ("metrics.jsonl", '{"step":' + "9" * 100_000_000 + "}", read_metrics),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_large_files(large, kind):
    """100 MB: at most a few times that in memory, and a minute."""
    name, content, read = LARGE[kind]
    (large / name).write_text(content)
    assert peak_of(lambda: read(large / name)) < 1500


def test_a_large_line_and_a_large_claim(model, large):
    """The same in small for every run: a line beyond the limit, and a header of 2^60 bytes."""
    (large / "a.jsonl").write_text('{"text":"' + "x" * 20_000_000 + '"}\n')
    with pytest.raises(SertError, match="line 1 is longer than"):
        list(read_jsonl(large / "a.jsonl"))
    copy_with(model, large, "model.safetensors", struct.pack("<Q", 2**60) + b"{}" * 100)
    with pytest.raises(SertError, match="not a whole safetensors file"):
        load_model(large)
    about = json.loads((model / "config.json").read_text())
    (large / "config.json").unlink()
    (large / "config.json").write_text(json.dumps({**about, "n_layer": 2**23}))
    with quick(10), pytest.raises(SertError, match="n_layer"):
        load_model(large)
