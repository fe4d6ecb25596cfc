"""10,000 questions through sample, train and evaluate: flat memory, no slowdown.

    PYTHONPATH=. python tests/long_run.py [--questions 10000]

The micro-world's questions, over and over under new ids, and a tiny random model. Prints memory and
time at each 1,000 questions and fails if the last thousand took half as long again as the second, or
memory grew by more than 100 MB after the second.
"""

import argparse
import contextlib
import gc
import io
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from conftest import make_tiny_model

import evaluate
import sample
import train
from sert_min import finetune, tasks


def many(questions: list, n: int) -> list:
    """n questions with ids of their own."""
    return [
        replace(questions[i % len(questions)], id=f"{questions[i % len(questions)].id}-{i:05d}")
        for i in range(n)
    ]


def memory() -> float:
    """Resident MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


class Watch:
    """Counts what `owner.name` gets through (its third argument) and prints a line per thousand."""

    def __init__(self, stage: str, owner, name: str):
        self.stage, self.done, self.lines = stage, 0, []
        self.owner, self.name, self.real = owner, name, getattr(owner, name)

    def __enter__(self):
        self.start = time.perf_counter()

        def watched(*args, **kwargs):
            result = self.real(*args, **kwargs)
            before, self.done = self.done, self.done + len(args[2])
            if self.done // 1000 > before // 1000:
                now = time.perf_counter()
                gc.collect()
                self.lines.append((memory(), now - self.start))
                print(
                    f"{self.stage:<10}{self.done:>8,}{memory():>10.0f} MB{now - self.start:>9.1f} s"
                )
                self.start = time.perf_counter()
            return result

        setattr(self.owner, self.name, watched)
        return self

    def __exit__(self, *error):
        setattr(self.owner, self.name, self.real)
        if error[0] is None:
            early, late = self.lines[1], self.lines[-1]  # the first thousand sets things up
            assert late[0] < early[0] + 100, f"{self.stage}: memory grew from {early[0]:.0f} MB"
            assert late[1] < 1.5 * early[1] + 1, f"{self.stage}: it became slower"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--questions", type=int, default=10_000)
    n = p.parse_args().questions
    torch.set_num_threads(1)
    real = tasks.load
    tasks.load = lambda task, split, data_dir=None: many(real(task, split, data_dir), n)

    def go(script, flags: str) -> None:
        script.main(script.parse_args(f"--device cpu {flags}".split()))

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(place)
        make_tiny_model(Path("m"), n_embd=32, n_layer=1, n_head=2, n_positions=512)
        few = "--branches 2 --samples 2 --max-new-tokens 12"
        loose = "--patterns none --min-tokens 1 --max-rep2 1 --min-perplexity 0"
        with Watch("sample", sample, "sample_paths"):
            go(sample, f"--model m --out-dir s {few} {loose}")
        with Watch("train", finetune, "train_step"):
            go(train, "--model m --out-dir t --paths s/selected.jsonl --epochs 1 --report 0")
        with Watch("evaluate", evaluate, "greedy"):
            go(evaluate, "--model t --out-dir e --max-new-tokens 12")
        os.chdir("/")
    print("memory is flat, no stage became slower")


if __name__ == "__main__":
    main()
