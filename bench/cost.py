"""The least time that sampling, scoring and training can take, and a prediction of Table II from it.

Counts the operations and the bytes of each part and divides them by what a machine can do at most: its
peak rate of matrix products and its memory bandwidth; the larger of the two times is the part's floor.
A CPU's two numbers are measured here, a GPU's are its data sheet's. The floors assume no cleverness
below them: no quantisation, no speculation.

    python bench/cost.py                     # the tables of docs/cost.md
    python bench/cost.py --matrix            # only what runs/paper.sh would do, cell by cell
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

from bench.common import interleaved
from sert_min.kernels.fast import cpu

V, ROWS, SHARE = 50257, (25, 200, 1000), 25  # vocabulary; rows of the table; rows of a prompt
SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280)}  # layers, width
METHODS = ("finetune", "sert", "sert-rd", "rd")
TASKS = {  # train, test, tokens of a prompt, of a kept rationale, kept rationales, words of outputs
    "strategy_qa": (1603, 687, 17, 84, 875, 120),
    "commonsense_qa": (9741, 1221, 51, 28, 7377, 125),
}
PATHS, PATH, CAP, EPOCHS, ANSWER = 25, 85, 128, 20, 8  # PATH: mean tokens of a sampled path
JUDGE_IN, JUDGE_OUT = 420, 220  # tokens of a judge request and its reply


class Machine(NamedTuple):
    """What a machine can do at most, per second."""

    ops: float  # of products in its dtype
    fp32_ops: float
    bandwidth: float  # bytes
    wide: int = 2  # bytes of a number: bf16 2, fp32 4
    head_pieces: int = 3  # bf16 products that make a head as good as fp32's


GPUS = {"H100 SXM": Machine(989e12, 67e12, 3.35e12), "H200": Machine(989e12, 67e12, 4.8e12)}


def this_cpu() -> dict[str, Machine]:
    """One thread of this CPU: two large products, and a copy."""
    x, w = torch.randn(512, 1024), torch.randn(2048, 1024)
    xb, wb = x.bfloat16(), w.bfloat16()
    a = torch.empty(2**26)
    b = torch.ones_like(a)
    both = {"bf16": lambda: xb @ wb.T, "fp32": lambda: cpu.linear(x, w), "copy": lambda: a.copy_(b)}
    with torch.inference_mode():
        t = interleaved(both, 9)
    bf16, fp32 = (2 * 512 * 1024 * 2048 / t[name] for name in ("bf16", "fp32"))
    copied = 2 * a.nbytes / t["copy"]
    fp32 = Machine(fp32, fp32, copied, 4, 1)  # a CPU looks at the best tokens again instead
    return {"this CPU, fp32": fp32, "this CPU, bf16": Machine(bf16, fp32.ops, copied, 2, 1)}


# --- parts: (operations, bytes), and their seconds ------------------------------------------------


def sampling_step(size: str, rows: int, prompt: int, own: float, m: Machine, share: int = SHARE):
    """One decoding step of `rows` rows over rows / share prompts, `own` tokens of their own each."""
    L, C = SIZES[size]
    body, kv = 12 * L * C * C, 2 * C * L * m.wide  # parameters; bytes of a token's key and value
    pieces, wide = (m.head_pieces, 2) if m.wide == 2 else (1, 4)
    keys = (rows / share * prompt + rows * own) * kv  # bytes: a prompt's are read once for its rows
    return {
        "body": (2 * rows * body, m.wide * body),
        "head": (pieces * 2 * rows * V * C, pieces * wide * V * C),
        "attention": (4 * rows * C * L * (prompt + own), keys),
    }


def training_step(size: str, tokens: float, supervised: float, length: float, m: Machine):
    """One optimiser step: forward and twice as much backward. Adam reads weight, gradient and two
    moments and writes three of them, and the gradient is written once, all in fp32. The head is
    fp32 at any dtype, so its operations are counted in units of the machine's faster ones."""
    L, C = SIZES[size]
    parameters = 12 * L * C * C + V * C
    return {
        "body": (6 * tokens * 12 * L * C * C, 0),
        "head": (6 * supervised * V * C * m.ops / m.fp32_ops, 0),
        "attention": (12 * tokens * length * C * L, 0),
        "Adam": (0, 32 * parameters),
    }


def seconds(part: tuple[float, float], m: Machine) -> float:
    return max(part[0] / m.ops, part[1] / m.bandwidth)


def total(parts: dict, m: Machine) -> float:
    return sum(seconds(part, m) for part in parts.values())


def print_floors(name: str, m: Machine) -> None:
    """The floor of each part at three numbers of rows, what binds it, and from how many rows on the
    arithmetic binds it; then a training step at batch 8."""
    print(f"\n{name}: {m.ops / 1e12:.3g} Tflop/s, {m.bandwidth / 1e9:,.0f} GB/s; gpt2")
    print(f"  {'ms a step':<22}" + "".join(f"{f'{n:,} rows':>22}" for n in ROWS) + "   break-even")
    steps = {n: sampling_step("gpt2", n, 64, 32, m) for n in ROWS}
    for part in steps[ROWS[0]]:
        text = f"  {part:<22}"
        for n in ROWS:
            ops, moved = steps[n][part]
            binds = "arithmetic" if ops / m.ops > moved / m.bandwidth else "bytes"
            text += f"{seconds((ops, moved), m) * 1e3:>10.3g} {binds:<11}"
        (ops, moved), n = steps[ROWS[0]][part], ROWS[0]
        even = n * moved * m.ops / (ops * m.bandwidth)  # its bytes do not grow with the rows
        print(text + ("   at no number of rows" if part == "attention" else f"{even:>9,.0f} rows"))
    rates = {n: n / total(steps[n], m) for n in ROWS}
    print(f"  {'tokens a second':<22}" + "".join(f"{rates[n]:>10,.0f} {'':<11}" for n in ROWS))
    train = training_step("gpt2", 8 * 85, 8 * 36, 85, m)
    each = ", ".join(f"{k} {seconds(v, m) * 1e3:.3g}" for k, v in train.items())
    print(f"  training, batch 8: {total(train, m) * 1e3:.3g} ms a step ({each})")


# --- Table II -------------------------------------------------------------------------------------


def cell(task: str, method: str, limit: int | None) -> tuple[int, int, int]:
    """(tokens sampled, trained on, decoded greedily) of one cell; SERT+RD starts from SERT's."""
    train, test, prompt, rationale, kept, words = TASKS[task]
    if limit:
        train, test, kept = min(train, limit), min(test, limit), min(kept, limit)
    learnt = {"finetune": train * (prompt + ANSWER), "sert": train * (prompt + PATH + ANSWER)}
    learnt["rd"] = learnt["sert-rd"] = kept * (prompt + 7 + rationale + ANSWER)
    sampled = train * PATHS * PATH if method == "sert" else 0
    decoded = test * (ANSWER if method == "finetune" else words * 4 // 3)
    return sampled, EPOCHS * learnt[method], decoded


def cell_seconds(task: str, method: str, size: str, m: Machine, limit: int | None) -> float:
    """The floor of one cell: sampling at 1,000 rows (a CPU: 200), training at batch 8, greedy
    decoding at 256 rows."""
    n_train, _, prompt, rationale, _, _ = TASKS[task]
    sampled, trained, decoded = cell(task, method, limit)
    rows = 1000 if m in GPUS.values() else 200
    length = prompt + ANSWER + {"finetune": 0, "sert": PATH}.get(method, 7 + rationale)
    train = training_step(size, 8 * length, 4 * length, length, m)
    return (
        sampled / rows * total(sampling_step(size, rows, prompt, 43, m), m)
        + trained / (8 * length) * total(train, m)
        + decoded / 256 * total(sampling_step(size, 256, prompt, 64, m, share=1), m)
    )


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def print_matrix(args, m: Machine, name: str) -> None:
    """Tokens and predicted time of each cell, and what a judge would be asked."""
    print(f"\nTable II on {name} at {args.factor:g} times the floor (an assumption):")
    print(f"{'':<42}{'sampled':>13}{'trained on':>13}{'decoded':>11}   about")
    spent, judged = 0.0, 0
    for task in args.tasks:
        for model in args.models:
            size = model if model in SIZES else "gpt2"  # a folder's size is not known here
            for method in args.methods:
                tokens = cell(task, method, args.limit)
                about = args.factor * cell_seconds(task, method, size, m, args.limit)
                spent += about
                text = f"{task:<16}{model[-16:]:<17}{method:<9}"
                text += "".join(f"{n:>{w},}" for n, w in zip(tokens, (13, 13, 11)))
                print(f"{text}   {duration(about)}")
                judged += min(TASKS[task][1], args.limit or 10**6) if method != "finetune" else 0
    print(f"in all about {duration(spent)}; a judge would get {judged:,} requests for the outputs, "
          f"about {judged * JUDGE_IN:,} tokens in and {judged * JUDGE_OUT:,} out")  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--matrix", action="store_true", help="only the cells of Table II")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--models", nargs="+", default=list(SIZES))
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--limit", type=int, help="questions of each split")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="of the matrix")
    p.add_argument("--factor", type=float, default=3.0, help="time over floor (an assumption)")
    args = p.parse_args()
    here = this_cpu() if args.device == "cpu" or not args.matrix else {}
    for name, m in {} if args.matrix else (here | GPUS).items():
        print_floors(name, m)
    name = "an H200" if args.device == "cuda" else "one thread of this CPU, fp32"
    print_matrix(args, here["this CPU, fp32"] if args.device == "cpu" else GPUS["H200"], name)


if __name__ == "__main__":
    main()
