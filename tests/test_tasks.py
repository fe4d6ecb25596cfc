"""The loaders: exact splits, hashes, downloads that fail in every way. Each test names the bug it
guards. Tests of the real files need them in ../shared/data and are skipped where it is absent."""

import hashlib
import http.server
import json
import socket
import threading

import pytest
from conftest import one_line, shared

from sert_min import tasks
from sert_min.io import download
from sert_min.io.errors import SertError
from sert_min.questions import Question, data_hash, describe, majority


@pytest.fixture
def data():
    return shared("data")


def refused(*args) -> str:
    with pytest.raises(SertError) as e:
        tasks.load(*args)
    return one_line(e)


# --- the real files --------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "split", "size", "known"), [
    ("commonsense_qa", "train", 9741, ("D", 20.38)),
    ("commonsense_qa", "validation", 974, None),
    ("commonsense_qa", "test", 1221, ("B", 20.88)),
    ("strategy_qa", "train", 1603, ("no", 53.52)),
    ("strategy_qa", "validation", 160, None),
    ("strategy_qa", "test", 687, ("no", 52.55)),
])  # fmt: skip
def test_sizes_and_majorities(task, split, size, known, data):
    """Guards the split, labels turned round, and a row taken twice (the published figures)."""
    questions = tasks.load(task, split, data)
    assert len(questions) == size and len({q.id for q in questions}) == size
    if known:
        answer, share = majority(questions)
        assert (answer, round(100 * share, 2)) == known
    for q in questions:
        assert q.text == q.text.strip() and q.answer in (("yes", "no"), "ABCDE")[bool(q.choices)]


def test_split_equals_the_published_row_numbers(data):
    """Guards another random stream or a rounding: the file of Fine-tune-CoT's split decides. Also
    the claim of the docstring: one question is in train and in test, no more."""
    split = json.loads((data / "strategy_qa" / "split.json").read_text())
    train, test = (tasks.load("strategy_qa", name, data) for name in ("train", "test"))
    for name, questions in (("train", train), ("test", test)):
        assert [q.id for q in questions] == [str(i) for i in split[name]]
    both = {q.text for q in train} & {q.text for q in test}
    assert both == {"Can you find Bob Marley's face in most smoke shops?"}


def test_text_and_description(data):
    """Guards the form of the paper's Figure 2: options in order, no full stop at the end. And the
    line that every run prints; its hash pins the content of 687 questions."""
    q = tasks.load("commonsense_qa", "test", data)[0]
    assert q.id == "1afa02df02c908a558b4036e80242fac" and q.answer == "A"
    assert q.text.startswith("A revolving door is convenient for two direction travel, but")
    options = "(A) bank, (B) library, (C) department store, (D) mall, (E) new york"
    assert q.text.endswith(f"at a what? Answer choices: {options}")
    assert q.choices == ("bank", "library", "department store", "mall", "new york")
    line = describe(tasks.load("strategy_qa", "test", data), "test")
    assert line == "strategy_qa test: 687 questions, data 599675c43464, majority no 52.55 %"


def test_validation_is_a_part_of_train_that_never_moves(data):
    """Guards a holdout that depends on the order of the questions or splits a double question."""
    train = tasks.load("strategy_qa", "train", data)
    rest, held = tasks.holdout_split(train)
    assert held == tasks.load("strategy_qa", "validation", data)
    assert sorted(rest + held, key=lambda q: int(q.id)) == train
    assert set(tasks.holdout_split(train[::-1])[1]) == set(held)
    assert not {q.text for q in rest} & {q.text for q in held}
    assert data_hash(held)[:12] == "35a47878c101"  # the same on every machine


def test_a_changed_data_file_is_refused(tmp_path, data):
    """Guards results on edited data under the name of the benchmark."""
    source = data / "commonsense_qa" / "dev_rand_split.jsonl"
    (tmp_path / "commonsense_qa").mkdir()
    copy = tmp_path / "commonsense_qa" / source.name
    copy.write_bytes(source.read_bytes().replace(b"revolving", b"resolving", 1))
    assert "expected 3210497fdaae" in refused("commonsense_qa", "test", tmp_path)
    copy.unlink()
    assert "missing" in refused("commonsense_qa", "test", tmp_path)


# --- downloads, from a local server ----------------------------------------------------------

CHOICES = [{"label": a, "text": t} for a, t in zip("BACDE", "qpr st")]
ROW = {"answerKey": "B", "id": "x1", "question": {"stem": " Where? ", "choices": CHOICES}}
BODY = json.dumps(ROW).encode() + b"\n"


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A server with one question in CommonsenseQA's form; `site.answer` is what it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            status, length, body = server.answer
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.asked = (200, len(BODY), BODY), []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.cache = tmp_path / "cache"
    monkeypatch.setenv("SERT_DATA_URL", f"http://127.0.0.1:{server.server_port}/data")
    monkeypatch.setenv("SERT_CACHE", str(server.cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    file = tasks.FILES["commonsense_qa", "test"]._replace(sha256=hashlib.sha256(BODY).hexdigest())
    monkeypatch.setitem(tasks.FILES, ("commonsense_qa", "test"), file)
    one = tasks.get("commonsense_qa")._replace(sizes={"train": 9741, "test": 1})
    monkeypatch.setitem(tasks.TASKS, "commonsense_qa", one)
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_download_once_then_cache(site):
    """Guards a wrong address, options in file order instead of label order, a useless cache, and
    trusting a file because it is there."""
    text = "Where? Answer choices: (A) p, (B) q, (C) r, (D) , (E) s"
    want = [Question("commonsense_qa", "x1", text, "B", ("p", "q", "r", "", "s"))]
    for _ in range(2):
        assert tasks.load("commonsense_qa", "test") == want
    assert site.asked == ["/data/CommonsenseQA/dev_rand_split.jsonl"]
    (path,) = files_in(site.cache)
    assert path.name == "dev_rand_split.jsonl"
    path.write_bytes(BODY[:-10])
    assert tasks.load("commonsense_qa", "test") == want
    assert path.read_bytes() == BODY and len(site.asked) == 2


@pytest.mark.parametrize(("answer", "message"), [
    ((200, len(BODY), BODY.replace(b"x1", b"x2")), "SHA-256"),  # other content
    ((200, len(BODY), BODY[:-20]), "."),  # the connection breaks
    ((200, len(BODY) - 20, BODY[:-20]), "SHA-256"),  # cut, but consistent
    ((404, 9, b"not found"), "404"),
])  # fmt: skip
def test_bad_answers_leave_nothing(site, answer, message):
    """Guards half-written or wrong files that a later run would trust."""
    site.answer = answer
    said = refused("commonsense_qa", "test")
    assert message in said and "--data-dir" in said
    assert not files_in(site.cache)


def test_no_network(site, monkeypatch):
    """Guards a traceback or an endless wait: silent server, refused at once, no such host."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://nowhere.invalid", "x"):
            monkeypatch.setenv("SERT_DATA_URL", url)
            said = refused("commonsense_qa", "test")
            assert "could not download" in said and "--data-dir" in said
    assert not files_in(site.cache)


def test_a_cache_that_cannot_be_written(site, tmp_path, monkeypatch):
    """Guards a traceback on a bad SERT_CACHE: a file is where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SERT_CACHE", str(tmp_path / "file"))
    assert "SERT_CACHE" in refused("commonsense_qa", "test")


# --- the rest --------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    """Guards a KeyError: the message lists what there is."""
    assert "strategy_qa" in refused("gsm8k", "test")
    assert "validation" in refused("micro", "dev")
    assert "--data-dir" in refused("micro", "test", "somewhere")
