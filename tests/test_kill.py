"""What can happen to a run from outside: kills, a full or read-only disk, a second process."""

import functools
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, make_tiny_model
from fake_server import FakeServer, ok
from kill import COMMANDS, differences, places

import train
from sert_min import tasks
from sert_min.io import files
from sert_min.io.errors import run_script

LOCKS = dict(sample=".lock-0", train=".lock", distill=".lock-responses", evaluate=".lock-evaluate")
SLOW = ["sample", *(pytest.param(n, marks=pytest.mark.slow) for n in LOCKS if n != "sample")]
ALL = pytest.param(60, [*COMMANDS], marks=pytest.mark.slow)


@pytest.mark.parametrize("kills, names", [(8, ["sample", "filter anew"]), (5, ["distill"]), ALL])
def test_killed_anywhere_ends_the_same(kills, names):
    """tests/kill.py in small, in a process of its own: autograd may not be forked once it has run."""
    command = [sys.executable, str(ROOT / "tests/kill.py"), "--kills", str(kills), "--only", *names]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(rf"^{kills} kills in \d+ s, 0 phases with a difference", done.stdout, re.M)


@pytest.fixture
def go(tmp_path_factory, monkeypatch, capsys):
    """go(command, out) runs a command of the kill harness here and returns its error, or ""."""
    folder = tmp_path_factory.mktemp("kill") / "model"
    model = make_tiny_model(folder, n_embd=16, n_layer=1, n_head=2, n_positions=512)
    monkeypatch.setattr(train, "VALIDATE", 2)
    monkeypatch.setitem(tasks.TASKS, "micro", tasks.get("micro")._replace(greedy_cap=6))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(tasks, "load", functools.cache(tasks.load))
    with FakeServer(ok()) as server:

        def run(name, out) -> str:
            command = COMMANDS[name]
            words = f"--model {model} --device cpu {command.flags}".split() + places(name, out)
            words += ["--base-url", server.url] * (name == "distill")
            try:
                run_script(command.script.main, command.script.parse_args(words))
            except SystemExit as e:  # one line that is no traceback
                assert "\n" not in e.code and "Traceback" not in capsys.readouterr().err
                return e.code
            return ""

        yield run


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts a small file system, and again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str):
        again = "remount," if os.path.ismount(folder) else ""
        command = f"mount -t tmpfs -o {again}{options} tmpfs {folder}"
        if subprocess.run(command, shell=True, capture_output=True).returncode:
            pytest.skip("a small tmpfs can't be mounted here (needs root)")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=os.path.ismount(folder))


@pytest.mark.parametrize("name", SLOW)
def test_a_full_disk(name, go, disk, tmp_path):
    """Full at ever later moments: one line each time, and with more room the same bytes at the end."""
    assert go(name, tmp_path / "whole") == ""
    size, full = 8, 0
    out = disk(f"size={size}k") / "out"
    while told := go(name, out):
        assert re.search("No space left|free some space", told), told
        full, size = full + 1, size * 3 // 2
        assert size < 10_000, "it never fits"
        disk(f"size={size}k")
    assert full >= 2 and not +differences(COMMANDS[name], tmp_path / "whole", out)


@pytest.mark.parametrize("name", SLOW)
def test_a_read_only_folder(name, go, disk, tmp_path):
    """New there, and with finished work there: one line, and nothing is touched."""
    out = disk("size=8m") / "out"
    disk("size=8m,ro")
    assert "--out-dir" in go(name, out)
    disk("size=8m,rw")
    assert go(name, out) == ""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    disk("size=8m,ro")
    assert "--out-dir" in go(name, out)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", LOCKS)
def test_a_second_process(name, go, tmp_path):
    """Two writers in one folder: the second is refused and has written nothing."""
    with files.lock_folder(tmp_path / "out", LOCKS[name]):
        assert "another process is writing to" in go(name, tmp_path / "out")
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left <= {*LOCKS.values(), "rationales.jsonl"}
