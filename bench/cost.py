"""The least time that sampling and training can take, and a prediction of Table II from it.

Counts the operations and the bytes of each part and divides them by what a machine can do at most: its
peak rate of matrix products and its memory bandwidth; the larger of the two times is the part's floor.
A CPU's two numbers are measured here, a GPU's are its data sheet's. The floors assume no cleverness
below them: no quantisation, no speculation.

    python bench/cost.py                     # the tables of docs/cost.md
    python bench/cost.py --matrix            # the prediction alone: runs/paper.sh on an H200, cell by cell
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

from bench.common import interleaved
from sert_min.kernels.fast import cpu

V, ROWS = 50257, (25, 200, 1000)  # vocabulary; rows of the table
SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280)}  # layers, width
METHODS = ("finetune", "sert", "sert-rd", "rd")
TASKS = {  # train, test, tokens of a prompt, of a kept rationale, kept rationales, words of outputs
    "strategy_qa": (1603, 687, 17, 84, 875, 120),
    "commonsense_qa": (9741, 1221, 51, 28, 7377, 125),
}
PATHS, PATH, EPOCHS, ANSWER = 25, 85, 20, 8  # PATH: mean tokens of a sampled path
FACTOR = 3  # of Table II: time over floor, an assumption


class Machine(NamedTuple):
    """What a machine can do at most, per second."""

    ops: float  # of products in bf16
    fp32_ops: float
    bandwidth: float  # bytes
    head_pieces: int = 3  # bf16 products that make a head as good as fp32's

    def seconds(self, ops: float, moved: float) -> float:
        return max(ops / self.ops, moved / self.bandwidth)

    def total(self, parts: dict) -> float:
        return sum(self.seconds(*part) for part in parts.values())


H200 = Machine(989e12, 67e12, 4.8e12)


def this_cpu() -> Machine:
    """One thread of this CPU: two large products, and a copy."""
    x, w = torch.randn(512, 1024), torch.randn(2048, 1024)
    xb, wb = x.bfloat16(), w.bfloat16()
    a, b = torch.ones(2, 2**26)
    both = {"bf16": lambda: xb @ wb.T, "fp32": lambda: cpu.linear(x, w), "copy": lambda: a.copy_(b)}
    with torch.inference_mode():
        t = interleaved(both, 9)
    ops = 2 * 512 * 1024 * 2048
    # a CPU looks at the best tokens again instead of computing all of them in three pieces
    return Machine(ops / t["bf16"], ops / t["fp32"], 2 * a.nbytes / t["copy"], head_pieces=1)


# --- parts: (operations, bytes) -------------------------------------------------------------------


def sampling_step(size: str, rows: int, prompt: int, own: float, m: Machine, share: int = PATHS):
    """One decoding step of `rows` rows over rows / share prompts, `own` tokens of their own each."""
    L, C = SIZES[size]
    body, keys = 12 * L * C * C, rows / share * prompt + rows * own  # a prompt's are read once
    return {
        "body": (2 * rows * body, 2 * body),
        "head": (m.head_pieces * 2 * rows * V * C, m.head_pieces * 2 * V * C),
        "attention": (4 * rows * C * L * (prompt + own), keys * 4 * C * L),
    }


def training_step(size: str, tokens: float, supervised: float, length: float, m: Machine):
    """One optimiser step: forward and twice as much backward. Adam reads weight, gradient and two
    moments and writes three of them, and the gradient is written once, all in fp32. The head is
    fp32, so its operations are counted in units of the machine's faster ones."""
    L, C = SIZES[size]
    return {
        "body": (6 * tokens * 12 * L * C * C, 0),
        "head": (6 * supervised * V * C * m.ops / m.fp32_ops, 0),
        "attention": (12 * tokens * length * C * L, 0),
        "Adam": (0, 32 * (12 * L * C * C + V * C)),
    }


def print_floors(name: str, m: Machine) -> None:
    """The floor of each part at three numbers of rows, what binds it, and from how many rows on the
    arithmetic binds it; then a training step at batch 8."""
    print(f"\n{name}: {m.ops / 1e12:.3g} Tflop/s, {m.bandwidth / 1e9:,.0f} GB/s; gpt2 in bf16")
    print(f"  {'ms a step':<12}" + "".join(f"{n:>16,} rows" for n in ROWS) + "   break-even")
    steps = {n: sampling_step("gpt2", n, 64, 32, m) for n in ROWS}
    for part, (ops, moved) in steps[ROWS[0]].items():
        even = ROWS[0] * moved * m.ops / (ops * m.bandwidth)  # its bytes do not grow with the rows
        print(f"  {part:<12}", end="")
        for ops, moved in (step[part] for step in steps.values()):
            binds = "arithmetic" if ops / m.ops > moved / m.bandwidth else "bytes"
            print(f"{m.seconds(ops, moved) * 1e3:>10.3g} {binds:<10}", end="")
        print("  at no number of rows" if part == "attention" else f"{even:>8,.0f} rows")
    train = training_step("gpt2", 8 * 85, 8 * 36, 85, m)
    each = ", ".join(f"{k} {m.seconds(*v) * 1e3:.3g}" for k, v in train.items())
    print(f"  training, batch 8: {m.total(train) * 1e3:.3g} ms a step ({each})")


# --- Table II -------------------------------------------------------------------------------------


def cell(task: str, size: str, method: str, limit: int | None) -> tuple[tuple, float]:
    """(tokens sampled, trained on, decoded greedily) of one cell, and its floor in seconds: sampling
    at 1,000 rows, training at batch 8, greedy decoding at 256 rows. SERT+RD starts from SERT's."""
    train, test, prompt, rationale, kept, words = TASKS[task]
    train, test, kept = (min(n, limit or n) for n in (train, test, kept))
    reasoning = {"finetune": 0, "sert": PATH}.get(method, 7 + rationale)
    length = prompt + reasoning + ANSWER
    sampled = train * PATHS * PATH if method == "sert" else 0
    trained = EPOCHS * length * (train if method in ("finetune", "sert") else kept)
    decoded = test * (ANSWER if method == "finetune" else words * 4 // 3)
    n, loss = 8 * length, 4 * length  # tokens of a batch, and those with a loss
    seconds = sampled / 1000 * H200.total(sampling_step(size, 1000, prompt, 43, H200))
    seconds += trained / n * H200.total(training_step(size, n, loss, length, H200))
    seconds += decoded / 256 * H200.total(sampling_step(size, 256, prompt, 64, H200, share=1))
    return (sampled, trained, decoded), seconds


def print_matrix(args) -> None:
    """Tokens and predicted minutes of each cell, and what a judge would be asked."""
    print(f"\nTable II on an H200 at {FACTOR} times the floor (an assumption):")
    print(f"{'':<42}{'sampled':>13}{'trained on':>13}{'decoded':>11}   about")
    spent, judged = 0.0, 0
    for task, model, method in itertools.product(args.tasks, args.models, args.methods):
        size = model if model in SIZES else "gpt2"  # a folder's size is not known here
        (sampled, trained, decoded), floor = cell(task, size, method, args.limit)
        print(f"{task:<16}{model[-16:]:<17}{method:<9}{sampled:>13,}{trained:>13,}{decoded:>11,}"
              f"   {FACTOR * floor / 60:.0f} min")  # fmt: skip
        spent += FACTOR * floor / 3600
        judged += min(TASKS[task][1], args.limit or 10**6) if method != "finetune" else 0
    print(f"in all about {spent:.1f} h; a judge would get {judged:,} requests for the outputs")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--matrix", action="store_true", help="only the cells of Table II")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--models", nargs="+", default=list(SIZES))
    p.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    p.add_argument("--limit", type=int, help="questions of each split")
    args = p.parse_args()
    if not args.matrix:
        print_floors("this CPU", this_cpu())
        print_floors("H100 SXM", H200._replace(bandwidth=3.35e12))
        print_floors("H200", H200)
    print_matrix(args)


if __name__ == "__main__":
    main()
