"""From hidden states to (token, log-prob): the LM-head product and the sampler in one kernel.

The idea. The logits are needed once, to be summed and compared, so they never go to memory. A program
takes a tile of rows and a strip of the vocabulary. It computes the strip's logits block by block in
registers (tensor cores, fp32 sums) and keeps, per row, what sample_score.py keeps of a stream: a
running log-sum-exp and the best K. The same small kernel merges the strips. Scoring given tokens is
the same without the best K: the log-sum-exp, and one dot product for the token itself.

Precision. GPT-2's logits lie near -100, where bf16 numbers are 0.5 apart: sums are fp32. Inputs in
bf16 would still cost up to some hundredths, so an fp32 matrix can be handed over as bf16 pieces
(`kernels.bf16_pieces`): x = hi + lo, and x w = hi hi + lo hi + hi lo, side by side as one product of
three times the depth, with an error near 2^-16 of the terms.

B rows of width C and V tokens at 2 bytes a number cost 2 V C bytes of weights and 2 B V C operations.
What is saved is the memory of the logits, not time: README.md has the figures.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Settings
from ..sample_score import BIG, FUSION, merge, part_memory, step_arguments


@triton.jit
def keep_best_rows(x, cols, best, ids):
    """sample_score.keep_best for R rows at once: x [R, N], cols [N], best, ids [R, K]. Goes on
    until no row has anything to insert."""
    top, worst = tl.max(x, 1), tl.min(best, 1)
    while tl.max((top > worst).to(tl.int32), 0) > 0:
        enters = (top > worst)[:, None]
        at = tl.min(tl.where(x == top[:, None], cols[None, :], 2147483647), 1)
        is_worst = best == worst[:, None]
        out = tl.max(tl.where(is_worst, ids, -1), 1)
        leaves = enters & is_worst & (ids == out[:, None])
        best = tl.where(leaves, top[:, None], best)
        ids = tl.where(leaves, at[:, None], ids)
        x = tl.where(enters & (cols[None, :] == at[:, None]), float("-inf"), x)
        top, worst = tl.max(x, 1), tl.min(best, 1)
    return best, ids


@triton.jit(do_not_specialize=("B", "strips"))  # rows and strips vary: one program for all
def head_kernel(
    hidden, h_stride, weight, w_stride, B, V, C, span, top_k, k_stride,
    part_max, part_sum, part_best, part_ids, strips,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row tile, strip): log-sum-exp and, if K > 0, the best K of BLOCK_B rows over `span`
    tokens. hidden [B, C], weight [V, C]; rows of both are contiguous."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    strip = tl.program_id(1)
    row_ok = rows < B
    depth = tl.arange(0, BLOCK_C)
    h_ptr = hidden + rows.to(tl.int64)[:, None] * h_stride + depth[None, :]
    m = tl.full([BLOCK_B], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_B], tl.float32)
    if K > 0:
        slots = tl.arange(0, K)
        k = tl.load(top_k + rows * k_stride, mask=row_ok, other=1)
        opened = slots[None, :] < k[:, None]
        best = tl.where(opened, float("-inf"), float("inf"))  # closed slots are never the worst
        ids = tl.zeros([BLOCK_B, K], tl.int32) + slots[None, :] + BIG
    start = strip * span
    end = tl.minimum(start + span, V)
    for at in range(start, end, BLOCK_V):
        cols = at + tl.arange(0, BLOCK_V)
        w_ptr = weight + cols.to(tl.int64)[:, None] * w_stride + depth[None, :]
        x = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
        for c in range(0, C, BLOCK_C):
            inside = (c + depth)[None, :] < C
            h = tl.load(h_ptr + c, mask=row_ok[:, None] & inside, other=0.0)
            w = tl.load(w_ptr + c, mask=(cols < V)[:, None] & inside, other=0.0)
            x = tl.dot(h, tl.trans(w), x, input_precision=PRECISION)
        x = tl.where((cols < end)[None, :], x + 0.0, float("-inf"))  # the vocabulary's ragged end
        higher = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        m = higher
        if K > 0:
            best, ids = keep_best_rows(x, cols, best, ids)
    out = rows.to(tl.int64) * strips + strip
    tl.store(part_max + out, m, mask=row_ok)
    tl.store(part_sum + out, s, mask=row_ok)
    if K > 0:
        best = tl.where(opened, best, float("-inf"))
        at_slot = out[:, None] * K + slots[None, :]
        tl.store(part_best + at_slot, best, mask=row_ok[:, None])
        tl.store(part_ids + at_slot, ids, mask=row_ok[:, None])


def tiles(B: int, V: int, dtype: torch.dtype, processors: int = 132) -> tuple:
    """BLOCK_B, BLOCK_V, BLOCK_C, span, strips: as many programs as run at a time on a GPU of so many
    multiprocessors, strips of whole blocks. Of the sizes that hardly spill on any GPU these were
    among the quickest on an H100 at 25, 250 and 1,000 rows."""
    if dtype == torch.float32:
        block_b, block_v, block_c = 16 if B <= 16 else 32 if B <= 32 else 64, 64, 32
    else:
        block_b, block_v, block_c = 16 if B <= 32 else 64, 128, 64
    blocks = triton.cdiv(V, block_v)
    programs = processors * (3 if block_b == 16 else 2)
    wanted = max(1, min(blocks, programs // triton.cdiv(B, block_b)))
    span = triton.cdiv(blocks, wanted) * block_v
    return block_b, block_v, block_c, span, triton.cdiv(V, span)


def warps(K: int, block_b: int) -> int:
    """How many warps a program has: 4, or 8 where 4 would spill registers on an H100."""
    return 8 if K == 64 or (K == 0 and block_b > 16) else 4


def run_head(
    hidden: Tensor, weight: Tensor, top_k: Tensor, K: int, blocks: tuple | None
) -> tuple[tuple, int]:
    """Launch head_kernel; the memory of B * strips parts (sample_score.part_memory), and strips."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (B, C), V, device = hidden.shape, len(weight), hidden.device
    if not blocks:
        gpu = torch.cuda.get_device_properties(device) if hidden.is_cuda else None
        blocks = tiles(B, V, hidden.dtype, gpu.multi_processor_count if gpu else 132)
    block_b, block_v, block_c, span, strips = blocks
    memory = part_memory(B * strips, K, device)
    head_kernel[(triton.cdiv(B, block_b), strips)](
        hidden, hidden.stride(0), weight, weight.stride(0), B, V, C, span, top_k, top_k.stride(0),
        *memory, strips, K=K, BLOCK_B=block_b, BLOCK_V=block_v, BLOCK_C=block_c,
        PRECISION="tf32x3" if hidden.dtype == torch.float32 else "tf32",
        num_warps=warps(K, block_b), num_stages=3, **FUSION,
    )  # fmt: skip
    return memory, strips


def launch(
    hidden: Tensor, weight: Tensor, s: Settings, max_k: int, blocks: tuple | None = None
) -> tuple[Tensor, Tensor]:
    """Settings and max_k <= 64 of reference.checked -> tokens, logprobs."""
    K = max(16, triton.next_power_of_2(max_k))
    tokens, logprobs, given = step_arguments(s)
    merge(*run_head(hidden, weight, s.top_k, K, blocks), K, given)
    return tokens, logprobs


def launch_score(
    hidden: Tensor, weight: Tensor, targets: Tensor, blocks: tuple | None = None
) -> Tensor:
    """Log-prob fp32 [B] of the given tokens int64 [B]; no logits in memory."""
    unused = torch.zeros(1, device=hidden.device).expand(len(hidden))
    (part_max, part_sum, _, _), strips = run_head(hidden, weight, unused, 0, blocks)
    lse = (part_max + part_sum.log()).view(-1, strips).logsumexp(-1)
    return (hidden.float() * weight[targets].float()).sum(-1) - lse
