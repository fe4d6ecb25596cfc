"""The definition of `sample_and_score` in plain PyTorch; it is also what runs on the CPU.

The idea. Keep the k best tokens of a row, of these the smallest set that holds the share p of
their mass, and draw from it with one uniform number: walk the kept tokens in id order and stop
where their cumulative probability passes it (inverse CDF). The uniform comes from Philox, a random
function of (seed, stream, position) with no state: a row draws the same token in any batch, in any
order, after any restart. Scoring is apart from drawing: the log-prob is that of the drawn token
under the whole vocabulary at temperature 1, whatever was cut off for the draw.

Two steps, as in the Triton kernels: `summary` goes once through the vocabulary, block by block, and
keeps the log-sum-exp and the k best entries; `draw` needs nothing else. Cost for B rows of V logits:
one pass; with k off, a sort.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# Philox4x32-10: multipliers and key increments (Salmon et al., SC 2011, "Parallel random numbers:
# as easy as 1, 2, 3", table 2).
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
BLOCK = 8192  # token ids at a time: a block of logits should stay in the cache
MAX_ID = 2**62  # above every token id
GROUP = 16  # logits of which only the largest is looked at first


def mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m for 32-bit values in int64: the product wraps around at 2^64
    into the sign, which keeps all of its bits."""
    product = a * m
    return (product >> 32) & WORD, product & WORD


def philox(seed: int, stream: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words per row (int64 [B]): key = seed, counter = (position, 0, stream
    low, stream high). The same bits as Triton's `tl.philox(seed, position, 0, low, high)`."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1 = position & WORD, torch.zeros_like(stream)
    c2, c3 = stream & WORD, (stream >> 32) & WORD
    for _ in range(10):
        hi0, lo0 = mul_hi_lo(c0, PHILOX_M[0])
        hi1, lo1 = mul_hi_lo(c2, PHILOX_M[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_W[0]) & WORD, (k1 + PHILOX_W[1]) & WORD
    return c0, c1, c2, c3


def uniform(seed: int, stream: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) per row, float64 [B], on a grid of 2^-24."""
    return (philox(seed, stream, position)[0] >> 8).double() * 2.0**-24


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x.topk(k) of x [B, V], quicker where V is large: the k best of a row stand in those k columns
    of a table [GROUP, V / GROUP] of its entries that have the best maxima."""
    B, V = x.shape
    width = V // GROUP
    if width <= 2 * k:
        return x.topk(k)
    columns = x[:, : GROUP * width].unflatten(1, (GROUP, width)).amax(1).topk(k).indices  # [B, k]
    first = torch.arange(0, GROUP * width, width, device=x.device)  # of each line
    rest = torch.arange(GROUP * width, V, device=x.device).expand(B, -1)
    ids = torch.cat([(columns[:, None] + first[:, None]).flatten(1), rest], 1)
    values, order = x.gather(1, ids).topk(k)
    return values, ids.gather(1, order)


def best_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, descending, ties by lowest id: values and ids [B, k]."""
    V = logits.shape[-1]
    if k < V:
        values, ids = largest(logits, k + 1)  # one more, to see whether a tie crosses the border
        values, border = values[:, :k], values[:, k]
        tied = (values[:, 1:] == values[:, :-1]).any(1) | (values[:, -1] == border)
        ids = ids[:, :k]
        if not tied.any():
            return values, ids
        # topk promises no order among equals: sort the tied rows, stably.
        v, i = logits[tied].sort(descending=True, stable=True)
        values[tied], ids[tied] = v[:, :k], i[:, :k]
        return values, ids
    return logits.sort(descending=True, stable=True)


@lru_cache(256)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on a device, filled there: a copy from the host could not be captured in a graph."""
    return torch.full((), value, dtype=dtype, device=device)


def per_row(name: str, value, like: Tensor, dtype, low, high) -> Tensor:
    """A setting given as a number or [B] tensor -> [B] tensor; numbers are checked for range."""
    if not isinstance(value, Tensor):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        value = constant(value, dtype, like.device)
    value = value.to(like.device, dtype)
    if value.dim() > 1 or value.numel() not in (1, like.shape[0]):
        raise ValueError(f"{name} must be a number or have one value per row")
    return value.expand(like.shape[0])


def checked(
    x: Tensor, V: int, temperature, top_k, top_p, streams: Tensor | None, position
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The settings of a step on rows x [B, ..] over V tokens as [B] tensors: temperature, top_k from
    1 to V (off: V; greedy: 1), top_p, streams, position. What can't be meant is a ValueError."""
    B = x.shape[0]
    numbers = not isinstance(top_k, Tensor) and not isinstance(temperature, Tensor)
    if numbers:  # settled here, they cost no launch on a GPU
        per_row("top_k", top_k, x, torch.int64, 0, 2**31)
        top_k = 1 if temperature == 0 else V if not 0 < top_k <= V else top_k
    temperature = per_row("temperature", temperature, x, torch.float32, 0.0, 1e30)
    top_k = per_row("top_k", top_k, x, torch.int64, 0, 2**31)
    top_p = per_row("top_p", top_p, x, torch.float64, 0.0, 1.0)
    position = per_row("position", position, x, torch.int64, 0, 2**31)
    if streams is None:
        streams = torch.arange(B, device=x.device)
    if streams.shape != (B,) or streams.dtype != torch.int64:
        raise ValueError(f"streams must be int64 [{B}], not {streams.dtype} {list(streams.shape)}")
    if not numbers:
        top_k = torch.where((top_k <= 0) | (top_k > V), V, top_k)
        top_k = torch.where(temperature == 0, 1, top_k)
    return temperature, top_k, top_p, streams.to(x.device).contiguous(), position


def sample_and_score(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seed: int = 0,
    streams: Tensor | None = None,
    position: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row and score it.

    logits [B, V] float -> tokens int64 [B], logprobs fp32 [B]: the log-prob of each drawn token
    under softmax(logits), temperature 1, full vocabulary. temperature 0 is argmax; top_k 0 and
    top_p 1 are off; top-k comes first, top-p acts on the rest, tempered and renormalised (the
    result of Hugging Face's order). Ties go to the lowest id. The draw is a function of (row,
    settings, seed, stream, position) alone. `streams` int64 [B] defaults to 0..B-1; `position` is
    how many tokens the row has drawn or been given already. It, temperature, top_k and top_p are
    numbers or [B] tensors. A row with NaN, +inf or nothing but -inf gives token -1 and log-prob
    NaN; no exception, so that nobody has to wait for the device. Wrong shapes and numbers out of
    range are a ValueError.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be float [B, V], not {logits.dtype} {list(logits.shape)}")
    home = logits.device
    if home.type == "mps":  # no float64 there
        logits, streams = logits.cpu(), streams if streams is None else streams.cpu()
    V = logits.shape[1]
    temperature, k, top_p, streams, position = checked(
        logits, V, temperature, top_k, top_p, streams, position
    )
    if len(logits) == 0:
        return streams.to(home), logits.float().sum(1).to(home)

    def block(i: int, j: int) -> Tensor:
        return logits[:, i:j].float()

    found = summary(block, V, int(k.max()))
    tokens, logprobs = draw(*found, temperature, k, top_p, uniform(seed, streams, position))
    return tokens.to(home), logprobs.to(home)


def summary(block: Callable[[int, int], Tensor], V: int, k: int):
    """All that sampling needs to know of B rows of V logits, in one pass over the vocabulary:
    best logit [B], log-sum-exp relative to it [B] (finite exactly for usable rows), the k largest
    logits, descending, and their ids [B, k]. `block(i, j)` gives the logits [B, j - i] of the ids
    from i to j, fp32; each block stays in the cache until it has been used."""
    values, ids, tops, sums = [], [], [], []
    for i in range(0, V, BLOCK):
        x = block(i, min(i + BLOCK, V))
        v, at = best_first(x, min(k, x.shape[1]))
        lse = -x.log_softmax(1).gather(1, at[:, :1])[
            :, 0
        ]  # relative to the best: log-softmax is 0 - lse
        empty = v[:, 0] == float("-inf")  # no mass in this block
        sums.append(lse.masked_fill(empty, float("-inf")))
        tops.append(v[:, 0].masked_fill(empty, 0.0))
        values, ids = [*values, v], [*ids, at + i]
    v, at, tops = torch.cat(values, 1), torch.cat(ids, 1), torch.stack(tops, 1)
    if len(values) > 1:  # equal logits stand in id order already, and best_first keeps that
        v, order = best_first(v, k)
        at = at.gather(1, order)
    # Relative to the best logit: near -100, where GPT-2's logits lie, fp32 has steps of 1e-5.
    lse = (torch.stack(sums, 1) + (tops - v[:, :1])).logsumexp(-1)
    return v[:, 0], lse, v, at


def draw(best, lse, values, ids, temperature, k, top_p, u) -> tuple[Tensor, Tensor]:
    """Token int64 [B] and its log-prob fp32 [B] from a `summary` with K candidates [B, K] and one
    uniform number per row; temperature, k, top_p [B]."""
    usable = lse.isfinite()
    if not usable.all():
        values = torch.where(usable[:, None], values, 0.0)

    # Top-k: each row keeps its own first k candidates.
    K = values.shape[1]
    keep = torch.arange(K, device=values.device) < k[:, None]

    # Top-p on the renormalised rest: a token stays while the mass before it is below p.
    # A logit of -inf has no mass: kept or not, it is never drawn.
    heat = torch.where(temperature == 0, 1.0, temperature).double()
    mass = ((values.double() - values[:, :1]) / heat[:, None]).exp() * keep  # [B, K]
    share = mass / mass.sum(1, keepdim=True)
    before = share.cumsum(1) - share
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep[:, 0] = True  # the best token always stays

    # Inverse CDF over the kept tokens in id order.
    by_id = torch.where(keep, ids, MAX_ID).argsort(1)  # dropped ones go last
    cdf = (mass * keep).gather(1, by_id).cumsum(1)
    drawn = (cdf <= (u * cdf[:, -1])[:, None]).sum(1, keepdim=True)  # u < 1: it is a kept one
    rank = by_id.gather(1, drawn)
    tokens = torch.where(usable, ids.gather(1, rank).squeeze(1), -1)
    logprobs = values.gather(1, rank).squeeze(1) - best - lse
    return tokens, torch.where(usable, logprobs, float("nan"))


def score(hidden: Tensor, weight: Tensor, targets: Tensor, block: int = 8192) -> Tensor:
    """Log-prob fp32 [B] of given tokens: hidden [B, C] against weight [V, C], the vocabulary in
    blocks, so that only B x block logits exist at a time."""
    hidden = hidden.float()
    parts = [
        (hidden @ weight[i : i + block].float().T).logsumexp(-1)
        for i in range(0, len(weight), block)
    ]
    return (hidden * weight[targets].float()).sum(-1) - torch.stack(parts).logsumexp(0)
