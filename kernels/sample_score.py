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
With few rows a GPU would idle, so a row can be cut into parts, one program each; `merge_kernel` runs
the same code over the parts' candidates.

With top_k off or above 64 there is no small candidate set. `search_kernel` finds the value of the
last kept logit by bisection on its 32 bits, reading the row up to 38 times, or 71 with top-p too; after the first
read it comes from the L2 cache.

Cost for B rows in fp32: 4 B V bytes read once and some 8 operations a logit (top_k <= 64). At
V = 50,257 and 4.8 TB/s that is 42 us for 1,000 rows (computed, not measured): memory is the limit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_K = 64  # candidate slots of the one-pass kernel
FUSION = {"enable_fp_fusion": True}  # x * y + z in one step, also where Triton's default changes
BIG = tl.constexpr(2**30)  # above every token id


# --- pieces that run inside the kernels -----------------------------------------------------------


@triton.jit
def keep_best(x, cols, best, ids):
    """Merge a block into the K best so far. x, cols [N] (ids rising from call to call where values
    tie); best, ids [K] unordered, empty slots hold (-inf, BIG + slot)."""
    top = tl.max(x, 0)
    worst = tl.min(best, 0)
    while top > worst:
        # the lowest id among equals enters ..
        at = tl.min(tl.where(x == top, cols, 2147483647), 0)
        # .. and of the worst ones the highest id leaves: ties go to the lowest id
        out = tl.max(tl.where(best == worst, ids, -1), 0)
        leaves = (best == worst) & (ids == out)
        best = tl.where(leaves, top, best)
        ids = tl.where(leaves, at, ids)
        x = tl.where(cols == at, float("-inf"), x)
        top = tl.max(x, 0)
        worst = tl.min(best, 0)
    return best, ids


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


# --- kernels --------------------------------------------------------------------------------------


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
        higher = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        sums = sums * tl.exp(m - shift) + tl.exp(x - shift)
        m = higher
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


@triton.jit
def ordered_bits(x):
    """fp32 -> int32 in the same order, so that bisection on integers is bisection on floats."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def mass_from(row_ptr, V, bits, top, heat, floor, ties, BLOCK: tl.constexpr):
    """Count and mass exp((x - top) / heat) of the logits with ordered bits >= `bits`, and how many
    equal it. Logits below `floor` are out; of those equal to it only the first `ties` are in."""
    count, equal = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    at_floor = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for at in range(0, V, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        b = ordered_bits(x)
        is_floor = (b == floor) & (x > float("-inf"))
        nth = at_floor + tl.cumsum(is_floor.to(tl.int32), 0)
        at_floor += tl.sum(is_floor.to(tl.int32), 0)
        inside = (x > float("-inf")) & ((b > floor) | (is_floor & (nth <= ties))) & (b >= bits)
        count += tl.sum(inside.to(tl.int32), 0)
        equal += tl.sum((inside & (b == bits)).to(tl.int32), 0)
        share = tl.exp((x - top).to(tl.float64) / heat)
        mass += tl.sum(tl.where(inside, share, 0.0), 0)
    return count, mass, equal


@triton.jit
def search_kernel(
    logits, row_stride, V, temperature, t_stride, top_k, k_stride, top_p, p_stride,
    seed, streams, position, pos_stride, tokens, logprobs, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): any top_k and top_p. The kept set is `bits > floor, and the first `ties` of
    those equal to it`; one bisection finds it for top-k, a second one, inside it, for top-p."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    heat = tl.load(temperature + row * t_stride)
    k = tl.load(top_k + row * k_stride).to(tl.int32)
    heat = tl.where(heat == 0.0, 1.0, heat).to(tl.float64)
    p = tl.load(top_p + row * p_stride)
    # 1. Log-sum-exp.
    m = float("-inf")
    sums = tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(m - shift) + tl.exp(x - shift)
        m = higher
    s = tl.sum(sums, 0)
    # 2. Top-k: the largest floor with at least k logits from it on.
    floor, ties = tl.full([], -2147483648, tl.int32), tl.full([], 2147483647, tl.int32)
    if k < V:
        low, high = tl.full([], -2147483648, tl.int64), ordered_bits(m).to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) // 2
            count, mass, equal = mass_from(
                row_ptr, V, middle.to(tl.int32), m, heat, floor, ties, BLOCK
            )
            enough = count >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        count, mass, equal = mass_from(row_ptr, V, low.to(tl.int32), m, heat, floor, ties, BLOCK)
        floor = low.to(tl.int32)
        ties = equal - tl.maximum(count - k, 0)
    # 3. Top-p inside it: the largest threshold whose mass reaches p; of its equals so many that the
    # mass before each is below p.
    _, total, _ = mass_from(row_ptr, V, -2147483648, m, heat, floor, ties, BLOCK)
    if p < 1.0:
        low, high = floor.to(tl.int64), ordered_bits(m).to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) // 2
            _, mass, _ = mass_from(row_ptr, V, middle.to(tl.int32), m, heat, floor, ties, BLOCK)
            enough = mass >= p * total
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        _, mass, equal = mass_from(row_ptr, V, low.to(tl.int32), m, heat, floor, ties, BLOCK)
        _, above, _ = mass_from(row_ptr, V, (low + 1).to(tl.int32), m, heat, floor, ties, BLOCK)
        each = (mass - above) / tl.maximum(equal, 1)
        needed = tl.where(equal > 0, tl.ceil((p * total - above) / each), 1.0)
        ties = tl.minimum(tl.maximum(needed, 1.0), equal.to(tl.float64)).to(tl.int32)
        floor = low.to(tl.int32)
        _, total, _ = mass_from(row_ptr, V, -2147483648, m, heat, floor, ties, BLOCK)
    # 4. Inverse CDF in id order: the first kept logit whose cumulative mass passes u * total.
    u = uniform(seed, tl.load(streams + row), tl.load(position + row * pos_stride))
    target = u * total
    done = tl.zeros([], tl.float64)
    at_floor = tl.zeros([], tl.int32)
    token, last = tl.full([], 1073741824, tl.int32), tl.full([], -1, tl.int32)
    for at in range(0, V, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        b = ordered_bits(x)
        is_floor = (b == floor) & (x > float("-inf"))
        nth = at_floor + tl.cumsum(is_floor.to(tl.int32), 0)
        at_floor += tl.sum(is_floor.to(tl.int32), 0)
        keep = (x > float("-inf")) & ((b > floor) | (is_floor & (nth <= ties)))
        share = tl.where(keep, tl.exp((x - m).to(tl.float64) / heat), 0.0)
        upto = done + tl.cumsum(share, 0)
        token = tl.minimum(token, tl.min(tl.where(keep & (upto > target), cols, 1073741824), 0))
        last = tl.maximum(last, tl.max(tl.where(keep, cols, -1), 0))
        done += tl.sum(share, 0)
    token = tl.where(token == 1073741824, last, token)
    logit = tl.load(row_ptr + tl.maximum(token, 0)).to(tl.float32)
    store_result(tokens, logprobs, row, token, logit, m, s)


# --- launch ---------------------------------------------------------------------------------------


def launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    max_k: int,
    seed: int,
    streams: Tensor,
    position: Tensor,
    block: int = 1024,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Settings from reference.checked -> tokens, logprobs. They are [B] tensors, which may be
    expanded numbers (stride 0); top_k is 1 (greedy) to V (off); `max_k` is at least its maximum.
    Other sizes of blocks, or warps: bench/compile_kernels.py has a copy of them."""
    B, V = logits.shape
    device = logits.device
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    logprobs = torch.empty(B, dtype=torch.float32, device=device)
    settings = (
        temperature, temperature.stride(0), top_k, top_k.stride(0), top_p, top_p.stride(0),
    )  # fmt: skip
    random = (seed, streams, position, position.stride(0))
    if max_k > MAX_K:
        search_kernel[(B,)](
            logits, logits.stride(0), V, *settings, *random, tokens, logprobs,
            BLOCK=min(block, 1024, triton.next_power_of_2(V)), num_warps=8, **FUSION,
        )  # fmt: skip
        return tokens, logprobs
    K = max(16, triton.next_power_of_2(max_k))
    block = min(block, triton.next_power_of_2(V))
    if parts is None:  # enough programs for every multiprocessor (timed on an H100), whole blocks
        parts = max(1, min(1024 // B, triton.cdiv(V, block), 32))
    span = triton.cdiv(triton.cdiv(V, parts), block) * block
    parts = triton.cdiv(V, span)
    part = torch.empty(B * parts * (2 + K), dtype=torch.float32, device=device)
    part_max, part_sum, part_best = part.split([B * parts, B * parts, B * parts * K])
    part_ids = torch.empty(B * parts * K if parts > 1 else 0, dtype=torch.int32, device=device)
    stream_kernel[(B, parts)](
        logits, logits.stride(0), V, span, *settings, *random, tokens, logprobs,
        part_max, part_sum, part_best, part_ids, K=K, BLOCK=block, PARTS=parts,
        num_warps=2 if K == 16 else 4, **FUSION,
    )  # fmt: skip
    if parts > 1:
        merge(part_max, part_sum, part_best, part_ids, parts, K, settings, random, tokens, logprobs)
    return tokens, logprobs


def merge(part_max, part_sum, part_best, part_ids, parts, K, settings, random, tokens, logprobs):
    """Launch merge_kernel, one program per row."""
    merge_kernel[(len(tokens),)](
        part_max, part_sum, part_best, part_ids, parts, *settings, *random, tokens, logprobs,
        K=K, PARTS=triton.next_power_of_2(parts),
        BLOCK=min(1024, triton.next_power_of_2(parts * K)), num_warps=4, **FUSION,
    )  # fmt: skip
