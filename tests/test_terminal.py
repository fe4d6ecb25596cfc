"""What a user sees when a pipe breaks, a stream is closed or ASCII, a package lacks, or Ctrl-C comes early."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from sert_min.io import errors
from sert_min.io.errors import SertError, last_line
from sert_min.io.progress import Bar

SAMPLE = [sys.executable, str(ROOT / "sample.py"), "--limit", "1", "--samples", "1"]
PROMPT = [*SAMPLE, "--model", "micro", "--prompt", "Zürich", "--max-new-tokens", "2"]


def shell(command: list[str], how: str, folder) -> subprocess.CompletedProcess:
    """Run `command` with what bash makes of `how` behind it; the status is the command's own."""
    command = ["bash", "-c", f'"$@" {how}; exit ${{PIPESTATUS[0]}}', "-", *command]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True)


@pytest.mark.parametrize("command, how, status, printed", [
    (SAMPLE, "| head -1", 1, "micro train"),
    (SAMPLE, "2>&-", 0, "selected.jsonl"), (SAMPLE, ">&-", 0, ""), (SAMPLE, "<&- >&- 2>&-", 0, ""),
    (SAMPLE, ">/dev/full", 1, "error: No space left on device; free some space"),
    ([*SAMPLE, "--help"], "| true", 0, ""),
    (["env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0", *PROMPT], "", 0, "Zürich"),
    (["env", "LC_ALL=C", "PYTHONIOENCODING=ascii", *PROMPT], "", 0, "Z?rich"),
    ([sys.executable, "-S", str(ROOT / "train.py")], "", 1, "has no package"),
])  # fmt: skip
def test_streams(command, how, status, printed, tmp_path):
    ended = shell(command, how, tmp_path)
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    assert ended.returncode == status and printed in ended.stdout + ended.stderr


def cpu_seconds(process: int) -> float:
    """Of a process so far; unlike wall seconds they say how far it is on a busy machine, too."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("seconds", [0.2, 0.8, 2.5])
def test_an_early_interrupt_is_one_line(seconds, tmp_path):
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    child = subprocess.Popen([*SAMPLE[:-4], "--limit", "400"], cwd=tmp_path, text=True, preexec_fn=default,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while cpu_seconds(child.pid) < seconds:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert "interrupted; repeat the same command" in err and "Traceback" not in err
    assert child.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize("error, words", [
    (SertError("so\nit \x1b[31m is"), "error: so it  [31m is"),
    (OSError(30, "Read-only", "/x\n"), "error: Read-only: /x ; choose a writable folder"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--rows"),
    (OSError(28, "No space left", "f"), "No space left: f; free some space"),
    (PermissionError(13, "Permission denied", "/.cache"), "SERT_CACHE"),
    (OSError(36, "File name too long", "f"), "choose a shorter name"),
    (OSError(5, "Input/output error", "f"), "check that disk"), (MemoryError(), "out of memory"),
    (OSError("libcudart.so.12: cannot open"), "error: libcudart.so.12: cannot open; check"),
    (ModuleNotFoundError("x", name="fcntl"), "WSL"), (BrokenPipeError(32, "Broken pipe"), ""),
    (ModuleNotFoundError("x", name="tqdm"), "pip install -r requirements.txt"),
])  # fmt: skip
def test_last_lines(error, words):
    line = last_line(error)
    assert words in line and bool(words) == bool(line) and line.isprintable()
    for fault in (ValueError("a fault"), ModuleNotFoundError(name="sert_min.x")):
        assert last_line(fault) is None  # a traceback is of use
    assert "interrupted" in last_line(KeyboardInterrupt())


@pytest.mark.parametrize("rank, problem, waits", [
    ("0", SertError("bad"), []), ("1", SertError("bad"), [20]), ("1", RuntimeError("lost"), [20]),
    ("0", RuntimeError("lost"), [1]), ("0", SystemExit(2), []), ("1", SystemExit(2), [20]),
    ("0", BrokenPipeError(), []), (None, RuntimeError("a bug"), []),
])  # fmt: skip
def test_processes_wait_for_the_one_that_speaks(rank, problem, waits, monkeypatch):
    """Guards a second message under torchrun, also where another broke the connection."""
    slept, stderr = [], io.StringIO()
    monkeypatch.setattr(errors.time, "sleep", lambda s: slept.append((s, stderr.getvalue())))
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)

    def parse():
        print("usage", file=sys.stderr)
        raise problem

    with pytest.raises((SystemExit, RuntimeError)):
        errors.run_script(None, parse)
    assert slept == [(s, "usage\n" if rank == "0" else "") for s in waits]
    assert stderr.getvalue() == "usage\n" and sys.stderr is stderr


def test_streams_and_interrupts_while_torch_is_imported(tmp_path):
    """Guards a KeyboardInterrupt that aborts C++ or is dropped, and the number of a closed stderr."""
    script = ["env", f"PYTHONPATH={tmp_path}", sys.executable, str(ROOT / "evaluate.py")]
    code = "import os, time\ntry: os.kill(os.getpid(), 2); time.sleep(9)\n"
    (tmp_path / "torch.py").write_text(code + "except BaseException: pass")
    ended = shell(script, "", tmp_path)
    assert ended.returncode == 130 and ended.stderr.strip().startswith("interrupted; repeat")
    code = "import os\nfds = [os.readlink(f'/proc/self/fd/{i}') for i in range(3)]\n"
    (tmp_path / "torch.py").write_text(code + "open('fds', 'w').write(str(fds))")
    shell(script, "<&- >&- 2>&-", tmp_path)
    assert (tmp_path / "fds").read_text() == str(["/dev/null"] * 3)


def test_commands_can_be_pasted(tmp_path, monkeypatch):
    """Guards names with blanks and quotes, a folder of data, and a start from another folder."""
    (tmp_path / "my repo").mkdir()
    (tmp_path / "my repo/train.py").touch()
    for argv, script in ((f"{tmp_path}/my repo/sample.py", f"{tmp_path}/my repo/train.py"),
                         ("sample.py", "train.py"), ("-c", "train.py")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [argv])
        monkeypatch.setattr(sys, "orig_argv", ["my venv/python", argv])
        flags = {"model": "a 'b'", "data_dir": None, "seed": 0, "out_dir": tmp_path / "$x"}
        words = shlex.split(errors.command("train.py", "--task 'q 1.jsonl'", **flags))
        assert words == ["my venv/python", script, "--task", "q 1.jsonl", "--model", "a 'b'", "--seed", "0",
                         "--out-dir", f"{tmp_path}/$x"]  # fmt: skip


def test_a_bar_tells_rate_and_note():
    """Guards a rate of 0.0k on a slow machine, and a note that comes one block late."""
    with Bar(10, "path") as bar:
        bar.start -= 1000  # seconds
        bar.count(50_000)
        bar.note = ", 3 kept"
        bar.reach(4)
        assert (bar.n, bar.postfix) == (4, "50 tok/s, 3 kept")
        bar.count(9_950_000)
        assert bar.postfix == "10.0k tok/s, 3 kept"
