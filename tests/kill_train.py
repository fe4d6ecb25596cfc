"""SIGKILL train.py anywhere and repeat it: the weights and metrics of an uninterrupted run.

    PYTHONPATH=. python tests/kill_train.py [--kills 40] [--seed 0] [--timed 10]

Each run is a forked child that traces the lines of finetune.py, train.py, gpt2.py and store.py and
kills itself at one of them, chosen at random inside a phase that is chosen in turn; `--timed` more
are killed from outside after a random time, wherever they are. After a few kills a run may end;
then its weights, metrics and best checkpoint are compared. Prints a table of kills per phase.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import make_tiny_model
from safetensors.torch import load_file

import train
from sert_min import finetune, gpt2, store

FILES = {module.__file__ for module in (finetune, train, gpt2, store)}
# innermost known function on the stack -> phase
PHASES = {
    "train_step": "step",
    "save_state": "state write",
    "note": "metrics line",
    "mean_loss": "validation",
    "greedy_records": "validation",
    "validate": "validation",
    "save_model": "checkpoint write",
    "load_state": "resume",
    "keep_metrics_before": "resume",
    "fit": "loop",
}
SHOWN = ("step", "loop", "metrics line", "state write", "validation", "checkpoint write", "resume")


def phase_of(frame) -> str | None:
    while frame is not None:
        if frame.f_code.co_name in PHASES and frame.f_code.co_filename in FILES:
            return PHASES[frame.f_code.co_name]
        frame = frame.f_back
    return None


def run_child(model: Path, out: Path, kill_at: tuple | None = None, after: float | None = None):
    """One `train.py` in a forked child; (its wait status, lines seen per phase or where it died)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        seen = Counter()

        def on_line(frame, event, arg):
            if event == "line" and (phase := phase_of(frame)):
                seen[phase] += 1
                if (phase, seen[phase]) == kill_at:
                    os.write(write, f"{frame.f_code.co_name}:{frame.f_lineno}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
            return on_line

        if after is None:
            sys.settrace(lambda f, e, a: on_line if f.f_code.co_filename in FILES else None)
        flags = "--method finetune --limit 24 --epochs 2 --batch-size 4 --holdout --report 0"
        flags += f" --save-seconds 0 --model {model} --out-dir {out}"
        try:
            train.main(train.parse_args(flags.split()))
            os.write(write, repr(dict(seen)).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(read) as f:
        return status, f.read()


def same(a: Path, b: Path) -> bool:
    """Equal weights (last and best) and byte-identical metrics."""
    for name in ("last", "best"):
        x, y = (load_file(p / name / "model.safetensors") for p in (a, b))
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
            return False
    return (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def kill_and_compare(folder: Path, kills: int, timed: int, seed: int = 0, say=print) -> Counter:
    """Kill runs `kills` + `timed` times in chains; assert that each chain ends like the whole run.
    Returns kills per phase."""
    rng, done = random.Random(seed), Counter()
    train.VALIDATE, train.greedy_cap = 2, lambda task: 6  # quick validations
    model = make_tiny_model(folder / "tiny", n_embd=16, n_layer=1, n_head=2)
    import matplotlib.pyplot  # noqa: F401 (slow imports once here, not in every child)

    gpt2.load_model(model)
    start = time.perf_counter()
    status, lines = run_child(model, folder / "whole")
    assert status == 0, "the uninterrupted run failed"
    whole, seconds = eval(lines), time.perf_counter() - start
    jobs = [SHOWN[i % len(SHOWN)] for i in range(kills)] + ["timed"] * timed
    rng.shuffle(jobs)
    chain, out = 0, folder / "chain0"
    while jobs:
        for job in jobs[: 1 + rng.randrange(4)]:
            if job == "timed":
                status, where = run_child(model, out, after=rng.uniform(0, seconds))
            else:
                # squared: after a resume fewer lines are left than in the whole run
                at = 1 + int(whole[job] * rng.random() ** 2)
                status, where = run_child(model, out, (job, at))
            if os.WIFSIGNALED(status):
                jobs.remove(job)
                done[job] += 1
                say(f"chain {chain}: killed in {job}{' at ' + where if where else ''}")
            else:
                assert status == 0, f"a run failed with status {status} in chain {chain}"
                break  # it came to its end before the line: compare, then try again
        status, _ = run_child(model, out)
        assert status == 0, f"chain {chain} can't be continued"
        assert same(folder / "whole", out), f"chain {chain} ended differently"
        shutil.rmtree(out)
        chain += 1
        out = folder / f"chain{chain}"
    say(f"{chain} chains, all equal to the uninterrupted run")
    return done


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=40)
    p.add_argument("--timed", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        done = kill_and_compare(Path(folder), args.kills, args.timed, args.seed)
    for phase, n in done.items():
        print(f"{phase:<18}{n:>4} kills")
    print(f"{sum(done.values())} kills, no difference")


if __name__ == "__main__":
    main()
