"""Everything that needs a GPU, in one command: tests first, then every benchmark, one JSON.

python bench/gpu.py --out bench/results/NAME.json [--quick]
"""

import argparse
import importlib
import re
import subprocess
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch

from bench.common import ROOT, finish, machine


def run_tests() -> dict:
    """The kernel, sampler and model tests on this GPU; what pytest said last."""
    files = ["tests/test_kernels.py", "tests/test_generate.py", "tests/test_gpt2.py"]
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
    for name in ("kernels",):
        try:
            result[name] = importlib.import_module(f"bench.{name}").main(flags)
        except (Exception, SystemExit):  # one failure must not lose the others' figures
            result[name] = {"error": traceback.format_exc()[-2000:]}
            print(result[name]["error"])
        finish(result, args.out)
    print(f"tests: {result['tests']}")
    rows = result["kernels"].get("rows", ())
    ratio = next(
        (r["ratio"]["eager"] for r in rows if (r["from"], r["B"]) == ("logits", 1000)), None
    )
    print(f"ratio to PyTorch eager at 1,000 rows: {ratio}")


if __name__ == "__main__":
    main()
