"""Everything that needs a GPU, in one command: tests first, then the benchmarks, one JSON.

python bench/gpu.py --out bench/results/NAME.json [--quick]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

from bench.common import ROOT, finish, machine

BENCHMARKS = ("kernels", "sampling", "training")


def run_tests() -> dict:
    """The tests that run on this GPU; what pytest said last."""
    names = ("kernels", "attention_triton", "generate", "gpt2", "finetune")
    files = [f"tests/test_{name}.py" for name in names]
    p = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, capture_output=True, text=True
    )
    print(p.stdout[-3000:])
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", p.stdout)
    return {"returncode": p.returncode, **{word: int(n) for n, word in found}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", default="bench/results/gpu.json")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA GPU here; nothing was measured")
    flags = ["--quick"] if args.quick else []
    result = {"machine": machine(), "tests": run_tests()}
    for name in BENCHMARKS:
        result[name] = run_benchmark(name, flags)
        finish(result, args.out)
    print(f"tests: {result['tests']}")
    print("; ".join(headlines(result)))


def run_benchmark(name: str, flags: list[str]) -> dict:
    """The figures of a benchmark; of one that fails, those it had by then and its error. A process
    of its own: a broken CUDA context must not lose the others' figures."""
    print(f"--- {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "figures.json"
        command = [sys.executable, f"bench/{name}.py", "--out", str(part), *flags]
        p = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        figures = json.loads(part.read_text()) if part.exists() else {}
    if p.returncode:
        figures["error"] = p.stderr[-2000:]
        print(figures["error"])
    return figures


def headlines(result: dict) -> list[str]:
    """One ratio of each benchmark; None where it failed."""
    rows = result["kernels"].get("rows", ())
    eager = [r["ratio"]["eager"] for r in rows if (r["from"], r["B"]) == ("logits", 1000)]
    shape = ("prompts", 1000, 64, "bfloat16")
    copies = [
        r["ratio"]["attention over copies"]
        for r in rows
        if (r["from"], r["B"], r.get("t"), r.get("dtype")) == shape
    ]
    sampling = result["sampling"].get("bf16", {}).get("ratio", {})
    peers = [r for name, r in sampling.items() if name.startswith("transformers")]
    training = result["training"].get("bf16, paths", {})
    return [
        f"kernels: ratio to PyTorch eager at 1,000 rows: {eager[0] if eager else None}",
        f"attention: ratio to PyTorch's over copied prompts: {copies[0] if copies else None}",
        f"sampling, bf16: ratio to transformers' best: {min(peers, default=None)}",
        f"training, bf16: ratio to transformers' best: {training.get('ratio_to_best')}",
    ]


if __name__ == "__main__":
    main()
