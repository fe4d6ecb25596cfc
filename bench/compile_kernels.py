"""Compile every kernel variant for A100 (sm_80) and H100/H200 (sm_90); no GPU is needed.

Prints registers, spills to local memory and shared memory of each, read from the compiled code with
the cuobjdump that Triton brings along.

    python bench/compile_kernels.py
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sert_min.kernels import sample_score
from sert_min.kernels.attention import CHUNK
from sert_min.kernels.fast import attention_triton, head_sample_score, search

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANY = "logits hidden weight q k v out"  # arguments of the variant's dtype; others, not i32:
TYPES = {
    "*fp32": "temperature logprobs part_max part_sum part_best own_max own_sum own_acc",
    "*i64": "top_k streams position tokens t lengths place",
    "*fp64": "top_p",
    "*i32": "part_ids slot_at",
    "i64": "seed row_stride h_stride w_stride",
}
ALIGNED = (  # to 16, as at run time for width 768
    "hidden weight h_stride w_stride C q k v out own_acc q_row q_head chunk_stride slot_stride "
    "head_stride token_stride group_stride"
)


def variants() -> list[tuple]:
    """(kernel, constexprs, dtype, warps, stages) of every configuration that the launchers use."""
    s, found = sample_score, []
    for K in (16, 32, 64):
        for dtype in DTYPES:
            for parts in (1, 8):
                constants = {"K": K, "BLOCK": 1024, "PARTS": parts}
                found.append((s.stream_kernel, constants, dtype, 2 if K == 16 else 4, 3))
        for parts in (32, 256):
            found.append((s.merge_kernel, {"K": K, "PARTS": parts, "BLOCK": 1024}, "fp32", 4, 3))
    found += [(search.search_kernel, {"BLOCK": 1024}, dtype, 8, 3) for dtype in DTYPES]
    for B in (16, 25, 200):
        for K in (0, 16, 32, 64):
            for dtype, kind in DTYPES.items():
                sizes = head_sample_score.tiles(B, 50257, kind)
                tile = {"K": K, **dict(zip(("BLOCK_B", "BLOCK_V", "BLOCK_C"), sizes))}
                tile["PRECISION"] = "tf32x3" if dtype == "fp32" else "tf32"
                variant = (head_sample_score.head_kernel, tile, dtype, 4, 3)
                found += [variant] if variant not in found else []
    a = attention_triton
    for dtype in ("fp32", "bf16"):
        for D in (16, 32, 64, 128):
            for J in (1, 25):
                block_d, block_j, block_p, own_warps, warps = a.tiles(J, D, DTYPES[dtype])
                tile = {"D": D, "BLOCK_D": block_d, "BLOCK_J": block_j, "BLOCK_P": block_p}
                tile |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32", "GROUP": 1}
                found.append((a.prompt_kernel, tile, dtype, warps, 2))
            tile = {"D": D, "BLOCK_D": block_d, "CHUNK": CHUNK, "GROUP": 3 if D == 64 else 1}
            found.append((a.own_kernel, tile, dtype, own_warps, 3))
    return found


def compile_one(kernel, constants: dict, dtype: str, warps: int, stages: int, sm: int) -> dict:
    names = kernel.arg_names
    types = dict.fromkeys(names, "i32") | {n: f"*{dtype}" for n in ANY.split() if n in names}
    types |= {n: kind for kind, some in TYPES.items() for n in some.split() if n in names}
    types |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED.split() if n in names
    }
    values = {(names.index(n),): v for n, v in constants.items()}
    options = {"num_warps": warps, "num_stages": stages} | sample_score.FUSION
    source = ASTSource(kernel, types, values, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        command = [tool, "--dump-resource-usage", f.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local, registers = (
        int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("STACK", "LOCAL", "REG")
    )
    return {
        "kernel": kernel.__name__, "target": f"sm_{sm}", "dtype": dtype, **constants,
        "registers": registers, "spill_bytes": stack + local,
        "shared_bytes": built.metadata.shared,
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", action="store_true", help="the last line is JSON")
    p.add_argument("--sm", default="80,90", help="targets (%(default)s); 75, 86, 100, 120, ..")
    args = p.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for sm in map(int, args.sm.split(",")):
        for variant in variants():
            rows.append(r := compile_one(*variant, sm))
            shape = " ".join(f"{k}={r[k]}" for k in variant[1])
            print(f"{r['kernel']:14} {r['target']} {r['dtype']:5} {shape:58} {r['registers']:4} "
                  f"registers {r['spill_bytes']:4} spilled {r['shared_bytes']:7} shared")  # fmt: skip
    worst = max(r["spill_bytes"] for r in rows)
    print(f"{len(rows)} variants compiled, at most {worst} bytes spilled")
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
