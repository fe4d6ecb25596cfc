"""The loaders: exact splits, hashes, downloads that fail in every way. Each test names the bug it
guards. Tests of the real files need them in ../shared/data and are skipped where it is absent."""

import hashlib
import http.server
import json
import socket
import threading
from pathlib import Path

import pytest

from sert_min import tasks
from sert_min.io import download
from sert_min.io.errors import SertError
from sert_min.questions import Question, data_hash, describe

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real files in ../shared/data")


# --- the real files --------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("task", "split", "size", "majority", "first", "last"),
    [
        ("commonsense_qa", "train", 9741, ("D", 20.38), None, None),
        ("commonsense_qa", "validation", 974, None, None, None),
        ("commonsense_qa", "test", 1221, ("B", 20.88), None, None),
        ("strategy_qa", "train", 1603, ("no", 53.52), "1", "2289"),
        ("strategy_qa", "validation", 160, None, None, None),
        ("strategy_qa", "test", 687, ("no", 52.55), "0", "2286"),
    ],
)
def test_sizes_and_majorities(task, split, size, majority, first, last):
    """Guards the split, labels turned round, and rows out of order (the published figures)."""
    questions = tasks.load(task, split, DATA)
    assert len(questions) == size and len({q.id for q in questions}) == size
    if majority:
        answer, share = majority(questions)
        assert (answer, round(100 * share, 2)) == majority
    if first:
        assert (questions[0].id, questions[-1].id) == (first, last)
    for q in questions:
        assert q.text == q.text.strip() and q.answer in (("yes", "no"), "ABCDE")[bool(q.choices)]


@needs_data
def test_split_equals_the_published_row_numbers():
    """Guards another random stream or a rounding: the file of Fine-tune-CoT's split decides."""
    split = json.loads((DATA / "strategy_qa" / "split.json").read_text())
    for name in ("train", "test"):
        rows = [str(i) for i in split[name]]
        assert [q.id for q in tasks.load("strategy_qa", name, DATA)] == rows


@needs_data
def test_one_known_question_is_in_train_and_test():
    """Guards the claim in the docstring: one leak, no more, and none in CommonsenseQA."""
    both = {q.text for q in tasks.load("strategy_qa", "train", DATA)} & {
        q.text for q in tasks.load("strategy_qa", "test", DATA)
    }
    assert both == {"Can you find Bob Marley's face in most smoke shops?"}


@needs_data
def test_question_text():
    """Guards the form of the paper's Figure 2: options in order, no full stop at the end."""
    q = tasks.load("commonsense_qa", "test", DATA)[0]
    assert q.id == "1afa02df02c908a558b4036e80242fac" and q.answer == "A"
    assert q.text.startswith("A revolving door is convenient for two direction travel, but")
    assert q.text.endswith(
        "at a what? Answer choices: (A) bank, (B) library, (C) department store, (D) mall, "
        "(E) new york"
    )
    assert q.choices == ("bank", "library", "department store", "mall", "new york")


@needs_data
def test_validation_is_a_part_of_train_that_never_moves():
    """Guards a holdout that depends on the order of the questions or splits a double question."""
    train = tasks.load("strategy_qa", "train", DATA)
    rest, held = tasks.holdout_split(train)
    assert held == tasks.load("strategy_qa", "validation", DATA)
    assert sorted(rest + held, key=lambda q: int(q.id)) == train
    assert set(tasks.holdout_split(train[::-1])[1]) == set(held)
    assert not {q.text for q in rest} & {q.text for q in held}
    assert data_hash(held)[:12] == "35a47878c101"  # the same on every machine


@needs_data
def test_describe_is_one_line():
    """Guards the line that every run prints; the hash pins the content of 687 questions."""
    line = describe(tasks.load("strategy_qa", "test", DATA), "test")
    assert line == "strategy_qa test: 687 questions, data 599675c43464, majority no 52.55 %"
    assert "\n" not in describe([], "test")


@needs_data
def test_a_changed_data_file_is_refused(tmp_path):
    """Guards results on edited data under the name of the benchmark."""
    source = DATA / "commonsense_qa" / "dev_rand_split.jsonl"
    (tmp_path / "commonsense_qa").mkdir()
    copy = tmp_path / "commonsense_qa" / source.name
    copy.write_bytes(source.read_bytes().replace(b"revolving", b"resolving", 1))
    with pytest.raises(SertError, match="expected 3210497fdaae") as e:
        tasks.load("commonsense_qa", "test", tmp_path)
    assert "\n" not in str(e.value)
    copy.unlink()
    with pytest.raises(SertError, match="missing"):
        tasks.load("commonsense_qa", "test", tmp_path)


# --- downloads, from a local server ----------------------------------------------------------

ROW = {
    "answerKey": "B",
    "id": "x1",
    "question": {
        "stem": " Where? ",
        "choices": [{"label": a, "text": t} for a, t in zip("BACDE", "qpr st"[:5])],
    },
}
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

        def log_message(self, *args):
            pass

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
    monkeypatch.setattr(download, "TIMEOUT", 1)
    yield server
    server.shutdown()
    server.server_close()


def files_in(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_download_once_then_cache(site):
    """Guards a wrong address, options in file order instead of label order, a useless cache."""
    want = [
        Question("commonsense_qa", "x1", "Where? Answer choices: (A) p, (B) q, (C) r, (D) , (E) s",
                 "B", ("p", "q", "r", "", "s"))
    ]  # fmt: skip
    assert tasks.load("commonsense_qa", "test") == want
    assert tasks.load("commonsense_qa", "test") == want
    assert site.asked == ["/data/CommonsenseQA/dev_rand_split.jsonl"]
    assert [p.name for p in files_in(site.cache)] == ["dev_rand_split.jsonl"]


def test_a_spoilt_cache_is_replaced(site):
    """Guards trusting a file because it is there."""
    tasks.load("commonsense_qa", "test")
    (path,) = files_in(site.cache)
    path.write_bytes(BODY[:-10])
    assert len(tasks.load("commonsense_qa", "test")) == 1
    assert path.read_bytes() == BODY and len(site.asked) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, len(BODY), BODY.replace(b"x1", b"x2")), "SHA-256"),  # other content
        ((200, len(BODY), BODY[:-20]), "."),  # the connection breaks
        ((200, len(BODY) - 20, BODY[:-20]), "SHA-256"),  # cut, but consistent
        ((404, 9, b"not found"), "404"),
        ((500, 4, b"oops"), "500"),
        ((200, 0, b""), "SHA-256"),
    ],
)
def test_bad_answers_leave_nothing(site, answer, message):
    """Guards half-written or wrong files that a later run would trust."""
    site.answer = answer
    with pytest.raises(SertError, match=message) as e:
        tasks.load("commonsense_qa", "test")
    assert "\n" not in str(e.value) and "--data-dir" in str(e.value)
    assert not files_in(site.cache)


def test_no_network(site, monkeypatch):
    """Guards a traceback or an endless wait: refused at once, silent server, no such host."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setenv("SERT_DATA_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(SertError, match="timed out.*--data-dir"):
            tasks.load("commonsense_qa", "test")
    for url in (f"http://127.0.0.1:{port}", "http://nowhere.invalid", "nonsense"):
        monkeypatch.setenv("SERT_DATA_URL", url)
        with pytest.raises(SertError, match="could not download.*--data-dir"):
            tasks.load("commonsense_qa", "test")
    assert not files_in(site.cache)


def test_a_cache_that_cannot_be_written(site, tmp_path, monkeypatch):
    """Guards a traceback on a bad SERT_CACHE (here: a file where the folder should be)."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SERT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SertError, match="SERT_CACHE"):
        tasks.load("commonsense_qa", "test")


def test_a_full_disk_leaves_nothing(site, monkeypatch):
    """Guards a half-written file under the right name."""

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tasks.os, "fsync", full)
    with pytest.raises(SertError, match="No space left.*SERT_CACHE"):
        tasks.load("commonsense_qa", "test")
    assert not files_in(site.cache)


def test_right_hash_but_wrong_form(site, monkeypatch):
    """Guards a traceback where a file of another form has been pinned."""
    for body in (
        b'{"id": 1}\n',
        b"[1]\n",
        b'{"id": 1, "question": 3}\n',
        b"nothing\n",
        BODY + BODY,
    ):
        file = tasks.FILES["commonsense_qa", "test"]
        file = file._replace(sha256=hashlib.sha256(body).hexdigest())
        monkeypatch.setitem(tasks.FILES, ("commonsense_qa", "test"), file)
        site.answer = (200, len(body), body)
        with pytest.raises(SertError) as e:
            tasks.load("commonsense_qa", "test")
        assert "\n" not in str(e.value)


# --- the rest --------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    """Guards a KeyError: the message lists what there is."""
    with pytest.raises(SertError, match="strategy_qa"):
        tasks.load("gsm8k", "test")
    with pytest.raises(SertError, match="validation"):
        tasks.load("micro", "dev")
    with pytest.raises(SertError, match="--data-dir"):
        tasks.load("micro", "test", "somewhere")


def test_micro_comes_without_files():
    """Guards the offline default: three splits, disjoint, validation out of train."""
    train, held, test = (tasks.load("micro", split) for split in tasks.SPLITS)
    assert set(held) < set(train) and len(held) == round(len(train) / 10)
    assert not {q.id for q in train} & {q.id for q in test}


def test_data_hash_sees_every_field():
    """Guards a hash that misses a changed answer or a changed order."""
    q = Question("t", "1", "a", "A", ("x", "y"))
    others = [
        Question("t", "2", "a", "A", ("x", "y")),
        Question("t", "1", "b", "A", ("x", "y")),
        Question("t", "1", "a", "B", ("x", "y")),
        Question("t", "1", "a", "A", ("y", "x")),
    ]
    assert len({data_hash([o]) for o in [q, *others]}) == 5
    assert data_hash([q, others[0]]) != data_hash([others[0], q])
