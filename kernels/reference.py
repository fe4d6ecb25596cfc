"""The definition of `sample_and_score` in plain PyTorch; it is also what runs on the CPU.

Keep the k best tokens of a row, of these the smallest set that holds the share p of their mass, and
draw from it with one uniform number: walk the kept tokens in id order and stop where their
cumulative probability passes it (inverse CDF). The uniform number comes from Philox, a random
function of (seed, stream, position) without state: a row draws the same token in any batch, in any
order, after any restart.

The score of the drawn token is its log-prob in the model's own distribution: temperature 1, the full
vocabulary, nothing cut off. The perplexity of a path, which the rules look at, must not depend on
how the path was drawn.

There are two steps, as in the Triton kernels. `summary` goes once through the vocabulary, block by
block, and keeps the log-sum-exp and the k best entries; `draw` needs nothing else. B rows of V
logits cost one pass; with k off, a sort.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .fast.largest import largest

# Philox4x32-10: multipliers and key increments (Salmon et al., SC 2011, "Parallel random numbers:
# as easy as 1, 2, 3", table 2).
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
BLOCK = 8192  # token ids at a time: a block of logits should stay in the cache
MAX_ID = 2**62  # above every token id
Drawn = tuple[Tensor, Tensor]  # tokens int64 [B], their log-probs fp32 [B]


class Settings(NamedTuple):
    """How B rows are drawn. All but the seed are numbers, or tensors [B] as `checked` makes them."""

    temperature: float | Tensor = 1.0  # 0 is argmax
    top_k: int | Tensor = 0  # comes first; 0 is off
    top_p: float | Tensor = 1.0  # acts on the rest, tempered and renormalised; 1 is off
    seed: int = 0
    streams: Tensor | None = None  # int64 [B], the names of the rows; 0 to B - 1 if not given
    position: int | Tensor = 0  # number of the draw within its row; each needs its own randomness


def philox(seed: int, stream: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words per row (int64 [B]): key = seed, counter = (position, 0, stream
    low, stream high). The same bits as Triton's `tl.philox(seed, position, 0, low, high)`."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1 = position & WORD, torch.zeros_like(stream)
    c2, c3 = stream & WORD, (stream >> 32) & WORD
    for _ in range(10):
        x, y = c0 * PHILOX_M[0], c2 * PHILOX_M[1]  # may wrap into the sign, which keeps all bits
        c0, c1 = ((y >> 32) & WORD) ^ c1 ^ k0, y & WORD
        c2, c3 = ((x >> 32) & WORD) ^ c3 ^ k1, x & WORD
        k0, k1 = (k0 + PHILOX_W[0]) & WORD, (k1 + PHILOX_W[1]) & WORD
    return c0, c1, c2, c3


def uniform(seed: int, stream: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) per row, float64 [B], on a grid of 2^-24."""
    return (philox(seed, stream, position)[0] >> 8).double() * 2.0**-24


def best_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, descending, ties by lowest id: values and ids [B, k]."""
    if k >= logits.shape[-1]:
        return logits.sort(descending=True, stable=True)
    values, ids = largest(logits, k + 1)  # topk; one more shows a tie that crosses the border
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    values, ids = values[:, :k], ids[:, :k]
    if tied.any():  # topk promises no order among equals, a stable sort does
        v, i = logits[tied].sort(descending=True, stable=True)
        values[tied], ids[tied] = v[:, :k], i[:, :k]
    return values, ids


@lru_cache(256)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on a device, filled there: a copy from the host could not be captured in a graph."""
    return torch.full((), value, dtype=dtype, device=device)


def per_row(name: str, value, like: Tensor, dtype, low, high) -> Tensor:
    """A setting as a tensor [B]. A number out of range or another shape is a ValueError."""
    if not isinstance(value, Tensor):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        value = constant(value, dtype, like.device)
    value = value.to(like.device, dtype)
    if value.dim() > 1 or value.numel() not in (1, len(like)):
        raise ValueError(f"{name} must be a number or have one value per row")
    return value.expand(len(like))


def checked(x: Tensor, V: int, s: Settings) -> tuple[Settings, int]:
    """Settings of a step on rows x [B, ..] over V tokens, with tensors [B] in place of numbers and
    top_k from 1 to V (off: V; greedy: 1); and the largest top_k. Reading that from a tensor waits
    for the device, so a step that is captured in a CUDA graph needs a number. Numbers out of range
    and wrong shapes are a ValueError."""
    if x.dim() != 2 or not x.is_floating_point() or V < 1:
        raise ValueError(f"rows must be float [B, V], not {x.dtype} {list(x.shape)}")
    temperature = per_row("temperature", s.temperature, x, torch.float32, 0.0, 1e30)
    top_k = per_row("top_k", s.top_k, x, torch.int64, 0, 2**31)
    most = None if isinstance(s.top_k, Tensor) else min(s.top_k or V, V)
    if most and not isinstance(s.temperature, Tensor):  # settled on the host: no launch on a GPU
        most = 1 if s.temperature == 0 else most
        top_k = constant(most, torch.int64, x.device).expand(len(x))
    else:
        top_k = torch.where(temperature == 0, 1, torch.where(top_k > 0, top_k.clamp(max=V), V))
    top_p = per_row("top_p", s.top_p, x, torch.float64, 0.0, 1.0)
    position = per_row("position", s.position, x, torch.int64, 0, 2**31)
    streams = torch.arange(len(x), device=x.device) if s.streams is None else s.streams
    if streams.shape != (len(x),) or streams.dtype != torch.int64:
        raise ValueError(f"streams must be int64 [{len(x)}], not {streams.dtype} {streams.shape}")
    streams = streams.to(x.device).contiguous()
    s = Settings(temperature, top_k, top_p, s.seed, streams, position)
    return s, most or max(top_k.tolist(), default=1)


def sample_and_score(logits: Tensor, s: Settings) -> Drawn:
    """Draw one token per row of logits [B, V] and score it: its log-prob under softmax(logits) at
    temperature 1, over the full vocabulary, whatever was cut off for the draw.

    Equal logits go by the lowest id; the draw is a function of (row, settings, seed, stream,
    position) alone. A row with NaN, +inf or nothing but -inf gives token -1 and log-prob NaN: an
    exception would have to wait for the device. Bad settings are a ValueError (`checked`)."""
    home = logits.device
    if home.type == "mps":  # no float64 there
        logits = logits.cpu()
    V = logits.shape[-1]
    s, max_k = checked(logits, V, s)
    tokens, logprobs = draw(*summary(lambda i, j: logits[:, i:j].float(), V, max_k), s)
    return tokens.to(home), logprobs.to(home)


def summary(block: Callable[[int, int], Tensor], V: int, k: int):
    """All that sampling needs to know of B rows of V logits, in one pass over the vocabulary:
    best logit [B], log-sum-exp relative to it [B] (finite exactly for usable rows), the k largest
    logits, descending, and their ids [B, k]. `block(i, j)` gives the logits [B, j - i] of the ids
    from i to j, fp32; each block stays in the cache until it has been used."""
    parts = []  # of each block: best k, their ids, log-sum-exp relative to the best, the best
    for i in range(0, V, BLOCK):
        x = block(i, min(i + BLOCK, V))
        v, at = best_first(x, min(k, x.shape[1]))
        lse, top = -x.log_softmax(1).gather(1, at[:, :1]), v[:, :1]
        empty = top == float("-inf")  # no mass in this block
        lse, top = lse.masked_fill(empty, float("-inf")), top.masked_fill(empty, 0.0)
        parts.append((v, at + i, lse, top))
    v, at, lse, top = (torch.cat(x, 1) for x in zip(*parts))
    if len(parts) > 1:  # equal logits stand in id order already, and best_first keeps that
        v, order = best_first(v, k)
        at = at.gather(1, order)
    # Relative to the best logit: near -100, where GPT-2's logits lie, fp32 has steps of 1e-5.
    return v[:, 0], (lse + (top - v[:, :1])).logsumexp(-1), v, at


def draw(best: Tensor, lse: Tensor, values: Tensor, ids: Tensor, s: Settings) -> Drawn:
    """Draw from a `summary` with K candidates [B, K], by settings that `checked` returned."""
    usable = lse.isfinite()
    if not usable.all():
        values = torch.where(usable[:, None], values, 0.0)

    # Top-k: each row keeps its own first k candidates.
    K = values.shape[1]
    keep = torch.arange(K, device=values.device) < s.top_k[:, None]

    # Top-p on the renormalised rest: a token stays while the mass before it is below p.
    # A logit of -inf has no mass: kept or not, it is never drawn.
    heat = torch.where(s.temperature == 0, 1.0, s.temperature).double()
    mass = ((values.double() - values[:, :1]) / heat[:, None]).exp() * keep  # [B, K]
    share = mass / mass.sum(1, keepdim=True)
    before = share.cumsum(1) - share
    keep &= (before < s.top_p[:, None]) | (s.top_p[:, None] >= 1)
    keep[:, 0] = True  # the best token always stays

    # Inverse CDF over the kept tokens in id order.
    u = uniform(s.seed, s.streams, s.position)
    by_id = torch.where(keep, ids, MAX_ID).argsort(1)  # dropped ones go last
    cdf = (mass * keep).gather(1, by_id).cumsum(1)
    drawn = (cdf <= (u * cdf[:, -1])[:, None]).sum(1, keepdim=True)  # u < 1: it is a kept one
    rank = by_id.gather(1, drawn)
    tokens = torch.where(usable, ids.gather(1, rank).squeeze(1), -1)
    logprobs = values.gather(1, rank).squeeze(1) - best - lse
    return tokens, torch.where(usable, logprobs, float("nan"))


def score(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-prob fp32 [B] of given tokens [B]: hidden [B, C] against weight [V, C], the vocabulary in
    blocks, so that only B x BLOCK logits exist at a time."""
    hidden = hidden.float()
    parts = [(hidden @ rows.float().T).logsumexp(-1) for rows in weight.split(BLOCK)]
    return (hidden * weight[targets].float()).sum(-1) - torch.stack(parts).logsumexp(0)
