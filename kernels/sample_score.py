"""From logits to (token, log-prob) in one pass: the Triton form of reference.py.

The idea. Sampling at top_k <= 64 needs only two things of a row of V logits: its log-sum-exp, and
its k best entries. Both can be kept while the row streams by in blocks, so each logit is read once.
  * Log-sum-exp: a running maximum, and a vector of running sums relative to it.
  * Best k: K slots in registers. The worst of them is a threshold; a block whose maximum is not
    above it changes nothing. Else its maximum enters, the worst leaves, and we look again. In a row
    in random order that happens about k * (1 + ln(number of blocks)) times, not V times: there is
    no sort.
  * The draw then looks at K numbers only: pairwise comparisons give each its mass before it (top-p)
    and its cumulative probability in id order (inverse CDF).
With few rows most of a GPU would be idle, so a row can be cut into parts, one program each;
`merge_kernel` runs the same code over the parts' candidates. Larger top_k: fast/search.py.

The limit is memory: B rows in fp32 are 4 B V bytes, read once, with some 8 operations a logit. On an
H100 1,000 rows of V = 50,257 take 110 us, at 61 % of the bandwidth of a copy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Settings

MAX_K = 64  # candidate slots of the one-pass kernel
FUSION = {"enable_fp_fusion": True}  # x * y + z in one step, also where Triton's default changes
BIG = tl.constexpr(2**30)  # above every token id


@triton.jit
def keep_best(x, cols, best, ids):
    """Merge a block into the K best so far: x, cols [N], ids rising from call to call where values
    tie; best, ids [K] without an order, empty slots hold (-inf, BIG + slot)."""
    top, worst = tl.max(x, 0), tl.min(best, 0)
    while top > worst:
        # The lowest id among equals enters, and of the worst ones the highest id leaves.
        at = tl.min(tl.where(x == top, cols, 2147483647), 0)
        out = tl.max(tl.where(best == worst, ids, -1), 0)
        leaves = (best == worst) & (ids == out)
        best = tl.where(leaves, top, best)
        ids = tl.where(leaves, at, ids)
        x = tl.where(cols == at, float("-inf"), x)
        top, worst = tl.max(x, 0), tl.min(best, 0)
    return best, ids


@triton.jit
def add_block(x, m, sums):
    """Online log-sum-exp: a block of logits joins the maximum m and the sums relative to it."""
    higher = tl.maximum(m, tl.max(x, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
    return higher, sums * tl.exp(m - shift) + tl.exp(x - shift)


@triton.jit
def uniform(seed, stream, position):
    """reference.uniform for one row: float64 in [0, 1)."""
    low = (stream & 0xFFFFFFFF).to(tl.uint32)
    high = ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = position.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c0 * 0, low, high)
    return (word >> 8).to(tl.float64) * (1.0 / 16777216.0)


@triton.jit
def draw(best, ids, heat, top_p, u):
    """Top-p and inverse CDF over candidates [K] (empty: -inf): the drawn id and its logit.
    float64, as in the reference: K is small, and the same sums give the same tokens."""
    top = tl.max(best, 0)
    mass = tl.exp((best - top).to(tl.float64) / heat)  # exp(-inf) = 0 for empty slots
    mass = tl.where(best > float("-inf"), mass, 0.0)
    # j comes before i in descending order, equal logits by id
    ahead = (best[None, :] > best[:, None]) | (
        (best[None, :] == best[:, None]) & (ids[None, :] < ids[:, None])
    )
    before = tl.sum(tl.where(ahead, mass[None, :], 0.0), 1) / tl.sum(mass, 0)
    first = tl.sum(tl.where(ahead & (mass[None, :] > 0), 1, 0), 1) == 0
    limit = tl.where(top_p < 1.0, top_p, 2.0)  # top_p 1 is off
    keep = (mass > 0) & ((before < limit) | first)
    kept = tl.where(keep, mass, 0.0)
    upto = tl.sum(tl.where(ids[None, :] <= ids[:, None], kept[None, :], 0.0), 1)
    hit = keep & (upto > u * tl.sum(kept, 0))
    token = tl.min(tl.where(hit, ids, BIG), 0)
    token = tl.where(token == BIG, tl.max(tl.where(keep, ids, -1), 0), token)
    return token, tl.max(tl.where(ids == token, best, float("-inf")), 0)


@triton.jit
def store_result(tokens, logprobs, row, token, logit, m, s):
    """Write a row's token and log-prob; a row without a finite log-sum-exp gets (-1, NaN)."""
    lse = tl.log(s)  # relative to m: near -100 their sum would cost digits
    usable = (tl.abs(m) < float("inf")) & (s > 0.0) & (s < float("inf"))  # false for NaN
    tl.store(tokens + row, tl.where(usable, token, -1).to(tl.int64))
    tl.store(logprobs + row, tl.where(usable, logit - m - lse, float("nan")))


@triton.jit
def stream_kernel(
    logits, row_stride, V, span, temperature, t_stride, top_k, k_stride, top_p, p_stride,
    seed, streams, position, pos_stride, tokens, logprobs, part_max, part_sum, part_best, part_ids,
    K: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (row, part): log-sum-exp and best k of a part of a row; with one part, the draw."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row * t_stride)
    k = tl.load(top_k + row * k_stride)
    slots = tl.arange(0, K)
    best = tl.where(slots < k, float("-inf"), float("inf"))  # closed slots are never the worst
    ids = BIG + slots
    m = float("-inf")
    sums = tl.zeros([BLOCK], tl.float32)
    start = part * span
    end = tl.minimum(start + span, V)
    for at in range(start, end, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(logits + row * row_stride + cols, mask=cols < end, other=float("-inf"))
        x = x.to(tl.float32) + 0.0  # -0.0 ties with 0.0
        m, sums = add_block(x, m, sums)
        best, ids = keep_best(x, cols, best, ids)
    s = tl.sum(sums, 0)
    best = tl.where(slots < k, best, float("-inf"))
    if PARTS == 1:
        heat = tl.where(heat == 0.0, 1.0, heat).to(tl.float64)
        u = uniform(seed, tl.load(streams + row), tl.load(position + row * pos_stride))
        token, logit = draw(best, ids, heat, tl.load(top_p + row * p_stride), u)
        store_result(tokens, logprobs, row, token, logit, m, s)
    else:
        tl.store(part_max + row * PARTS + part, m)
        tl.store(part_sum + row * PARTS + part, s)
        tl.store(part_best + (row * PARTS + part) * K + slots, best)
        tl.store(part_ids + (row * PARTS + part) * K + slots, ids)


@triton.jit
def merge_kernel(
    part_max, part_sum, part_best, part_ids, parts, temperature, t_stride, top_k, k_stride,
    top_p, p_stride, seed, streams, position, pos_stride, tokens, logprobs,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): the parts' sums and candidates -> token and log-prob. PARTS is `parts` rounded
    up to a power of two; parts follow each other in id order."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    ms = tl.load(part_max + row * parts + p, mask=p < parts, other=float("-inf"))
    ss = tl.load(part_sum + row * parts + p, mask=p < parts, other=0.0)
    m = tl.max(ms, 0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    s = tl.sum(tl.where(ss == 0.0, 0.0, ss * tl.exp(ms - shift)), 0)
    heat = tl.load(temperature + row * t_stride)
    k = tl.load(top_k + row * k_stride)
    slots = tl.arange(0, K)
    best = tl.where(slots < k, float("-inf"), float("inf"))
    ids = BIG + slots
    for at in range(0, parts * K, BLOCK):
        i = at + tl.arange(0, BLOCK)
        x = tl.load(part_best + row * parts * K + i, mask=i < parts * K, other=float("-inf"))
        cols = tl.load(part_ids + row * parts * K + i, mask=i < parts * K, other=0)
        best, ids = keep_best(x, cols, best, ids)
    best = tl.where(slots < k, best, float("-inf"))
    heat = tl.where(heat == 0.0, 1.0, heat).to(tl.float64)
    u = uniform(seed, tl.load(streams + row), tl.load(position + row * pos_stride))
    token, logit = draw(best, ids, heat, tl.load(top_p + row * p_stride), u)
    store_result(tokens, logprobs, row, token, logit, m, s)


def step_arguments(s: Settings) -> tuple[Tensor, Tensor, tuple]:
    """Empty tokens and logprobs [B], and what every kernel is given of a step: settings of
    reference.checked with their strides (0 for a number), and the two."""
    tokens = torch.empty_like(s.streams)
    logprobs = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    given = (
        s.temperature, s.temperature.stride(0), s.top_k, s.top_k.stride(0), s.top_p,
        s.top_p.stride(0), s.seed, s.streams, s.position, s.position.stride(0), tokens, logprobs,
    )  # fmt: skip
    return tokens, logprobs, given


def part_memory(n: int, K: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima, sums, and values and ids of K candidates of n parts of rows."""
    part = torch.empty(n * (2 + K), dtype=torch.float32, device=device)
    return *part.split([n, n, n * K]), torch.empty(n * K, dtype=torch.int32, device=device)


def launch(
    logits: Tensor, s: Settings, max_k: int, block: int = 1024, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """Settings and max_k <= MAX_K of reference.checked -> tokens, logprobs."""
    B, V = logits.shape
    tokens, logprobs, given = step_arguments(s)
    K, block = max(16, triton.next_power_of_2(max_k)), min(block, triton.next_power_of_2(V))
    if parts is None:  # enough programs for every multiprocessor (timed on an H100), whole blocks
        parts = max(1, min(1024 // B, triton.cdiv(V, block), 32))
    span = triton.cdiv(triton.cdiv(V, parts), block) * block
    parts = triton.cdiv(V, span)
    memory = part_memory(B * parts if parts > 1 else 0, K, logits.device)
    stream_kernel[(B, parts)](
        logits, logits.stride(0), V, span, *given, *memory, K=K, BLOCK=block, PARTS=parts,
        num_warps=2 if K == 16 else 4, **FUSION,
    )  # fmt: skip
    if parts > 1:
        merge(memory, parts, K, given)
    return tokens, logprobs


def merge(memory: tuple, parts: int, K: int, given: tuple) -> None:
    """Launch merge_kernel, one program per row."""
    merge_kernel[(len(given[-1]),)](
        *memory, parts, *given, K=K, PARTS=triton.next_power_of_2(parts),
        BLOCK=min(1024, triton.next_power_of_2(parts * K)), num_warps=4, **FUSION,
    )  # fmt: skip
