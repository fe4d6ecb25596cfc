"""Everything that needs a GPU, in parts: does it start, is it right, how fast is it.

    python bench/gpu.py --out bench/results/NAME.json [--quick] [--only start,decoder=60,..]

Each part is a process of its own with a time limit, its output is shown as it comes, and its figures
stand in a file of its own beside --out (NAME-kernels.json, ..) after every row: what was measured
before a failure, a time limit or a kill is kept. --out holds all parts so far.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
from bench.common import DEVICE, ROOT, finish, machine, parser

SECONDS = {  # time limit of each part, in order of use
    "start": 120, "decoder": 120, "tests": 240, "kernels": 300, "sampling": 300, "training": 300,
}  # fmt: skip
PYTEST = ["-m", "pytest", "-vv", "-rfEsP", "-p", "no:cacheprovider", "--durations=3"]
TESTS = {
    "decoder": ["tests/test_gpu.py"],
    # without those that do not touch the GPU
    "tests": ["tests/test_kernels.py", "tests/test_attention_triton.py", "-n4",
              "-k", "not compiles and not pieces and not order_of_programs"],
}  # fmt: skip


def run(command: list[str], seconds: float) -> tuple[list[str], dict]:
    """Run a Python command in the repository, showing its output as it comes; its lines, and how it
    went: seconds, and an error if it failed or ran out of time."""
    start, lines = time.perf_counter(), []
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    limited = ["timeout", "--signal=KILL", f"{seconds:g}", sys.executable, "-u", *command]
    with subprocess.Popen(limited, cwd=ROOT, **given) as p:
        for line in p.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    how = {"seconds": round(time.perf_counter() - start, 1)}
    if code := p.returncode:
        late = f"stopped after {seconds:g} s or " if code in (-9, 137) else ""
        how["error"] = f"{late}exit status {code}: " + "\n".join(lines[-12:])[-2000:]
    return lines, how


def run_part(name: str, part: Path, quick: bool, seconds: float) -> dict:
    """The figures of a part; of one that fails or is stopped, those it had by then, and why."""
    print(f"--- {name}", flush=True)
    if name == "start":
        figures = run_start(seconds)
    elif name in TESTS:
        lines, how = run([*PYTEST, *TESTS[name]], seconds)
        line = r"^(?:\S+::|\[gw).* (PASSED|FAILED|ERROR|SKIPPED)\b"  # of one process, of several
        figures = {**Counter(m.lower() for x in lines for m in re.findall(line, x)), **how}
    else:
        flags = ["--quick"] if quick else []
        _, how = run([f"bench/{name}.py", "--out", str(part), *flags], seconds)
        figures = (json.loads(part.read_text()) if part.exists() else {}) | how
    finish(figures, str(part))
    return figures


def run_start(seconds: float) -> dict:
    """sample.py on the micro-world, on the CPU and on the GPU in both dtypes: what it selects, and
    how many paths differ from the CPU's."""
    figures, tokens = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
            name = f"{device}-{dtype}"
            flags = ["--device", device, "--dtype", dtype, "--out-dir", f"{folder}/{name}"]
            lines, how = run(["sample.py", *flags], seconds / 3)
            figures[name] = how | {"paths": next((x for x in lines if "paths passed" in x), None)}
            path = Path(folder) / name / "paths.jsonl"
            found = path.read_text().splitlines() if path.exists() else []
            tokens[name] = [json.loads(x)["token_ids"] for x in found]
            pairs = list(zip(tokens[name], tokens["cpu-fp32"]))
            figures[name] |= {"rows": len(pairs), "rows_differ": sum(a != b for a, b in pairs)}
    return figures


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--only", default=",".join(SECONDS), help="NAME or NAME=SECONDS, by comma")
    p.set_defaults(out="bench/results/gpu.json")
    args = p.parse_args()
    parts = dict((x.split("=") + [""])[:2] for x in args.only.split(","))
    if unknown := set(parts) - set(SECONDS):
        raise SystemExit(f"error: --only knows {', '.join(SECONDS)}, not {', '.join(unknown)}")
    if DEVICE == "cpu":
        raise SystemExit("error: no CUDA GPU here; nothing was measured")
    out = Path(args.out)
    result = {"machine": machine()}
    for name, seconds in parts.items():
        part = out.with_name(f"{out.stem}-{name}.json")
        result[name] = run_part(name, part, args.quick, float(seconds or SECONDS[name]))
        finish(result, args.out)
    print({name: result[name].get("error", "done") for name in parts})


if __name__ == "__main__":
    main()
