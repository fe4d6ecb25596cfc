"""The least time that sampling, scoring and training can take, per model size and machine.

Counts operations and bytes of each part and divides them by what a machine can do at most: its peak
of matrix products and its memory bandwidth. A CPU's two numbers are measured here; a GPU's are its
data sheet's. No cleverness below the floor is assumed: no quantisation, no speculation.

    python bench/cost.py                     # the tables of docs/cost.md
    python bench/cost.py --factor 2.5        # the matrix of Table II at 2.5 times the floor
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

from bench.common import finish, interleaved, machine
from kernels import cpu
from runs.estimate import EPOCHS, TASKS, cell, hours

V = 50257
METHODS = ("finetune", "sert", "sert-rd", "rd")
SIZES = {  # layers, width
    "gpt2": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
}
# Peak operations per second (bf16 dense, fp32) and bytes per second, from the makers' data sheets.
GPUS = {"H100 SXM": (989e12, 67e12, 3.35e12), "H200": (989e12, 67e12, 4.8e12)}


def this_cpu() -> tuple[float, float, float]:
    """The same three numbers of one thread here: two large products, and a copy."""
    x, w = torch.randn(512, 1024), torch.randn(2048, 1024)
    xb, wb = x.bfloat16(), w.bfloat16()
    a = torch.empty(2**26)
    b = torch.ones_like(a)
    with torch.inference_mode():
        t = interleaved(
            {
                "bf16": lambda: xb @ wb.T,
                "fp32": lambda: cpu.linear(x, w),
                "copy": lambda: a.copy_(b),
            },
            9,
        )
    ops = 2 * 512 * 1024 * 2048
    return ops / t["bf16"], ops / t["fp32"], 2 * a.nbytes / t["copy"]


def sampling_step(
    size: str,
    rows: int,
    prompt: int,
    own: float,
    peak,
    fp32_peak,
    bandwidth,
    wide=2,
    pieces=3,
    share=25,
) -> dict[str, float]:
    """Seconds of one decoding step, by part: `rows` rows over rows / share prompts, `own` tokens of
    their own on average; `wide` bytes per number (bf16: 2, fp32: 4). The head's logits need fp32's
    accuracy: `pieces` bf16 products are counted for it, one fp32 product where that is quicker."""
    L, C = SIZES[size]
    top = peak if wide == 2 else fp32_peak
    body = 12 * L * C * C
    kv = 2 * C * L * wide  # keys and values of one token
    attention = 4 * rows * C * L * (prompt + own)
    return {
        "body": max(2 * rows * body / top, wide * body / bandwidth),
        "head": head_seconds(rows, C, top, fp32_peak, bandwidth, wide, pieces),
        "attention": max(attention / top, (rows / share * prompt + rows * own) * kv / bandwidth),
    }


def head_seconds(rows, C, top, fp32_peak, bandwidth, wide, pieces) -> float:
    """The product with the head, in fp32 or in so many bf16 pieces."""
    ways = [(1, fp32_peak, 4)] + [(pieces, top, 2)] * (wide == 2)
    return min(
        n * max(2 * rows * V * C / speed, width * V * C / bandwidth) for n, speed, width in ways
    )


def scoring(
    size: str, tokens: int, peak, fp32_peak, bandwidth, wide=2, pieces=3
) -> dict[str, float]:
    """Seconds to score `tokens` given tokens in one forward."""
    L, C = SIZES[size]
    top = peak if wide == 2 else fp32_peak
    return {
        "body": max(2 * tokens * 12 * L * C * C / top, wide * 12 * L * C * C / bandwidth),
        "head": head_seconds(tokens, C, top, fp32_peak, bandwidth, wide, pieces),
    }


def training_step(
    size: str, tokens: float, supervised: float, length: float, peak, fp32_peak, bandwidth, wide=2
) -> dict[str, float]:
    """Seconds of one optimiser step: forward and twice as much backward; Adam reads weight,
    gradient and two moments and writes three of them, and the gradient is written once, in
    fp32. The head is fp32 at any dtype."""
    L, C = SIZES[size]
    top = peak if wide == 2 else fp32_peak
    parameters = 12 * L * C * C + V * C
    return {
        "body": 6 * tokens * 12 * L * C * C / top,
        "head": 6 * supervised * V * C / fp32_peak,
        "attention": 6 * 2 * tokens * length * C * L / top,
        "optimiser": 8 * 4 * parameters / bandwidth,
    }


def ms(parts: dict[str, float]) -> str:
    each = ", ".join(f"{k} {v * 1e3:.3g}" for k, v in parts.items())
    return f"{sum(parts.values()) * 1e3:9.3g}   ({each})"


def floors(machines: dict) -> dict:
    """Print and return the floors of every size on every machine."""
    found = {}
    for name, (peak, fp32, bandwidth, wide, rows) in machines.items():
        hw = (peak, fp32, bandwidth, wide)
        pieces = 1 if "CPU" in name else 3  # a CPU looks at the best tokens again instead
        print(f"\n{name}: {(peak if wide == 2 else fp32) / 1e12:.3g} Tflop/s, "
              f"{bandwidth / 1e9:,.0f} GB/s")  # fmt: skip
        for size in SIZES:
            step = sampling_step(size, rows, 64, 32, *hw, pieces)
            score = scoring(size, 8192, *hw, pieces)
            train = training_step(size, 8 * 64, 8 * 9, 64, *hw)
            rate = rows / sum(step.values())
            print(f"  {size:<12} sampling, {rows} rows, ms a step {ms(step)}  {rate:,.0f} tokens/s")
            print(f"  {'':<12} scoring 8,192 tokens, ms {ms(score)}")
            print(f"  {'':<12} training, batch 8, ms a step {ms(train)}")
            found[f"{name} {size}"] = {"sampling": step, "scoring": score, "training": train}
    return found


def cell_seconds(task: str, method: str, size: str) -> float:
    """The floor of one cell of Table II on an H200 in bf16: sampling at 1,000 rows, training at
    batch 8, greedy decoding of the test set at 256 rows."""
    peak, fp32, bandwidth = GPUS["H200"]
    n_train, _, prompt, _, kept, _ = TASKS[task]
    sampled, trained, decoded = cell(task, method, None)
    examples = EPOCHS * (kept if "rd" in method else n_train)
    length = trained / examples
    sample = sampling_step(size, 1000, prompt, 43, peak, fp32, bandwidth)
    train = training_step(size, 8 * length, 8 * length / 2, length, peak, fp32, bandwidth)
    greedy = sampling_step(size, 256, prompt, 64, peak, fp32, bandwidth, share=1)
    steps = (sampled / 1000, examples / 8, decoded / 256)
    return sum(n * sum(t.values()) for n, t in zip(steps, (sample, train, greedy)))


def matrix(factor: float) -> None:
    """Time of Table II's cells on one H200, and of all on eight, a cell to a GPU."""
    print(f"\nTable II on an H200 at {factor} times the floor:")
    print(f"  {'':<29}" + "".join(f"{m:>10}" for m in METHODS))
    total, longest = 0.0, 0.0
    for task in TASKS:
        for size in list(SIZES)[:3]:
            seconds = [factor * cell_seconds(task, m, size) for m in METHODS]
            total += sum(seconds)
            longest = max(longest, seconds[1] + seconds[2], seconds[3])  # SERT+RD starts from SERT
            print(f"  {task:<16}{size:<13}" + "".join(f"{hours(s):>10}" for s in seconds))
    print(f"  one GPU: {hours(total)}; eight: {hours(max(total / 8, longest))}")


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="no difference here")
    p.add_argument("--out", help="write the floors as JSON")
    p.add_argument("--factor", type=float, default=3.0, help="time over floor (an assumption)")
    args = p.parse_args(argv)
    peak, fp32, bandwidth = this_cpu()
    machines = {
        "this CPU, one thread, fp32": (peak, fp32, bandwidth, 4, 200),
        "this CPU, one thread, bf16": (peak, fp32, bandwidth, 2, 200),
        **{name: (*numbers, 2, 1000) for name, numbers in GPUS.items()},
    }
    result = {"machine": machine(), "floors": floors(machines)}
    matrix(args.factor)
    finish(result, args.out)
    step = result["floors"]["H200 gpt2"]["sampling"]
    print(f"floor on an H200: {1000 / sum(step.values()):,.0f} tokens/s of gpt2 at 1,000 rows")
    return result


if __name__ == "__main__":
    main()
