"""How sampling grows with its sizes, and what a second process and early rejection give.

processes   sample.py with two processes against one: the same bytes, how much faster
rejection   early rejection on the micro-world: selected paths per second with and without it, and
            verdicts that differ
growth      tokens/s against rows, prompt length, new tokens and model size, as a plot

    python bench/scaling.py --out bench/results/scaling-cpu.json --plot docs/growth.png  # 15 minutes
    python bench/scaling.py --quick --parts rejection,growth
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

from bench import sampling
from bench.common import ROOT, finish, interleaved, machine
from sert_min.io.files import read_jsonl

BASE = {"shape": "124M", "rows": 200, "prompt": 64, "new": 16}
GRID = {  # varied one at a time, the others as in BASE
    "rows": (25, 50, 100, 200, 400),
    "prompt": (16, 64, 256, 512),
    "new": (8, 32, 64, 128),
    "shape": ("quick", "124M", "355M", "774M"),
}
TITLES = ("rows decoded together", "prompt tokens", "new tokens", "model")


def run_sample(out: str, *flags: str, processes: int = 1) -> dict:
    """Run sample.py on the micro-world; seconds of sampling, tokens, verdicts, hash of the paths."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else [])]
    command += [str(ROOT / "sample.py"), "--out-dir", out, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    p = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if p.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{p.stderr[-2000:]}")
    folder = Path(out)
    paths = list(read_jsonl(folder / "paths.jsonl"))
    return {
        "seconds": sum(r["seconds"] for r in read_jsonl(folder / "timings.jsonl")),
        "tokens": sum(len(r["token_ids"]) for r in paths),
        "verdicts": [r["verdict"].split(":")[0] for r in paths],
        "sha256": hashlib.sha256((folder / "paths.jsonl").read_bytes()).hexdigest()[:16],
    }


def processes(quick: bool) -> dict:
    """Two processes against one, in turn, three times."""
    limit, rates, hashes = ["--limit", "128" if quick else "384"], {1: [], 2: []}, set()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1 if quick else 3):
            for n in rates:
                r = run_sample(f"{folder}/{n}-{i}", *limit, processes=n)
                rates[n].append(round(r["tokens"] / r["seconds"]))
                hashes.add(r["sha256"])
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[2]))
    return {"tokens_per_s": rates, "ratio": round(ratio, 2), "same_bytes": len(hashes) == 1}


def rejection(quick: bool) -> dict:
    """Early rejection on and off."""
    limit = ["--limit", "64"] if quick else []
    with tempfile.TemporaryDirectory() as folder:
        off = run_sample(f"{folder}/off", *limit)
        on = run_sample(f"{folder}/on", "--early-reject", *limit)
    rate = [r["verdicts"].count("selected") / r["seconds"] for r in (off, on)]
    return {
        "selected_per_s": {"off": round(rate[0], 2), "on": round(rate[1], 2)},
        "ratio": round(rate[1] / rate[0], 2),
        "tokens": {"off": off["tokens"], "on": on["tokens"]},
        "verdicts_that_differ": sum(a != b for a, b in zip(off["verdicts"], on["verdicts"])),
        "paths": len(on["verdicts"]),
    }


def growth(quick: bool, plot: str | None) -> dict:
    """Tokens/s along each axis of GRID, both dtypes."""
    base = {**BASE, "shape": "quick", "new": 8} if quick else BASE
    found: dict = {dtype: {axis: {} for axis in GRID} for dtype in sampling.DTYPES}
    for axis, values in GRID.items():
        for value in values[:2] if quick else values:
            at = {**base, axis: value}
            for dtype, kind in sampling.DTYPES.items():
                model = sampling.make_model(at["shape"]).cast_(kind)
                prompts = torch.randint(0, 50257, (at["rows"] // 25, at["prompt"])).tolist()
                run = sampling.ours(model, prompts, at["new"])
                spent = interleaved({"ours": run}, 1, warm_up=0)["ours"]
                found[dtype][axis][str(value)] = round(at["rows"] * at["new"] / spent, 1)
            rates = ", ".join(f"{d} {found[d][axis][str(value)]:,}" for d in found)
            print(f"  {axis} {value}: {rates}", flush=True)
    if plot:
        draw(found, base, plot)
        print(f"wrote {plot}")
    return {"base": base, "tokens_per_s": found}


def draw(found: dict, base: dict, out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 3))
    for ax, axis, title in zip(axes, GRID, TITLES):
        for dtype, marker in zip(found, "os"):
            points = found[dtype][axis]
            names = [name.replace("quick", "27M") for name in points]
            ax.plot(names, list(points.values()), marker=marker, label=dtype)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
        ax.set_yscale("log") if axis == "shape" else ax.set_ylim(bottom=0)
    axes[0].set_ylabel("tokens/s with log-probs")
    axes[0].legend()
    rest = "{shape}, {rows} rows, prompt {prompt}, {new} new tokens".format(**base)
    figure.suptitle(f"one thread; where not varied: {rest}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="small model, few points")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--plot", help="write the growth plot (PNG)")
    p.add_argument("--parts", default="processes,rejection,growth", help="default: %(default)s")
    args = p.parse_args(argv)
    parts = {
        "processes": lambda: processes(args.quick),
        "rejection": lambda: rejection(args.quick),
        "growth": lambda: growth(args.quick, args.plot),
    }
    result: dict = {"machine": machine()}
    print(result["machine"])
    for part in args.parts.split(","):
        result[part] = parts[part]()
        print(f"{part}: {result[part]}", flush=True)
        finish(result, args.out)
    if "processes" in result:
        print(f"ratio of two processes to one: {result['processes']['ratio']}")
    return result


if __name__ == "__main__":
    main()
