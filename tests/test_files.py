"""io/files.py, errors.py and machine.py: files through kills, full disks and damage; one-line errors."""

import errno
import json
import math
import os
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_model, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from sert_min.io import errors, files, machine
from sert_min.io.errors import SertError
from sert_min.models import load_model, save_model

# --- JSONL ---------------------------------------------------------------------------------------

TEXT = st.text(st.characters(), max_size=10)  # lone surrogates, too
VALUE = st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXT | st.lists(TEXT)


@settings(max_examples=40)
@given(st.lists(st.dictionaries(TEXT, VALUE, max_size=5), max_size=4))
def test_records_come_back(tmp_path_factory, records):
    """Guards line breaks, U+2028 and lone surrogates in text: one record stays one line."""
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    lines = [files.to_line(record) for record in records]
    assert all(line.count("\n") == 1 and line.isascii() for line in lines)
    path.write_text("".join(lines))
    assert list(files.read_jsonl(path)) == records
    for value in (math.nan, math.inf):  # no JSON: other readers refuse it
        with pytest.raises(ValueError):
            files.to_line({"logprob": value})


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"3", b'"x"', b"null", b"", b"{", b'{"a":1}{"b":2}', b"\xff", b"[" * 200_000]
    + [
        b'{"a":' * 200_000,
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":"\x01"}',
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
    ],
)
def test_damaged_lines_are_named(tmp_path, line):
    """Guards deep nesting (RecursionError), non-objects, bytes that are no UTF-8, blank lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    reader = files.read_jsonl(path)
    assert next(reader) == {"a": 1}
    with pytest.raises(SertError, match="line 2 ") as e:
        next(reader)
    assert "remove that line" in one_line(e)


def test_missing_files_and_folders_are_named(tmp_path):
    """Guards tracebacks from a wrong path."""
    for read in (files.read_json, lambda path: list(files.read_jsonl(path))):
        for path, why in ((tmp_path / "x", "does not exist"), (tmp_path, "is a folder")):
            with pytest.raises(SertError, match=why) as e:
                read(path)
            assert "check the path" in one_line(e)
    (tmp_path / "x").write_text("[]")
    with pytest.raises(SertError, match="is not a JSON object"):
        files.read_json(tmp_path / "x")


# --- append --------------------------------------------------------------------------------------


def test_a_torn_tail_is_set_aside_not_glued(tmp_path):
    """Guards the record after a torn line: appended straight on, both would be lost."""
    path = tmp_path / "a.jsonl"
    assert files.set_torn_tail_aside(path) == 0  # no file yet
    files.append_durable(path, '{"a":1}\n')
    assert files.set_torn_tail_aside(path) == 0
    for i, tail in enumerate((b'{"a":2', b'{"a":2}', b"x" * 200_000, b"\xff\x00")):
        with open(path, "ab") as f:
            f.write(tail)
        if i:  # appending does it as well, where nobody looked before
            assert files.set_torn_tail_aside(path) == len(tail)
        files.append_durable(path, '{"a":3}\n')
    assert [r["a"] for r in files.read_jsonl(path)] == [1, 3, 3, 3, 3]
    torn = (tmp_path / "a.jsonl.torn").read_bytes()
    assert torn == b'{"a":2\n{"a":2}\n' + b"x" * 200_000 + b"\n\xff\x00\n"
    path.write_bytes(b"no newline at all")
    assert files.set_torn_tail_aside(path) == 17 and path.read_bytes() == b""


@pytest.mark.parametrize("written", [0, 5, 20, None])
def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch, written):
    """Guards half a record behind ENOSPC: the file is cut back, the error names it. And the return
    value of os.write, which may write less than it was given."""
    path, real, left = tmp_path / "a.jsonl", os.write, [written]
    files.append_durable(path, '{"a":1}\n')

    def write(fd, data):
        """At most 7 bytes at a time, `written` bytes in all."""
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        piece = bytes(data)[: min(7, 7 if left[0] is None else left[0])]
        left[0] = left[0] and left[0] - len(piece)
        return real(fd, piece)

    line = '{"a":2,"text":"long enough to be cut"}\n'
    with monkeypatch.context() as m:
        m.setattr(os, "write", write)
        if written is None:
            files.append_durable(path, line)
        else:
            with pytest.raises(OSError) as e:
                files.append_durable(path, line)
            assert e.value.errno == errno.ENOSPC and e.value.filename == str(path)
            assert path.read_text() == '{"a":1}\n'
    files.append_durable(path, '{"a":3}\n')
    assert [r["a"] for r in files.read_jsonl(path)] == ([1, 2, 3] if written is None else [1, 3])


def killed(n: int, work) -> bool:
    """Run `work` in a forked process that kills itself at its n-th write, sync or rename (of a
    write half is done); False if there were fewer."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def dying(real):
            def call(*args):
                calls[0] += 1
                if calls[0] == n:
                    if real is write:
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            return call

        write = os.write
        for name in ("write", "fsync", "rename", "replace", "open", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_sigkill_while_appending_loses_nothing(tmp_path):
    """Guards acknowledged records: killed at each step in turn and rerun, the file ends as if
    nothing had happened."""
    path, said, torn, kills = tmp_path / "a.jsonl", tmp_path / "said", 0, 0

    def work():
        done = sum(1 for _ in files.read_jsonl(path)) if path.exists() else 0
        for i in range(done, 12):
            files.append_durable(path, files.to_line({"i": i, "text": "x" * i}))
            said.write_text(str(i))

    for n in [1, 2, 3, 4, 5] * 3:
        kills += killed(n, work)
        torn += files.set_torn_tail_aside(path) > 0
        acknowledged = int(said.read_text()) if said.exists() else -1
        assert acknowledged < (path.read_bytes().count(b"\n") if path.exists() else 0)
    work()
    assert kills > 9 and torn > 2
    assert list(files.read_jsonl(path)) == [{"i": i, "text": "x" * i} for i in range(12)]


# --- whole files and folders -----------------------------------------------------------------------


def test_write_atomic_keeps_the_old_content_on_failure(tmp_path):
    """Guards open(path, "w") on a file that matters: a failing writer leaves the old one."""
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def broken():
        yield "new, half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_atomic(path, broken())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    with open(path) as reader:
        files.write_atomic(path, (str(i) for i in range(3)))
        assert reader.read() == "old", "written over instead of replaced"
    assert path.read_text() == "012" and os.listdir(tmp_path) == ["a.json"]


def test_atomic_folder_is_replaced_whole(tmp_path, monkeypatch):
    """Guards a mixture of two checkpoints, half of one, and the moment between the two renames:
    where the second fails, the old folder returns."""
    path, real = tmp_path / "deep" / "model", os.rename
    with files.atomic_folder(path) as part:
        (part / "a").write_text("1")
        (part / "only in the first").write_text("1")
        assert not path.exists()

    def rename(source, target):
        if Path(source).name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    for breaks in (lambda: monkeypatch.setattr(os, "rename", rename), lambda: 1 / 0):
        with pytest.raises((OSError, ZeroDivisionError)), files.atomic_folder(path) as part:
            (part / "a").write_text("2")
            breaks()
        monkeypatch.undo()
        assert (path / "a").read_text() == "1" and os.listdir(path.parent) == ["model"]
    with files.atomic_folder(path) as part:
        (part / "a").write_text("3")
    assert os.listdir(path) == ["a"] and os.listdir(path.parent) == ["model"]


def test_sigkill_while_saving_leaves_the_old_or_the_new(tmp_path):
    """Guards checkpoints: killed at each step in turn, the files of the folder belong together, and
    the next save finds no rubbish in its way; a file is the old one or the new one."""
    folder, file = tmp_path / "model", tmp_path / "a.json"

    def work(text: str = "new"):
        files.write_atomic(file, text)
        with files.atomic_folder(folder) as part:
            for name in "abc":
                (part / name).write_text(text)

    work("old")
    seen, n = set(), 1
    while killed(n, work):
        with pytest.raises(RuntimeError), files.atomic_folder(folder):
            raise RuntimeError  # the next save puts things in order first
        (text,) = {(folder / name).read_text() for name in "abc"}
        seen |= {text, file.read_text()}
        assert {p.name for p in tmp_path.iterdir() if p.suffix != ".tmp"} == {"model", "a.json"}
        work("old")
        n += 1
    assert n > 10 and seen == {"old", "new"}


def test_a_really_full_disk(tmp_path):
    """Guards the same on a real file system of 256 kB: JSONL, file and model folder keep what they
    held, and the one line names the way out."""
    disk, source = tmp_path / "disk", make_tiny_model(tmp_path / "model", n_embd=64)
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs can't be mounted here (needs root)")
    path, line, model = disk / "a.jsonl", files.to_line({"text": "x" * 10_000}), load_model(source)
    held = None
    try:
        for write in (
            lambda _: [files.append_durable(path, line) for _ in range(100)],
            lambda _: files.write_atomic(path, ["y"] * 400_000),
            lambda _: save_model(model, disk / "m", source, {}),
        ):
            with pytest.raises(SystemExit) as e:
                errors.run_script(write, Namespace())
            assert "free some space" in one_line(e) and "None" not in one_line(e)
            held = held or path.read_bytes()
            assert path.read_bytes() == held and os.listdir(disk) == ["a.jsonl"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert len(held) > 10 * len(line) and len(held) % len(line) == 0


# --- lock and settings ---------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path):
    """Guards two writers in one folder; the lock goes with its process, however that ends."""
    held, hold = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with files.lock_folder(tmp_path / "out"):
                os.write(hold, b"!")
                time.sleep(60)
        finally:
            os._exit(0)
    try:
        assert os.read(held, 1) == b"!"
        with pytest.raises(SertError, match="another process is writing") as e:
            with files.lock_folder(tmp_path / "out"):
                pass
        assert "--out-dir" in one_line(e)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _ in range(2):
        with files.lock_folder(tmp_path / "out"):
            pass


def test_other_settings_are_refused_with_both_values(tmp_path):
    """Guards records of two settings in one folder."""
    path = tmp_path / "settings.json"
    files.check_settings(path, {"top_p": 0.95, "kinds": ("a",), "gone": 1}, "use --out-dir")
    files.check_settings(path, {"kinds": ["a"], "gone": 1, "top_p": 0.95}, "use --out-dir")
    with pytest.raises(SertError) as e:
        files.check_settings(path, {"top_p": 0.9, "kinds": ["a"], "new": 2}, "use --out-dir")
    text = one_line(e)
    assert "top_p: 0.95 there, 0.9 now" in text and "kinds" not in text
    assert "gone" not in text and "new: None there, 2 now" in text and "--out-dir" in text
    same = {"top_p": 0.95, "kinds": ["a"], "new": 2}
    files.check_settings(path, same, "use --out-dir", defaults={"new": 2})
    assert json.loads(path.read_text())["top_p"] == 0.95
    path.write_text('{"top_p": 0.9')
    with pytest.raises(SertError, match="not valid JSON"):
        files.check_settings(path, {}, "")


# --- runtime -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem, said",
    [
        (SertError("bad\nthing \x1b[31m; mend it"), "error: bad thing  [31m; mend it"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; free"),
        (OSError(errno.EROFS, "Read-only", "/x\n"), "error: Read-only: /x ; choose a writable"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "choose a folder"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"), "a file is in the way"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--rows"),
    ],
)
def test_known_problems_are_one_line(problem, said):
    """Guards tracebacks, and control characters of foreign text on the terminal."""
    with pytest.raises(SystemExit) as e:
        errors.run_script(fail, problem)
    assert said in one_line(e) and str(e.value).isprintable()


def fail(problem):
    raise problem


def test_unknown_problems_keep_their_traceback():
    """Guards bugs of our own hidden behind a friendly line; Ctrl-C exits with 130."""
    for problem in (ValueError("bug"), OSError(errno.EIO, "disk died", "/x")):
        with pytest.raises(type(problem)):
            errors.run_script(fail, problem)
    with pytest.raises(SystemExit) as e:
        errors.run_script(fail, KeyboardInterrupt())
    assert e.value.code == 130


def test_devices_that_are_not_there_are_refused(monkeypatch):
    """Guards a RuntimeError of torch deep in the run."""
    assert machine.pick_device("auto").type in ("cpu", "cuda", "mps")
    assert machine.pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "", "cuda:77", "cuda:x", "cpu:x", "mps:9"):
        with pytest.raises(SertError, match="--device") as e:
            machine.pick_device(name)
        one_line(e)


def test_dtype_and_threads(monkeypatch):
    """Guards bf16 for small models and on machines without it, and a choice over the user's."""
    cpu = torch.device("cpu")
    assert machine.pick_dtype("auto", cpu, 1_000_000) == torch.float32
    assert machine.pick_dtype("bf16", cpu, 1_000_000) == torch.bfloat16
    for has, wanted in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(machine.cpu, "has_bf16", lambda has=has: has)
        assert machine.pick_dtype("auto", cpu, 124_000_000) == wanted
        assert machine.pick_dtype("auto", cpu, 1_000_000) == torch.float32
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert machine.pick_threads(124_000_000) == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        torch.set_num_threads(2)
        assert machine.pick_threads(1_000_000) == 1
        torch.set_num_threads(2)
        assert machine.pick_threads(124_000_000) == torch.get_num_threads() in (1, 2)
    finally:
        torch.set_num_threads(before)


def test_a_second_gpu_becomes_the_current_one(monkeypatch):
    """Guards --device cuda:1 and torchrun on two GPUs: streams, graphs and Triton's launches take the
    current device, which is the first one unless somebody says otherwise."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch, "empty", lambda n, device: SimpleNamespace(device=torch.device(device))
    )
    second = torch.device("cuda:1")
    assert machine.pick_device("cuda:1") == second
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.pick_device("cuda") == machine.pick_device("auto") == second
    assert chosen == [second] * 3
    machine.pick_device("cpu")
    assert len(chosen) == 3


@pytest.mark.parametrize("real", [True, False])
def test_emulated_bf16_is_not_taken(monkeypatch, real):
    """Guards T4 and V100, which have bf16 by emulation only: slower than fp32."""
    answer = lambda including_emulation=True: including_emulation or real  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    wanted = torch.bfloat16 if real else torch.float32
    assert machine.pick_dtype("auto", torch.device("cuda:0"), 124_000_000) == wanted
