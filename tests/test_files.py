"""io/files.py and machine.py: files through kills, full disks, damage; devices."""

import errno
import itertools
import math
import os
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from sert_min.io import files, machine
from sert_min.io.errors import SertError

read_all = lambda path: list(files.read_jsonl(path))  # noqa: E731
TEXT = st.text(st.characters(), max_size=10)  # lone surrogates, too
VALUE = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXT | st.lists(TEXT)


@settings(max_examples=40)
@given(st.lists(st.dictionaries(TEXT, VALUE, max_size=5), max_size=4))
def test_records_come_back(tmp_path_factory, records):
    """Guards line breaks, U+2028 and lone surrogates in one line's text, and wrong paths."""
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("".join(map(files.to_line, records)))
    assert path.read_bytes().count(b"\n") == len(records)
    assert read_all(path) == records
    with pytest.raises(ValueError):  # no JSON: other readers refuse it
        files.to_line({"logprob": math.nan})
    for read in (files.read_json, read_all):
        refuses("does not exist.*check the path", read, path / "x")
        refuses("is a folder", read, path.parent)


@pytest.mark.parametrize("line", [
    b"[1]", b"3", b'"x"', b"null", b"{", b'{"a":1}{"b":2}', b'{"a":"\x01"}', b'{"a":NaN}', b"\xff",
    b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"1" * 5000 + b"}",
])  # fmt: skip
def test_damaged_lines_are_named(tmp_path, line):
    """Guards deep nesting (RecursionError), non-objects, bytes that are no UTF-8."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    reader = files.read_jsonl(path)
    assert next(reader) == {"a": 1}
    refuses("line 2 .*remove that line", next, reader)


@pytest.mark.parametrize("text", [
    b'\xef\xbb\xbf{"a":1}\r\n\n \n{"a":2}', b'\xef\xbb\xbf\n{"a":1}\r\r\n\t\n{"a":2}\n\n',
    b'{"a":1}\n\xef\xbb\xbf{"a":2}\n',  # two files, one behind the other
])  # fmt: skip
def test_a_bom_and_blank_lines_are_read_over(text, tmp_path):
    """ "Remove that line" would have dropped the first record of a file that an editor saved."""
    (tmp_path / "a.jsonl").write_bytes(text)
    assert [r["a"] for r in read_all(tmp_path / "a.jsonl")] == [1, 2]
    (tmp_path / "a.jsonl").write_text('{"a":1}', "utf-16")
    refuses("save it as UTF-8", read_all, tmp_path / "a.jsonl")


@pytest.mark.parametrize("written", [0, 5, 20])
def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch, written):
    """Guards half a record behind ENOSPC, and os.write, which may write less than it was given."""
    path, real, left = tmp_path / "a.jsonl", os.write, [10**6]

    def write(fd, data):  # at most 7 bytes at a time
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        piece = bytes(data)[: min(7, left[0])]
        left[0] -= len(piece)
        return real(fd, piece)

    monkeypatch.setattr(os, "write", write)
    files.append_durable(path, '{"a":1,"text":"more than seven"}\n')
    left[0] = written
    with pytest.raises(OSError) as e:
        files.append_durable(path, '{"a":2,"text":"long enough to be cut"}\n')
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(path)
    left[0] = 10**6
    files.append_durable(path, '{"a":3}\n')
    assert [r["a"] for r in read_all(path)] == [1, 3]


def test_a_torn_tail_is_set_aside_not_glued(tmp_path):
    """Guards the record after a torn line: appended straight on, both would be lost."""
    path = tmp_path / "a.jsonl"
    tails = b"", b'{"a":2', b"x" * 200_000, b"\xff\x00"
    for tail in tails:
        files.append_durable(path, '{"a":1}\n')  # where the tail before has not been set aside
        assert files.set_torn_tail_aside(path) == 0
        with open(path, "ab") as f:
            f.write(tail)
    assert files.set_torn_tail_aside(path) == 2
    assert [r["a"] for r in read_all(path)] == [1] * 4
    assert (tmp_path / "a.jsonl.torn").read_bytes() == b"".join(x + b"\n" for x in tails[1:])


def killed(n: int, work) -> bool:
    """Run `work` in a fork that kills itself at its n-th write (half is done), sync or rename."""
    child = os.fork()
    if child == 0:
        calls, write = itertools.count(1), os.write

        def dying(real, *args):
            if next(calls) == n:
                if real is write:
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        for name in ("write", "fsync", "rename", "replace", "open", "mkdir"):
            setattr(os, name, partial(dying, getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_sigkill_while_appending_loses_nothing(tmp_path):
    """Guards acknowledged records: the file ends as if nothing had happened."""
    path, said, torn, kills = tmp_path / "a.jsonl", tmp_path / "said", 0, 0
    path.touch(), said.write_text("0")

    def work():
        for i in range(len(read_all(path)), 12):
            files.append_durable(path, files.to_line({"i": i, "text": "x" * i}))
            said.write_text(str(i + 1))

    for n in [1, 2, 3, 4, 5] * 3:
        kills += killed(n, work)
        torn += files.set_torn_tail_aside(path) > 0
        assert int(said.read_text()) <= path.read_bytes().count(b"\n")
    work()
    assert kills > 8 and torn > 2
    assert read_all(path) == [{"i": i, "text": "x" * i} for i in range(12)]


def test_a_failure_keeps_the_old_file_and_folder(tmp_path, monkeypatch):
    """Guards open(path, "w"), mixed checkpoints, and a second rename that fails."""
    file, path, real = tmp_path / "a.json", tmp_path / "deep" / "model", os.rename

    def rename(source, target):
        if Path(source).name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    files.write_atomic(file, (str(i) for i in range(3)))
    with pytest.raises(ZeroDivisionError):
        files.write_atomic(file, (str(1 // i) for i in (1, 0)))  # fails in its second half
    assert file.read_text() == "012" and os.listdir(tmp_path) == ["a.json"]
    for name in "abc":
        with pytest.raises(OSError) if name == "c" else nullcontext():
            with files.atomic_folder(path) as part:
                (part / name).write_text(name)
        assert os.listdir(path) == [min(name, "b")] and os.listdir(path.parent) == ["model"]
        if name == "b":
            monkeypatch.setattr(os, "rename", rename)


def test_sigkill_while_saving_leaves_the_old_or_the_new(tmp_path):
    """Guards files of a folder that do not belong together, and rubbish in the next save's way."""
    folder, file = tmp_path / "model", tmp_path / "a.json"

    def work(text: str = "new"):
        files.write_atomic(file, text)
        with files.atomic_folder(folder) as part:
            for name in "abc":
                (part / name).write_text(text)

    work("old")
    seen, n = set(), 1
    while killed(n, work):
        files.recover_folder(folder)
        (text,) = {(folder / name).read_text() for name in "abc"}
        seen |= {text, file.read_text()}
        work("old")
        assert {p.name for p in tmp_path.iterdir() if p.suffix != ".tmp"} == {"model", "a.json"}
        n += 1
    assert n > 10 and seen == {"old", "new"}


@pytest.mark.parametrize("flock", [True, False])  # a network disk may know no locks
def test_a_second_process_is_refused(flock, tmp_path, monkeypatch):
    """Guards two writers in one folder; the lock goes with its process, however that ends."""
    if not flock:
        no_locks = Mock(side_effect=OSError(errno.ENOLCK, "No locks"))
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    held, hold = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with files.lock_folder(tmp_path / "out"):
                os.write(hold, b"!")
                time.sleep(60)
        finally:
            os._exit(0)
    os.close(hold)
    try:
        assert os.read(held, 1) == b"!"
        said = "another process is writing.*another folder"
        said += ".*delete .*.lock-holder" * (not flock)
        refuses(said, files.lock_folder(tmp_path / "out").__enter__)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "out/.lock-holder").exists() != flock
    with files.lock_folder(tmp_path / "out"):
        pass
    assert not (tmp_path / "out/.lock-holder").exists()


def test_other_settings_are_refused_with_both_values(tmp_path):
    """Guards records of two settings in one folder."""
    path = tmp_path / "settings.json"
    files.check_settings(path, {"top_p": 0.95, "kinds": ("a",), "gone": 1}, "use --out-dir")
    files.check_settings(path, {"kinds": ["a"], "gone": 1, "top_p": 0.95}, "use --out-dir")
    new = {"kinds": ["a"], "new": 2}
    said = refuses("--out-dir", files.check_settings, path, {"top_p": 0.9, **new}, "use --out-dir")
    assert "top_p: 0.95 there, 0.9 now" in said and "new: None there, 2 now" in said
    assert "kinds" not in said and "gone" not in said
    path.write_text('{"top_p": 0.9')
    refuses("not JSON", files.check_settings, path, {}, "")


def test_devices(monkeypatch):
    """Guards a RuntimeError deep in the run, and launches on the first GPU in place of cuda:1."""
    assert machine.pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "", "cuda:77", "cuda:x", "cpu:x", "mps:9"):
        refuses("--device", machine.pick_device, name)
    chosen, second = [], torch.device("cuda:1")
    fake = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen.append}
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch, "empty", lambda n, device: Mock(device=torch.device(device)))
    assert machine.pick_device("cuda:1") == second
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.pick_device("cuda") == machine.pick_device("auto") == second
    assert chosen == [second] * 3


@pytest.mark.parametrize("has, wanted", [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_only_where_it_pays(monkeypatch, has, wanted):
    """Guards bf16 for small models, without instructions, and by emulation (T4 and V100)."""
    monkeypatch.setattr(machine.cpu, "has_bf16", lambda: has)
    answer = lambda including_emulation=True: including_emulation or has  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    for device in map(torch.device, ("cpu", "cuda:0")):
        assert machine.pick_dtype("auto", device, 124_000_000) == wanted
        assert machine.pick_dtype("auto", device, 1_000_000) == torch.float32
        assert machine.pick_dtype("bf16", device, 1_000_000) == torch.bfloat16


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_fsync_gets_one_warning(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
    files.warn_once.cache_clear()
    files.write_atomic(tmp_path / "a", "text")
    files.append_durable(tmp_path / "b", "{}\n")
    with files.atomic_folder(tmp_path / "c") as part:
        (part / "d").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    assert capsys.readouterr().err.count("note: ") == 1


def test_links_stay_links(tmp_path):
    """Guards a checkpoint that was moved to a larger disk, also between two renames, and a page."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "last").symlink_to(tmp_path / "disk/last")
    (tmp_path / "page").symlink_to(tmp_path / "disk/page")
    for i in range(2):
        with files.atomic_folder(tmp_path / "last") as part:
            (part / "weights").write_text(str(i))
        files.write_atomic(tmp_path / "page", str(i))
        assert (tmp_path / "last").is_symlink() and (tmp_path / "page").is_symlink()
        written = [(tmp_path / "disk" / name).read_text() for name in ("last/weights", "page")]
        assert written == [str(i), str(i)]
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")  # which is not there yet
    with files.lock_folder(tmp_path / "out/run"):
        assert (tmp_path / "disk/out/run").is_dir()
    (tmp_path / "last").rename(tmp_path / "state")  # a link still, to the same folder
    (tmp_path / "disk/last").rename(tmp_path / "disk/.last.old")  # killed between two renames
    files.recover_folder(tmp_path / "state")
    assert (tmp_path / "state/weights").exists() and not (tmp_path / "disk/.last.old").exists()


def test_a_place_that_fails_later_is_refused_first(tmp_path, monkeypatch):
    """Guards all steps of a training before a result that has no place, and too long names."""
    assert files.clean_name("a/b c") == "a-b-c" and files.clean_name("a" * 99) == "a" * 80
    name = files.clean_name("\U00020000" * 300)
    assert name == "\U00020000" * 60 and files.clean_name("ж" * 99) == "ж" * 80
    for path in (tmp_path / name, tmp_path / ("a" * 255)):
        files.check_place(path, folder=False)
        files.write_atomic(path, "text")
        path.unlink()
        files.check_place(path, folder=True)
        with files.atomic_folder(path) as part:
            (part / "a").write_text("")
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file/x")
    (tmp_path / "new").symlink_to(tmp_path / "disk/run/last")
    files.check_place(tmp_path / "new", folder=True)  # a link to what is not there yet
    files.check_place(tmp_path / "file", folder=False)
    files.check_place(tmp_path / "folder", folder=True)
    for name, error in (("folder", "is no plain file"), ("/dev/null", "is no plain file"),
                        ("file", "is no folder"), ("link", "Not a dir"), ("a" * 256, "too long")):  # fmt: skip
        with pytest.raises((SertError, OSError), match=error):
            files.check_place(tmp_path / name, folder="folder" in error or "long" in error)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    refuses("is a mount", files.check_place, tmp_path / "folder", folder=True)


def test_linked_folders_are_found_once_by_their_own_name(tmp_path):
    """Guards a table that counts a run twice, and one that is called `latest` in it."""
    (tmp_path / "top/runs/seed0").mkdir(parents=True)
    (tmp_path / "disk/seed1").mkdir(parents=True)
    (tmp_path / "top/latest").symlink_to(tmp_path / "top/runs/seed0")
    (tmp_path / "top/runs/seed1").symlink_to(tmp_path / "disk/seed1")
    (tmp_path / "disk/seed1/loop").symlink_to(tmp_path / "top")
    (tmp_path / "disk/seed1/again").symlink_to(tmp_path / "disk")
    names = [str(p.relative_to(tmp_path / "top")) for p in files.folders_in(tmp_path / "top")]
    assert names == [".", "runs", "runs/seed0", "runs/seed1", "runs/seed1/again"]
