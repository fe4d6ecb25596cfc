"""The loaders: exact splits, hashes, downloads that fail in every way."""

import hashlib
import json
import socket

import pytest
from conftest import refuses, shared
from fake_server import FakeServer, raw

from sert_min import tasks
from sert_min.io import download
from sert_min.questions import Question, describe


@pytest.fixture
def data():
    return shared("data")


@pytest.mark.parametrize("line", [  # sizes and majorities are the published ones
    "commonsense_qa train: 9,741 questions, data 670db8b6ec13, majority D 20.38 %",
    "commonsense_qa validation: 974 questions, data 8d4bfb2479b5, majority B 22.48 %",
    "commonsense_qa test: 1,221 questions, data c07b8c0b10fe, majority B 20.88 %",
    "strategy_qa train: 1,603 questions, data 6de71c27cdbd, majority no 53.52 %",
    "strategy_qa validation: 160 questions, data 35a47878c101, majority no 51.25 %",
    "strategy_qa test: 687 questions, data 599675c43464, majority no 52.55 %",
])  # fmt: skip
def test_what_every_run_prints(line, data):
    """Guards the split, labels turned round, a row taken twice: the hash pins all the content."""
    task, split = line.partition(":")[0].split()
    assert describe(tasks.load(task, split, data), split) == line


def test_split_equals_the_published_row_numbers(data):
    """Guards another random stream or a rounding: the file of Fine-tune-CoT's split decides."""
    rows = json.loads((data / "strategy_qa" / "split.json").read_text())
    for name in ("train", "test"):
        assert [int(q.id) for q in tasks.load("strategy_qa", name, data)] == rows[name]


def test_validation_is_a_part_of_train_that_never_moves(data):
    """Guards a holdout that depends on the order of the questions or splits a double question."""
    train = tasks.load("strategy_qa", "train", data)
    rest, held = tasks.holdout_split(train)
    assert held == tasks.load("strategy_qa", "validation", data)
    assert sorted(rest + held, key=lambda q: int(q.id)) == train
    assert set(tasks.holdout_split(train[::-1])[1]) == set(held)
    assert not {q.text for q in rest} & {q.text for q in held}


def test_a_changed_data_file_is_refused(tmp_path, data):
    """Guards results on edited data under the name of the benchmark."""
    source = data / "commonsense_qa" / "dev_rand_split.jsonl"
    (tmp_path / "commonsense_qa").mkdir()
    copy = tmp_path / "commonsense_qa" / source.name
    copy.write_bytes(source.read_bytes().replace(b"revolving", b"resolving", 1))
    refuses("expected 3210497fdaae", tasks.load, "commonsense_qa", "test", tmp_path)
    copy.unlink()
    refuses("missing", tasks.load, "commonsense_qa", "test", tmp_path)


CHOICES = [{"label": a, "text": t} for a, t in zip("BACDE", "qpr st")]
ROW = {"answerKey": "B", "id": "x1", "question": {"stem": " Where? ", "choices": CHOICES}}
BODY = json.dumps(ROW).encode() + b"\n"


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A server with one question in CommonsenseQA's form; `site.page` is what it sends."""
    file = tasks.FILES["commonsense_qa", "test"]._replace(sha256=hashlib.sha256(BODY).hexdigest())
    monkeypatch.setitem(tasks.FILES, ("commonsense_qa", "test"), file)
    one = tasks.get("commonsense_qa")._replace(sizes={"train": 9741, "test": 1})
    monkeypatch.setitem(tasks.TASKS, "commonsense_qa", one)
    with FakeServer() as server:
        server.page, server.cache = raw(200, BODY), tmp_path / "cache"
        monkeypatch.setenv("SERT_DATA_URL", server.url)
        monkeypatch.setenv("SERT_CACHE", str(server.cache))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def test_download_once_then_cache(site):
    """Guards a wrong address, options in file order instead of label order, a useless cache, and
    trusting a file because it is there."""
    text = "Where? Answer choices: (A) p, (B) q, (C) r, (D) , (E) s"
    want = [Question("commonsense_qa", "x1", text, "B", ("p", "q", "r", "", "s"))]
    for _ in range(2):
        assert tasks.load("commonsense_qa", "test") == want
    assert site.paths == ["/v1/CommonsenseQA/dev_rand_split.jsonl"]
    (path,) = site.cache.rglob("*.jsonl")
    path.write_bytes(BODY[:-10])
    assert tasks.load("commonsense_qa", "test") == want
    assert path.read_bytes() == BODY and len(site.paths) == 2


@pytest.mark.parametrize("page, message", [
    (raw(200, BODY.replace(b"x1", b"x2")), "SHA-256"),  # other content
    (raw(200, BODY, cut=20), "."),  # the connection breaks
    (raw(200, BODY[:-20]), "SHA-256"),  # cut, but consistent
    (raw(404, b"not found"), "404"),
])  # fmt: skip
def test_bad_answers_leave_nothing(site, page, message):
    """Guards half-written or wrong files that a later run would trust."""
    site.page = page
    assert "--data-dir" in refuses(message, tasks.load, "commonsense_qa", "test")
    assert not [p for p in site.cache.rglob("*") if p.is_file()]


def test_no_network(site, tmp_path, monkeypatch):
    """Guards a traceback or an endless wait: silent server, refused at once, no such host; a file is
    where the cache should be."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://nowhere.invalid", "x"):
            monkeypatch.setenv("SERT_DATA_URL", url)
            said = refuses("could not download", tasks.load, "commonsense_qa", "test")
            assert "--data-dir" in said
    assert not [p for p in site.cache.rglob("*") if p.is_file()]
    monkeypatch.setenv("SERT_DATA_URL", site.url)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SERT_CACHE", str(tmp_path / "file"))
    refuses("SERT_CACHE", tasks.load, "commonsense_qa", "test")


def test_unknown_names_are_refused():
    """Guards a KeyError: the message lists what there is."""
    refuses("strategy_qa", tasks.load, "gsm8k", "test")
    refuses("validation", tasks.load, "micro", "dev")
    refuses("--data-dir", tasks.load, "micro", "test", "somewhere")
