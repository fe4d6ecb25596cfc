"""parallel.py under a real torchrun: two processes against one, killed, stopped, continued by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_tiny_model, start

import train
from sert_min.io.files import lock_folder, read_jsonl
from sert_min.models import load_model

# Three batches of 4, 4, 1 examples an epoch: process 1 has no example in the last of each.
FLAGS = "--model tiny --method finetune --limit 9 --batch-size 4 --epochs 3 --save-seconds 0"
# Runs train.py; process 1 gets a signal in a step of its first life.
SCRIPT = """
import os, signal, sys
import train
from sert_min import finetune
from sert_min.io import parallel
real, number, at = finetune.train_step, int(sys.argv[1]), int(sys.argv[2])
def signalling(model, optimizer, examples, step, *rest):
    if parallel.RANK == 1 and step == at and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), number)
    return real(model, optimizer, examples, step, *rest)
finetune.train_step = signalling
train.main(train.parse_args(sys.argv[3:]))
threads = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
print("left over:", [t for t in threads if "gloo" in t], file=sys.stderr)
"""


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """In the current folder: the script, a model, the runs `one` by one process and `two` by two."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("parallel"))
        Path("script.py").write_text(SCRIPT)
        make_tiny_model(Path("tiny"), n_embd=16, n_layer=1, n_head=2)
        run_one("one")
        done = run_two("two")
        # Threads of a process group that was not destroyed abort the interpreter's end now and then.
        assert done.returncode == 0 and done.stderr.count("left over: []") == 2, done.stderr
        yield


def run_one(out: str) -> None:
    start(train, *FLAGS.split(), "--report", 0, "--out-dir", out)


def run_two(out: str, number: int = 0, at: int = 0, restarts: int = 0):
    """torchrun with two processes; process 1 gets signal `number` at step `at`."""
    words = f"-m torch.distributed.run --nproc-per-node 2 --standalone --max-restarts {restarts}"
    words += f" script.py {number} {at} {FLAGS} --report 0 --out-dir {out}"
    given = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words.split()], **given)


def assert_close(a: str, b: str) -> None:
    """Without key biases: their gradient is rounding, and Adam turns that into whole steps."""
    x, y = (list(read_jsonl(Path(run, "metrics.jsonl"))) for run in (a, b))
    assert [r["step"] for r in x] == [r["step"] for r in y] == list(range(1, 10))
    assert all(abs(r["loss"] - s["loss"]) < 1e-5 for r, s in zip(x, y))
    x, y = (load_model(Path(run, "last")).state_dict() for run in (a, b))
    for name in x:
        if not name.endswith("c_attn.bias"):
            assert (x[name] - y[name]).abs().max() < 1e-5, name


def test_two_processes_equal_one():
    """Guards an example that is lost or counted twice, and a process without examples."""
    assert_close("one", "two")
    assert sorted(os.listdir("one")) == sorted(os.listdir("two"))


@pytest.mark.slow
def test_killed_process_is_restarted_and_ends_the_same():
    """Guards a restart that begins anew, or processes that go on from different states."""
    done = run_two("killed", number=9, at=6, restarts=1)
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr[-6000:]
    files = [Path(run, "last/model.safetensors").read_bytes() for run in ("two", "killed")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_stop_of_one_stops_all_and_one_process_continues():
    """Guards processes that stop at different steps, and another number of processes being refused."""
    done = run_two("stopped", number=15, at=4)
    assert done.returncode != 0 and done.stdout.count("saved at step") == 1
    assert "saved at step 4; continue with: torchrun --nproc-per-node 2" in done.stdout
    run_one("stopped")
    assert_close("stopped", "one")
    with lock_folder("stopped"):  # the other process must not wait for the one that is refused
        assert "another process is writing" in run_two("stopped").stderr
