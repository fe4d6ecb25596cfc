"""Compile every kernel variant for A100 (sm_80) and H100/H200 (sm_90); no GPU is needed.

Prints registers, spills to local memory and shared memory of each as a line of JSON, read from the
compiled code with the cuobjdump that Triton brings along.

    python bench/compile_kernels.py [80 90 ..]     # targets; 75, 86, 100, 120, ..
"""

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

from bench.common import DTYPES
from sert_min.kernels import sample_score
from sert_min.kernels.attention import CHUNK
from sert_min.kernels.fast import attention_triton, head_sample_score, search

KINDS = DTYPES | {"fp16": torch.float16}
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
    s, head, found = sample_score, head_sample_score, []
    for K in (16, 32, 64):
        size = {"K": K, "BLOCK": 1024}
        found += [(s.stream_kernel, size | {"PARTS": parts}, dtype, 2 if K == 16 else 4, 3)
                  for dtype in KINDS for parts in (1, 8)]  # fmt: skip
        found += [(s.merge_kernel, size | {"PARTS": n}, "fp32", 4, 3) for n in (32, 256)]
    found += [(search.search_kernel, {"BLOCK": 1024}, dtype, 8, 3) for dtype in KINDS]
    for B in (16, 25, 200):
        for K in (0, 16, 32, 64):
            for dtype, kind in KINDS.items():
                sizes = head.tiles(B, 50257, kind)
                tile = {"K": K, **dict(zip(("BLOCK_B", "BLOCK_V", "BLOCK_C"), sizes))}
                tile["PRECISION"] = "tf32x3" if dtype == "fp32" else "tf32"
                variant = (head.head_kernel, tile, dtype, head.warps(K, sizes[0]), 3)
                found += [variant] if variant not in found else []
    a = attention_triton
    for dtype, kind in DTYPES.items():
        for D in (16, 32, 64, 128):
            for J in (1, 25):
                block_d, block_j, block_p, own_warps, warps = a.tiles(J, D, kind)
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
    aligned = [n for n in ALIGNED.split() if n in names]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
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
    about = {"kernel": kernel.__name__, "target": f"sm_{sm}", "dtype": dtype, **constants}
    used = {"registers": registers, "spill_bytes": stack + local}
    return about | used | {"shared_bytes": built.metadata.shared}


def main() -> None:
    warnings.filterwarnings("ignore")
    for sm in map(int, sys.argv[1:] or (80, 90)):
        for variant in variants():
            print(json.dumps(compile_one(*variant, sm)), flush=True)


if __name__ == "__main__":
    main()
