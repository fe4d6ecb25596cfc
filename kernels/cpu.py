"""What makes one step quick on a CPU: the products, and a bf16 head that is as good as fp32.

`linear` picks the library of a product. fp32 goes to oneDNN, which PyTorch otherwise keeps for bf16,
where that was seen to be quicker than MKL on an AMD EPYC: with AVX-512 1.1 to 1.7 times, with AVX2
only where the output is wide. bf16 on a CPU without instructions for it is multiplied as fp32, some
eight times as fast as PyTorch does it there: products of bf16 numbers are exact in fp32.

`screen` reads the vocabulary once in bf16 and then computes exactly what decides the draw. GPT-2's
logits lie near -100, where bf16 numbers are 0.5 apart, so the rounded product is of no use as it
stands. Two things mend it:
    1. Centre. What all tokens share (the mean row of the weight) and what all hidden states share
       (their mean) make up nearly all of the -100. Both are taken out before rounding and added
       exactly afterwards; what is rounded is the small rest.
    2. Look again. The 32 best tokens of each row are computed anew in fp32: the draw and the score
       use these. The others enter the log-sum-exp only, where their errors average out.
A row whose k-th best exact logit does not stand clear of the 32nd rough one is computed in full.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import BLOCK, best_first, summary

CANDIDATES = 32  # tokens of a row that are computed again in fp32
MAX_K = 16  # largest top-k that is screened
GROUP = 16  # logits of a row of which only the largest is looked at first


def has_bf16() -> bool:
    """Is bf16 quicker than fp32 on this CPU, or at least not slower by much? (AVX-512, AMX, Arm)"""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., I] @ weight [O, I].T + bias, as F.linear, in x's dtype; sums are fp32."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or weight.numel() <= 2**16:
        return F.linear(x, weight, bias)
    if x.dtype is torch.bfloat16 and not has_bf16():
        bias = None if bias is None else bias.float()
        return linear(x.float(), weight.float(), bias).bfloat16()
    wide = len(weight) >= 4096 or torch.backends.cpu.get_cpu_capability() == "AVX512"
    if x.dtype is torch.float32 and wide and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def blocks(hidden: Tensor, weight: Tensor) -> Callable[[int, int], Tensor]:
    """The logits hidden [B, C] @ weight [V, C].T as `reference.summary` asks for them: fp32."""
    hidden = hidden.float()
    return lambda i, j: linear(hidden, weight[i:j].float())


class Head(NamedTuple):
    """A head [V, C] made ready for `screen`: for any h, weight @ h is
    rough @ (h - centre) + base + mean @ (h - centre), but for the rounding of `rough`."""

    weight: Tensor  # fp32 [V, C]
    rough: Tensor  # bf16 [V, C], weight - mean
    mean: Tensor  # fp32 [C], the mean row of the weight
    centre: Tensor  # fp32 [C], a typical hidden state
    base: Tensor  # fp32 [V], weight @ centre
    scratch: Tensor  # fp32 [rows, W], the rough logits; W is V rounded up, -inf beyond V


def prepare(weight: Tensor, hidden: Tensor, rows: int) -> Head:
    """Head of a weight [V, C] for up to `rows` hidden states like `hidden` [B, C], all fp32."""
    mean, centre = weight.mean(0), hidden.mean(0)
    width = -(-len(weight) // GROUP) * GROUP
    scratch = torch.full((rows, width), float("-inf"))
    return Head(weight, (weight - mean).bfloat16(), mean, centre, weight @ centre, scratch)


def screen(hidden: Tensor, head: Head, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.summary` of the logits hidden [B, C] @ weight.T with CANDIDATES entries, of which
    each row's first k (int64 [B], at most MAX_K) are those of an fp32 product."""
    B, V = len(hidden), len(head.weight)
    if V <= GROUP * CANDIDATES:
        return summary(blocks(hidden, head.weight), V, min(V, CANDIDATES))
    rest = hidden - head.centre  # [B, C]
    rounded, shared = rest.bfloat16(), rest @ head.mean  # [B, C], [B]
    rough, parts = head.scratch[:B], []  # [B, W]
    for i in range(0, V, BLOCK):
        x = rough[:, i : min(i + BLOCK, V)]
        x.copy_(rounded @ head.rough[i : i + BLOCK].T).add_(head.base[i : i + BLOCK])
        top = x.amax(1, keepdim=True)
        parts.append((x - top).exp_().sum(1).log() + top[:, 0])
    total = torch.stack(parts, 1).logsumexp(1)  # [B]
    # A row's 32 best tokens stand in the 32 columns of this [GROUP, W / GROUP] table that have the
    # best maxima.
    table = rough.unflatten(1, (GROUP, -1))
    columns = table.amax(1).topk(CANDIDATES).indices  # [B, CANDIDATES]
    ids = (columns[:, None] + torch.arange(GROUP)[:, None] * table.shape[2]).flatten(1)
    near, order = rough.gather(1, ids).topk(CANDIDATES)
    ids = ids.gather(1, order)
    exact = (hidden[:, None] @ F.embedding(ids, head.weight).mT)[:, 0]  # [B, CANDIDATES]
    # In the sum, the candidates' exact mass takes the place of their rough mass.
    others = (1 - (near - total[:, None]).exp().sum(1)).clamp(min=0).log() + total + shared
    top = exact.amax(1)
    lse = torch.cat([exact - top[:, None], (others - top)[:, None]], 1).logsumexp(1)
    values, order = best_first(exact, CANDIDATES)
    found = top, lse, values, ids.gather(1, order)
    near = near + shared[:, None]
    worst_error = (near - exact).abs().amax(1)
    kth = values.gather(1, k[:, None] - 1)[:, 0]
    unsure = ~(kth > near[:, -1] + 4 * worst_error)  # also where anything is NaN
    if unsure.any():
        again = summary(blocks(hidden[unsure], head.weight), V, CANDIDATES)
        for x, y in zip(found, again):
            x[unsure] = y
    return found
