"""10,000 questions through sample, train and evaluate: flat memory, no slowdown.

    PYTHONPATH=. python tests/long_run.py [10000]

The micro-world's questions, over and over under new ids, and a tiny random model. Fails if the last
thousand took half as long again as the second, or memory grew by more than 100 MB after the second.
"""

import argparse
import contextlib
import gc
import io
import itertools
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from conftest import make_tiny_model, start

import evaluate
import sample
import train
from sert_min import finetune, tasks


@contextlib.contextmanager
def watch(stage: str, owner, name: str):
    """Count what `owner.name` gets through (its third argument) and print a line per thousand."""
    done, lines, start, real = 0, [], time.perf_counter(), getattr(owner, name)

    def watched(*args, **kwargs):
        nonlocal done, start
        result = real(*args, **kwargs)
        before, done = done, done + len(args[2])
        if done // 1000 > before // 1000:
            gc.collect()
            pages = Path("/proc/self/statm").read_text().split()[1]  # resident
            seconds = time.perf_counter() - start
            lines.append((int(pages) * os.sysconf("SC_PAGESIZE") / 2**20, seconds))
            print(f"{stage:<10}{done:>8,}{lines[-1][0]:>10.0f} MB{seconds:>9.1f} s")
            start = time.perf_counter()
        return result

    setattr(owner, name, watched)
    yield
    early, late = lines[1], lines[-1]  # the first thousand sets things up
    assert late[0] < early[0] + 100, f"{stage}: memory grew from {early[0]:.0f} MB"
    assert late[1] < 1.5 * early[1] + 1, f"{stage}: it became slower"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("questions", nargs="?", type=int, default=10_000)
    n = p.parse_args().questions
    torch.set_num_threads(1)

    def many(*args, real=tasks.load, **more) -> list:
        """n questions with ids of their own."""
        cycle = enumerate(itertools.islice(itertools.cycle(real(*args, **more)), n))
        return [replace(q, id=f"{q.id}-{i:05d}") for i, q in cycle]

    tasks.load = many

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(place)
        make_tiny_model(Path("m"), n_embd=32, n_layer=1, n_head=2, n_positions=512)
        few = "--branches 2 --samples 2 --max-new-tokens 12"
        loose = "--patterns none --min-tokens 1 --max-rep2 1 --min-perplexity 0"
        learn = "--paths s/selected.jsonl --epochs 1 --report 0"
        for script, owner, name, flags in (
            (sample, sample, "sample_paths", f"--model m --out-dir s {few} {loose}"),
            (train, finetune, "train_step", f"--model m --out-dir t {learn}"),
            (evaluate, evaluate, "greedy", "--model t --out-dir e --max-new-tokens 12"),
        ):
            with watch(script.__name__, owner, name):
                start(script, "--device", "cpu", *flags.split())
        os.chdir("/")
    print("memory is flat, no stage became slower")


if __name__ == "__main__":
    main()
