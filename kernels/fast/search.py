"""From logits to (token, log-prob) for any top_k and top_p, in Triton: the way without a small
candidate set, for top_k off or above sample_score.MAX_K.

The kept set is "all logits above a floor, and the first `ties` of those that equal it". fp32 bits,
read as integers, have the order of the floats, so 32 halvings find the floor: first for top-k by
counting, then for top-p inside it by adding up mass. Each halving reads the row again, at most 38
times in all for one of them and 71 times for both, after the first time mostly from the L2 cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..reference import Settings
from ..sample_score import BIG, FUSION, add_block, step_arguments, store_result, uniform

LOWEST = tl.constexpr(-2147483648)  # below the bits of every float


@triton.jit
def ordered_bits(x):
    """fp32 -> int32 in the same order, so that bisection on integers is bisection on floats."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def load_block(row_ptr, at, V, BLOCK: tl.constexpr):
    """Ids from `at` on and their logits, fp32; -inf from V on."""
    cols = at + tl.arange(0, BLOCK)
    return cols, tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)


@triton.jit
def kept(x, floor, ties, at_floor):
    """Which logits of a block are in the set; their ordered bits; how many equal the floor so far."""
    bits = ordered_bits(x)
    is_floor = (bits == floor) & (x > float("-inf"))
    nth = at_floor + tl.cumsum(is_floor.to(tl.int32), 0)
    keep = (x > float("-inf")) & ((bits > floor) | (is_floor & (nth <= ties)))
    return keep, bits, at_floor + tl.sum(is_floor.to(tl.int32), 0)


@triton.jit
def mass_from(row_ptr, V, low, top, heat, floor, ties, BLOCK: tl.constexpr):
    """Count and mass exp((x - top) / heat) of the logits of the set with ordered bits from `low` on,
    and how many equal it."""
    count, equal, at_floor = tl.zeros([], tl.int32), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for at in range(0, V, BLOCK):
        cols, x = load_block(row_ptr, at, V, BLOCK)
        keep, bits, at_floor = kept(x, floor, ties, at_floor)
        keep = keep & (bits >= low)
        count += tl.sum(keep.to(tl.int32), 0)
        equal += tl.sum((keep & (bits == low)).to(tl.int32), 0)
        mass += tl.sum(tl.where(keep, tl.exp((x - top).to(tl.float64) / heat), 0.0), 0)
    return count, mass, equal


@triton.jit
def highest_floor(row_ptr, V, low, m, heat, floor, ties, k, goal, BLOCK: tl.constexpr):
    """The largest bits from `low` on such that the logits from there on are at least k with at least
    the mass `goal`; with their count, mass and equals."""
    low, high = low.to(tl.int64), ordered_bits(m).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) // 2
        count, mass, equal = mass_from(row_ptr, V, middle.to(tl.int32), m, heat, floor, ties, BLOCK)
        enough = (count >= k) & (mass >= goal)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    low = low.to(tl.int32)
    count, mass, equal = mass_from(row_ptr, V, low, m, heat, floor, ties, BLOCK)
    return low, count, mass, equal


@triton.jit
def search_kernel(
    logits, row_stride, V, temperature, t_stride, top_k, k_stride, top_p, p_stride,
    seed, streams, position, pos_stride, tokens, logprobs, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): the kept set by one bisection for top-k and one inside it for top-p; the draw."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    heat = tl.load(temperature + row * t_stride)
    k = tl.load(top_k + row * k_stride).to(tl.int32)
    heat = tl.where(heat == 0.0, 1.0, heat).to(tl.float64)
    p = tl.load(top_p + row * p_stride)
    # 1. Log-sum-exp.
    m, sums = float("-inf"), tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        cols, x = load_block(row_ptr, at, V, BLOCK)
        m, sums = add_block(x, m, sums)
    s = tl.sum(sums, 0)
    # 2. Top-k: the largest floor with at least k logits from it on.
    floor, ties = tl.full([], LOWEST, tl.int32), tl.full([], 2147483647, tl.int32)
    if k < V:
        low, count, mass, equal = highest_floor(
            row_ptr, V, floor, m, heat, floor, ties, k, 0.0, BLOCK
        )
        floor, ties = low, equal - tl.maximum(count - k, 0)
    # 3. Top-p inside it: the largest threshold whose mass reaches p; of its equals so many that the
    # mass before each is below p.
    count, total, equal = mass_from(row_ptr, V, LOWEST, m, heat, floor, ties, BLOCK)
    if p < 1.0:
        low, count, mass, equal = highest_floor(
            row_ptr, V, floor, m, heat, floor, ties, 0, p * total, BLOCK
        )
        count, above, other = mass_from(row_ptr, V, low + 1, m, heat, floor, ties, BLOCK)
        each = (mass - above) / tl.maximum(equal, 1)
        needed = tl.where(equal > 0, tl.ceil((p * total - above) / each), 1.0)
        ties = tl.minimum(tl.maximum(needed, 1.0), equal.to(tl.float64)).to(tl.int32)
        floor = low
        count, total, equal = mass_from(row_ptr, V, LOWEST, m, heat, floor, ties, BLOCK)
    # 4. Inverse CDF in id order: the first kept logit whose cumulative mass passes u * total.
    u = uniform(seed, tl.load(streams + row), tl.load(position + row * pos_stride))
    done, at_floor = tl.zeros([], tl.float64), tl.zeros([], tl.int32)
    token, last = tl.full([], BIG, tl.int32), tl.full([], -1, tl.int32)
    for at in range(0, V, BLOCK):
        cols, x = load_block(row_ptr, at, V, BLOCK)
        keep, bits, at_floor = kept(x, floor, ties, at_floor)
        share = tl.where(keep, tl.exp((x - m).to(tl.float64) / heat), 0.0)
        hit = keep & (done + tl.cumsum(share, 0) > u * total)
        token = tl.minimum(token, tl.min(tl.where(hit, cols, BIG), 0))
        last = tl.maximum(last, tl.max(tl.where(keep, cols, -1), 0))
        done += tl.sum(share, 0)
    token = tl.where(token == BIG, last, token)
    logit = tl.load(row_ptr + tl.maximum(token, 0)).to(tl.float32)
    store_result(tokens, logprobs, row, token, logit, m, s)


def launch(logits: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Settings of reference.checked -> tokens, logprobs."""
    B, V = logits.shape
    tokens, logprobs, given = step_arguments(s)
    search_kernel[(B,)](
        logits, logits.stride(0), V, *given, BLOCK=min(1024, triton.next_power_of_2(V)),
        num_warps=8, **FUSION,
    )  # fmt: skip
    return tokens, logprobs
