"""How the cost of sampling grows, and what processes and early rejection give.

memory      peak memory of sampling against the sum of what it must hold
processes   sample.py with two processes against one: the same bytes, how much faster
rejection   early rejection on the micro-world: selected paths per second with and without,
            verdicts that differ, and what the test costs where it rejects nothing
growth      tokens/s against rows, prompt length, new tokens and model size, as a plot

python bench/scaling.py --out bench/results/scaling-cpu.json --plot docs/growth.png  # 15 minutes
python bench/scaling.py --quick --parts rejection,growth
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

import sample
from bench import sampling
from bench.common import ROOT, finish, interleaved, machine
from kernels.attention import CHUNK
from sert_min.generate import sample_block
from sert_min.io.files import read_jsonl
from sert_min.prompts import question_prompt

PARTS = ("memory", "processes", "rejection", "growth")
BASE = {"shape": "124M", "rows": 200, "prompt": 64, "new": 16}
GRID = {  # one at a time, the others as in BASE
    "rows": (25, 50, 100, 200, 400),
    "prompt": (16, 64, 256, 512),
    "new": (8, 32, 64, 128),
    "shape": ("quick", "124M", "355M", "774M"),
}


# --- memory ---------------------------------------------------------------------------------------


def computed_bytes(model, rows: int, prompts: int, prompt: int, new: int) -> dict[str, int]:
    """What a block of plain samples holds in fp32: weights, keys and values, the largest scratch."""
    c = model.config
    one = 2 * c.n_layer * c.n_embd * 4  # keys and values of one token
    own = -(-new // CHUNK) * CHUNK
    return {
        "weights": model.n_params() * 4,
        "prompts": prompts * prompt * one,
        "own tokens": rows * own * one,
        "scratch": 3 * 4 * max(prompts * prompt, rows) * 4 * c.n_embd,  # 3 at a time in an MLP
    }


def memory(quick: bool) -> dict:
    """Peak resident memory above that of the imports; call it first in a process."""
    shape, new = ("quick", 32) if quick else ("124M", 64)
    before = resident_bytes()
    model = sampling.make_model(shape)
    prompts = torch.randint(0, 50257, (8, 64)).tolist()
    sampling.ours(model, prompts, new)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    parts = computed_bytes(model, 200, 8, 64, new)
    return {
        "shape": shape,
        "computed_mb": {k: round(v / 1e6) for k, v in parts.items()},
        "computed_total_mb": round(sum(parts.values()) / 1e6),
        "peak_mb": round(peak / 1e6),
        "ratio": round(peak / sum(parts.values()), 3),
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- whole runs of sample.py ----------------------------------------------------------------------


def run_sample(out: str, *flags: str, processes: int = 1) -> dict:
    """Run sample.py on the micro-world; seconds of sampling, selected paths, hash, verdicts."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = command if processes > 1 else [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "sample.py"), "--out-dir", out, *flags]
    p = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if p.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{p.stderr[-2000:]}")
    folder = Path(out)
    spent = [r for r in read_jsonl(folder / "timings.jsonl")]
    paths = list(read_jsonl(folder / "paths.jsonl"))
    return {
        "seconds": sum(r["seconds"] for r in spent),
        "tokens": sum(len(r["token_ids"]) for r in paths),
        "selected": sum(r["verdict"] == "selected" for r in paths),
        "verdicts": [r["verdict"].split(":")[0] for r in paths],
        "sha256": hashlib.sha256((folder / "paths.jsonl").read_bytes()).hexdigest()[:16],
    }


def processes(quick: bool) -> dict:
    """Two processes against one, in turn, three times."""
    limit = ["--limit", "128" if quick else "384"]
    rates, hashes = {1: [], 2: []}, set()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1 if quick else 3):
            for n in rates:
                r = run_sample(f"{folder}/{n}-{i}", *limit, processes=n)
                rates[n].append(r["tokens"] / r["seconds"])
                hashes.add(r["sha256"])
    ratios = sorted(b / a for a, b in zip(rates[1], rates[2]))
    return {
        "tokens_per_s": {n: [round(x) for x in r] for n, r in rates.items()},
        "ratio": round(ratios[len(ratios) // 2], 2),
        "same_bytes": len(hashes) == 1,
    }


def rejection(quick: bool) -> dict:
    """Early rejection on and off, and the cost of its test where nothing is rejected."""
    limit = ["--limit", "64"] if quick else []
    with tempfile.TemporaryDirectory() as folder:
        off = run_sample(f"{folder}/off", *limit)
        on = run_sample(f"{folder}/on", "--early-reject", *limit)
    rate = {k: r["selected"] / r["seconds"] for k, r in (("off", off), ("on", on))}
    return {
        "selected_per_s": {k: round(x, 2) for k, x in rate.items()},
        "ratio": round(rate["on"] / rate["off"], 2),
        "tokens": {"off": off["tokens"], "on": on["tokens"]},
        "verdicts_that_differ": sum(a != b for a, b in zip(off["verdicts"], on["verdicts"])),
        "paths": len(on["verdicts"]),
        "cost_where_nothing_is_rejected": rejection_overhead(quick),
    }


def rejection_overhead(quick: bool) -> float:
    """Time with the test made for each token and never heeded, over time without it, minus 1."""
    run = sample.prepare(sample.parse_args(["--early-reject"]))
    questions = run.questions[:32]
    prompts = [run.tokenizer.encode(question_prompt(q, run.suffix)) for q in questions]
    names = [f"{q.task}/{q.id}" for q in questions]
    test = sample.early_reject(questions, run.tokenizer, run.settings["early_reject"])

    def block(reject):
        return lambda: sample_block(run.model, run.tokenizer, prompts, names, run.s, reject)

    candidates = {"without": block(None), "with": block(lambda row: test(row) and False)}
    t = interleaved(candidates, 3 if quick else 9)
    return round(t["with"] / t["without"] - 1, 4)


# --- growth ---------------------------------------------------------------------------------------


def tokens_per_second(shape: str, rows: int, prompt: int, new: int, dtype: str) -> float:
    model = sampling.make_model(shape).cast_(sampling.DTYPES[dtype])
    prompts = torch.randint(0, 50257, (rows // 25, prompt)).tolist()
    return rows * new / sampling.seconds(sampling.ours(model, prompts, new))


def growth(quick: bool, plot: str | None) -> dict:
    """Tokens/s along each axis of GRID, both dtypes."""
    base = {**BASE, "shape": "quick", "new": 8} if quick else BASE
    found: dict = {dtype: {axis: {} for axis in GRID} for dtype in sampling.DTYPES}
    for axis, values in GRID.items():
        for value in values[:2] if quick else values:
            for dtype in sampling.DTYPES:
                rate = tokens_per_second(**{**base, axis: value}, dtype=dtype)
                found[dtype][axis][str(value)] = round(rate, 1)
            print(f"  {axis} {value}: " + ", ".join(
                f"{d} {found[d][axis][str(value)]:,}" for d in found), flush=True)  # fmt: skip
    if plot:
        draw(found, base, plot)
        print(f"wrote {plot}")
    return {"base": base, "tokens_per_s": found}


def draw(found: dict, base: dict, out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "rows": "rows decoded together",
        "prompt": "prompt tokens",
        "new": "new tokens",
        "shape": "model",
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=False)
    for ax, (axis, title) in zip(axes, titles.items()):
        for dtype, marker in zip(found, "os"):
            points = found[dtype][axis]
            names = [name.replace("quick", "27M") for name in points]
            ax.plot(names, list(points.values()), marker=marker, label=dtype)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
        if axis == "shape":
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
    axes[0].set_ylabel("tokens/s with log-probs")
    axes[0].legend()
    rest = (
        f"{base['shape']}, {base['rows']} rows, prompt {base['prompt']}, {base['new']} new tokens"
    )
    figure.suptitle(f"one thread; where not varied: {rest}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="small model, few points")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--plot", help="write the growth plot (PNG)")
    p.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    args = p.parse_args(argv)
    result: dict = {"machine": machine()}
    print(result["machine"])
    for part in args.parts.split(","):
        print(part, flush=True)
        f = {"memory": memory, "processes": processes, "rejection": rejection}.get(part)
        result[part] = f(args.quick) if f else growth(args.quick, args.plot)
        print(f"  {result[part]}", flush=True)
        finish(result, args.out)
    if "processes" in result:
        print(f"ratio of two processes to one: {result['processes']['ratio']}")
    if "rejection" in result:
        print(f"ratio of selected paths/s by early rejection: {result['rejection']['ratio']}")
    return result


if __name__ == "__main__":
    main()
