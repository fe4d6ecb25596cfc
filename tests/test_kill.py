"""What can happen to a run from outside: kills, a full or read-only disk, a second process, a clock
that jumps. Afterwards the same command gives the bytes of an undisturbed run."""

import functools
import os
import random
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_tiny_model
from fake_server import FakeServer, by_body, ok
from kill import COMMANDS, differences

import train
from sert_min import tasks
from sert_min.io import endpoint, files
from sert_min.io.errors import run_script

LOCKS = {"sample": ".lock-0", "train": ".lock", "distill": ".lock-responses",
         "evaluate": ".lock-evaluate"}  # fmt: skip
# One command is quick; the others are run with -m slow.
SLOW = ["sample", *(pytest.param(n, marks=pytest.mark.slow) for n in LOCKS if n != "sample")]


@pytest.mark.parametrize(
    "kills, names",
    [(8, ["sample", "filter anew"]), pytest.param(60, [*COMMANDS], marks=pytest.mark.slow)],
)
def test_killed_anywhere_ends_the_same(kills, names):
    """tests/kill.py in small (docs/usage.md names the large run); in a process of its own, because
    autograd may not be forked once it has run."""
    command = [sys.executable, str(ROOT / "tests/kill.py"), "--kills", str(kills), "--only", *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(rf"^{kills} kills in \d+ s, 0 phases with a difference", done.stdout, re.M)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "model"
    return make_tiny_model(folder, n_embd=16, n_layer=1, n_head=2, n_positions=512)


@pytest.fixture
def go(model, monkeypatch, capsys):
    """go(command, out) runs a command of the kill harness here: (exit status, what stderr said)."""
    monkeypatch.setattr(train, "VALIDATE", 2)
    monkeypatch.setitem(tasks.TASKS, "micro", tasks.get("micro")._replace(greedy_cap=6))
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(tasks, "load", functools.cache(tasks.load))

    @by_body
    def answer(body):
        return ok(f"{len(body['messages'][-1]['content'])} signs. So the answer is yes.")

    with FakeServer(answer) as server:

        def run(name, out):
            command = COMMANDS[name]
            words = ["--model", model, "--device", "cpu", "--out-dir", out, *command.flags.split()]
            words += ["--base-url", server.url] if name == "distill" else []
            try:
                run_script(command.script.main, command.script.parse_args(list(map(str, words))))
            except SystemExit as e:
                return e.code, capsys.readouterr().err
            return 0, ""

        yield run


def one_line(status, said: str) -> str:
    """The message that `status` stands for: one line that is no traceback."""
    assert isinstance(status, str) and status.startswith("error: ") and "\n" not in status
    assert "Traceback" not in said
    return status


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts a small file system, and again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str):
        again = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            done = False
        if not done:
            pytest.skip("a small tmpfs can't be mounted here (needs root)")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=os.path.ismount(folder))


@pytest.mark.parametrize("name", SLOW)
def test_a_full_disk(name, go, disk, tmp_path):
    """Full at ever later moments: each time one line that says so, nothing half-written stays, and
    with more room the same command goes on to the same bytes."""
    assert go(name, tmp_path / "whole") == (0, "")
    size, full = 8, 0
    out = disk(f"size={size}k") / "out"
    while (told := go(name, out))[0] != 0:
        assert re.search("No space left|free some space", one_line(*told)), told
        full += 1
        assert size < 10_000, "it never fits"
        size = size * 3 // 2
        disk(f"size={size}k")
    assert full >= 2
    wrong = differences(COMMANDS[name], tmp_path / "whole", out)
    assert not +wrong, wrong


@pytest.mark.parametrize("name", SLOW)
def test_a_read_only_folder(name, go, disk, tmp_path):
    """New there, and with finished work there: one line; writable again, the same bytes."""
    assert go(name, tmp_path / "whole") == (0, "")
    out = disk("size=8m") / "out"
    disk("size=8m,ro")
    assert "--out-dir" in one_line(*go(name, out))
    disk("size=8m,rw")
    assert go(name, out) == (0, "")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    disk("size=8m,ro")
    assert "--out-dir" in one_line(*go(name, out))
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    disk("size=8m,rw")  # the comparison sets torn tails aside
    assert not +differences(COMMANDS[name], tmp_path / "whole", out)


@pytest.mark.parametrize("name", LOCKS)
def test_a_second_process(name, go, tmp_path):
    """Two writers in one folder: the second is refused and has written nothing."""
    with files.lock_folder(tmp_path / "out", LOCKS[name]):
        assert "another process is writing to" in one_line(*go(name, tmp_path / "out"))
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left <= {*LOCKS.values(), "rationales.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCKS)
def test_a_clock_that_jumps(name, go, tmp_path, monkeypatch):
    """The wall clock may be set back or forth at any moment: nothing waits for it or depends on it."""
    assert go(name, tmp_path / "whole") == (0, "")
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-3e8, 3e8))
    assert go(name, tmp_path / "out") == (0, "")
    assert not +differences(COMMANDS[name], tmp_path / "whole", tmp_path / "out")
