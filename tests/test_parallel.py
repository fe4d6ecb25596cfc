"""parallel.py under a real torchrun: two processes against one, killed, stopped, continued by one.

Key biases are left out of comparisons of weights: softmax does not see them, their gradient is
rounding around zero, and Adam turns that into whole steps."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_tiny_model

import train
from sert_min.io import parallel
from sert_min.io.files import lock_folder, read_json, read_jsonl
from sert_min.models import load_model

# Five batches of 4, 4, 1 examples an epoch: process 1 has no example in the last of each.
FLAGS = "--method finetune --limit 9 --batch-size 4 --epochs 3 --report 0 --save-seconds 0"
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the script, a tiny model, and `one` and `two`: the run by one process and by two."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "script.py").write_text(SCRIPT)
    make_tiny_model(folder / "tiny", n_embd=16, n_layer=1, n_head=2)
    run_one(folder, "one")
    done = run_two(folder, "two")
    assert done.returncode == 0, done.stderr[-6000:]
    # Threads of a process group that was not destroyed abort the interpreter's end now and then.
    assert done.stderr.count("left over: []") == 2, done.stderr[-6000:]
    return folder


def flags(folder, out: str) -> list[str]:
    return [*FLAGS.split(), "--model", str(folder / "tiny"), "--out-dir", str(folder / out)]


def run_one(folder, out: str) -> None:
    train.main(train.parse_args(flags(folder, out)))


def run_two(folder, out: str, number: int = 0, at: int = 0, restarts: int = 0):
    """torchrun with two processes; process 1 gets signal `number` at step `at`."""
    words = f"-m torch.distributed.run --nproc-per-node 2 --standalone --max-restarts {restarts}"
    command = [sys.executable, *words.split(), str(folder / "script.py"), str(number), str(at)]
    command += flags(folder, out)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_close(a, b) -> None:
    """Losses and weights of two runs agree within rounding."""
    x, y = (list(read_jsonl(f / "metrics.jsonl")) for f in (a, b))
    assert [r["step"] for r in x] == [r["step"] for r in y] == list(range(1, 10))
    assert all(abs(r["loss"] - s["loss"]) < 1e-5 for r, s in zip(x, y))
    x, y = (load_model(f / "last").state_dict() for f in (a, b))
    for name in x:
        difference = (x[name] - y[name]).abs()
        if name.endswith("c_attn.bias"):
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max() < 1e-5, name


def test_one_process_needs_no_torch_distributed():
    """Guards a plain run that opens sockets."""
    parallel.start()
    assert parallel.WORLD == 1 and not torch.distributed.is_initialized()
    total = torch.ones(())
    parallel.sum_up(total, [])
    assert total == 1 and parallel.largest(7) == 7 and parallel.process_0_first(lambda: 3) == 3


def test_two_processes_equal_one(folder):
    """Guards a mean of means, an example that is lost or counted twice, gradients that are not
    summed, and a process without examples. Guards two processes writing the same file."""
    assert_close(folder / "one", folder / "two")
    assert sorted(p.name for p in (folder / "two").iterdir()) == sorted(
        p.name for p in (folder / "one").iterdir()
    )


@pytest.mark.slow
def test_killed_process_is_restarted_and_ends_the_same(folder):
    """Guards a restart that begins anew, or processes that go on from different states: the same
    bytes as an undisturbed run of two."""
    done = run_two(folder, "killed", number=9, at=6, restarts=1)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "going on from step" in done.stdout
    a, b = (load_model(folder / name / "last").state_dict() for name in ("two", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_stop_of_one_stops_all_and_one_process_continues(folder):
    """Guards processes that stop at different steps (the others would wait for ever), and another
    number of processes being refused."""
    done = run_two(folder, "stopped", number=15, at=4)
    assert done.returncode != 0
    assert "saved at step 4; continue with: torchrun --nproc-per-node 2" in done.stdout
    assert done.stdout.count("saved at step") == 1
    state = folder / "stopped" / "state" / "step-00000004" / "state.json"
    assert read_json(state)["step"] == 4
    run_one(folder, "stopped")
    assert_close(folder / "stopped", folder / "one")


@pytest.mark.slow
def test_locked_folder_ends_all(folder):
    """Guards processes that wait for a process 0 which was refused."""
    with lock_folder(folder / "locked"):
        done = run_two(folder, "locked")
    assert done.returncode != 0 and "another process is writing" in done.stderr
