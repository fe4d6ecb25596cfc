"""Compile every kernel variant for A100 (sm_80) and H100/H200 (sm_90); no GPU is needed.

The launchers themselves run, on tensors of a CPU, with a driver that pretends to have the GPU: what
they launch is only compiled. Prints registers, spills to local memory and shared memory of each
variant as a line of JSON, read from the compiled code with the cuobjdump that Triton brings along.

    python bench/compile_kernels.py 80 90
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from sert_min.kernels import attention, reference, sample_score
from sert_min.kernels.fast import attention_triton, head_sample_score, search

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
V, C = 50257, 768  # vocabulary and width of GPT-2


def launch_all() -> None:
    """Call the launchers with whatever makes them choose another variant."""
    for dtype, top_k in itertools.product(DTYPES, (10, 32, 64)):
        weight = torch.empty(V, C, dtype=dtype)
        for B in (16, 25, 200):
            hidden, logits = torch.empty(B, C, dtype=dtype), torch.empty(B, V, dtype=dtype)
            settings = reference.Settings(top_k=top_k, top_p=0.95, seed=2**40)
            s, max_k = reference.checked(logits, V, settings)
            head_sample_score.launch(hidden, weight, s, max_k)
            head_sample_score.launch_score(hidden, weight, torch.zeros(B, dtype=torch.int64))
        for parts in (1, 32):
            sample_score.launch(logits, s, max_k, parts=parts)
        search.launch(logits, s)
    heads = ((16, 4), (32, 4), (64, 4), (64, 12), (128, 4))  # widths and numbers of query heads
    for dtype, (D, H), J in itertools.product(list(DTYPES)[:2], heads, (1, 25)):
        G, n, K = 8, 8 * J, 4  # prompts, rows, heads of keys
        q, shared = torch.empty(n, H, D, dtype=dtype), torch.empty(2, G, K, 130, D, dtype=dtype)
        own = torch.empty(2, 4, n, K, attention.CHUNK, D, dtype=dtype)  # 4 chunks
        lengths, t, place = (torch.zeros(size, dtype=torch.int64) for size in (G, n, n))
        attention_triton.launch(q, attention.Keys(*shared, lengths, *own), t, place, J)


def resources(built) -> dict:
    """Registers of a thread, and bytes that it spills and that its block shares."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        said = subprocess.check_output([tool, "--dump-resource-usage", f.name], text=True)
    used = {name: int(n) for name, n in re.findall(r"(STACK|LOCAL|REG):(\d+)", said)}
    spilled, shared = used["STACK"] + used["LOCAL"], built.metadata.shared
    return {"registers": used["REG"], "spill_bytes": spilled, "shared_bytes": shared}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("targets", nargs="*", type=int, default=[80, 90], help="75, 86, 100, 120, ..")
    args = p.parse_args()
    warnings.filterwarnings("ignore")
    seen, run = [], JITFunction.run

    def compile_only(kernel, *given, warmup, **settings):
        built = run(kernel, *given, warmup=True, **settings)
        if not any(built is x for x in seen):
            seen.append(built)
            sizes = {k: v for k, v in settings.items() if k.isupper()}
            row = {"kernel": kernel.__name__, "target": f"sm_{sm}", "dtype": DTYPES[given[0].dtype]}
            print(json.dumps(row | sizes | resources(built)), flush=True)

    JITFunction.run = compile_only
    for sm in args.targets:
        target = GPUTarget("cuda", sm, 32)
        pretended = SimpleNamespace(
            get_current_device=lambda sm=sm: sm,  # each target is a device of its own
            get_current_stream=lambda device: 0,
            get_current_target=lambda target=target: target,
        )
        driver.set_active(pretended)
        launch_all()


if __name__ == "__main__":
    main()
