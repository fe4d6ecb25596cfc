"""What makes one step quick on a CPU: the products, and a bf16 head that is as good as fp32.

`linear` picks the library of a product, in training too (`Linear`). fp32 goes to oneDNN, which was
1.1 to 2.2 times as quick as MKL on an AMD EPYC with AVX-512 (with AVX2 only where the output is wide).
On a CPU without instructions for bf16, bf16 is multiplied as fp32: products of bf16 numbers are exact
there, and PyTorch's own way is some eight times as slow.

`screen` reads the vocabulary once in bf16 and then computes exactly what decides the draw. GPT-2's
logits lie near -100, where bf16 numbers are 0.5 apart, so rounded logits alone are of no use.
    1. Centre. What all tokens share (the mean row of the weight) and what all hidden states share
       (their mean) make up nearly all of the -100. Both are taken out before rounding and added
       exactly afterwards; what is rounded is the small rest.
    2. Look again. The 32 best tokens of each row are computed anew in fp32: the draw and the score
       use these. The others enter the log-sum-exp only, where their errors average out.
A row whose k-th best exact logit does not stand clear of the 32nd rough one is computed in full.

`own_scores` and `own_sum` are a row's attention to its own tokens. Each row has its own keys and
values, so these are thousands of products of one vector with a small matrix, bound by memory. An
embedding bag is the sum of some rows of a table, each with its weight, and PyTorch reads its rows
faster than it multiplies. Keys must be laid out for it: for each number of a head, those of all CHUNK
tokens side by side.
"""

import platform
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import attention
from ..reference import BLOCK, best_first, summary
from .largest import GROUP

X86_BF16 = ("amx_tile", "avx512_bf16")  # of torch.cpu's private tests, which may go away
CANDIDATES = 32  # tokens of a row that are computed again in fp32
MAX_K = 16  # largest top-k that is screened


def has_bf16() -> bool:
    """Has this CPU instructions for bf16 products? (oneDNN also does them without, slowly.)"""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    if not (torch.backends.mkldnn.is_available() and supported()):
        return False
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in X86_BF16]
    return platform.machine() not in ("x86_64", "AMD64") or any(f() for f in known if f)


@lru_cache(1)
def onednn_is_right() -> bool:
    """Try PyTorch's private operator for oneDNN once, in each dtype that uses it, on a small product
    with a bias and a GELU. Where it fails or differs from F.linear, `linear` uses F.linear."""
    x, w, b = (torch.arange(n) for n in (120, 960, 24))
    x, w, b = x.sin().view(3, 40), w.cos().view(40, 24).t(), b.sin()
    wanted = F.gelu(F.linear(x, w, b), approximate="tanh")
    try:
        with torch.inference_mode():
            for dtype, off in ((torch.float32, 1e-4), (torch.bfloat16, 0.05))[: 1 + has_bf16()]:
                given = (t.to(dtype) for t in (x, w, b))
                found = torch.ops.mkldnn._linear_pointwise(*given, "gelu", [], "tanh")
                if found.dtype is not dtype or not ((found - wanted).abs() < off).all():
                    return False
    except Exception:  # whatever another version of PyTorch or another CPU makes of it
        return False
    return True


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu_tanh: bool = False
) -> Tensor:
    """x [.., I] @ weight [O, I].T + bias, as F.linear, in x's dtype; sums are fp32. `gelu_tanh`: of
    that F.gelu(.., approximate="tanh"), which oneDNN takes before the sums leave its registers."""
    act = partial(F.gelu, approximate="tanh") if gelu_tanh else lambda x: x
    bf16, wants_gradient = x.dtype is torch.bfloat16, torch.is_grad_enabled()
    quick = (
        x.device.type == "cpu"
        and weight.numel() > 2**16
        and (bf16 or x.dtype is torch.float32)
        and all(t is None or t.dtype is x.dtype for t in (weight, bias))
        and not torch.is_autocast_enabled("cpu")
    )
    if not quick or (bf16 and wants_gradient):
        return act(F.linear(x, weight, bias))
    if wants_gradient:
        return act(Linear.apply(x, weight, bias))
    if bf16 and not has_bf16():
        bias = None if bias is None else bias.float()
        return linear(x.float(), weight.float(), bias, gelu_tanh).bfloat16()
    wide = len(weight) >= 4096 or torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (torch.backends.mkldnn.is_available() and (bf16 or wide) and onednn_is_right()):
        return act(F.linear(x, weight, bias))
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its strides
    given = ("gelu", [], "tanh") if gelu_tanh else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *given)


class Linear(torch.autograd.Function):
    """`linear` with gradients: they are two more of its products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        wanted, rows = ctx.needs_input_grad, g.flatten(0, -2)  # [N, O]
        return (
            linear(g, weight.t()) if wanted[0] else None,
            linear(rows.t(), x.flatten(0, -2).t()) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


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
    scratch: Tensor  # fp32 [blocks, rows, BLOCK], the rough logits; -inf beyond V


def prepare(weight: Tensor, hidden: Tensor, rows: int) -> Head:
    """Head of a weight [V, C] for up to `rows` hidden states like `hidden` [B, C], all fp32."""
    mean, centre = weight.mean(0), hidden.mean(0)
    scratch = torch.full((-(-len(weight) // BLOCK), rows, BLOCK), float("-inf"))
    rough = torch.empty_like(weight, dtype=torch.bfloat16)
    for x, y in zip(rough.split(BLOCK), weight.split(BLOCK)):  # no second weight in fp32
        x.copy_(y - mean)
    return Head(weight, rough, mean, centre, weight @ centre, scratch)


def screen(hidden: Tensor, head: Head, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.summary` of the logits hidden [B, C] @ weight.T with CANDIDATES entries, of which
    each row's first k (int64 [B], at most MAX_K) are those of an fp32 product."""
    B, V = len(hidden), len(head.weight)
    if V <= CANDIDATES:
        return summary(blocks(hidden, head.weight), V, V)
    rest = hidden - head.centre  # [B, C]
    rounded, shared = rest.bfloat16(), rest @ head.mean  # [B, C], [B]
    rough, width = head.scratch[:, :B], BLOCK // GROUP
    sums, maxima = [], []
    for i, x in zip(range(0, V, BLOCK), rough):  # x [B, BLOCK] stays in the cache
        part = rounded @ head.rough[i : i + BLOCK].T
        x[:, : part.shape[1]].copy_(part).add_(head.base[i : i + BLOCK])
        sums.append(x[:, 0] - x.log_softmax(1)[:, 0])
        maxima.append(x.unflatten(1, (GROUP, width)).amax(1))
    total = torch.stack(sums, 1).logsumexp(1)  # [B]
    # The best tokens stand in those columns of GROUP that have the best maxima.
    column = torch.cat(maxima, 1).topk(CANDIDATES).indices  # [B, CANDIDATES]
    first = column // width * BLOCK + column % width
    ids = (first[:, None] + torch.arange(0, BLOCK, width)[:, None]).flatten(1)
    near, order = rough[ids // BLOCK, torch.arange(B)[:, None], ids % BLOCK].topk(CANDIDATES)
    ids = ids.gather(1, order).clamp(max=V - 1)  # beyond V only if the row is unusable
    ids, by_id = ids.sort(1)  # of equal logits the lowest id is the better one
    border, near = near[:, -1] + shared, near.gather(1, by_id)
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
    unsure = ~(kth > border + 4 * worst_error)  # also where anything is NaN
    if unsure.any():
        again = summary(blocks(hidden[unsure], head.weight), V, CANDIDATES)
        for x, y in zip(found, again):
            x[unsure] = y
    return found


def own_scores(q: Tensor, own_k: Tensor) -> Tensor:
    """attention.own_scores: the keys' numbers of all tokens, summed with the query as weights."""
    pieces = own_k.mT  # [chunks, n, H, D, CHUNK]
    if not in_rows(pieces):
        return attention.own_scores(q, own_k)
    group = q.shape[1] // own_k.shape[2]
    rows = row_numbers(pieces.shape, pieces.stride(), group)  # [n, H, chunks, D]
    sums = bags(rows.flatten(0, 2), q[:, :, None].expand(rows.shape), pieces)
    return sums.view(*q.shape[:2], -1)  # [n, H, chunks * CHUNK]


def own_sum(w: Tensor, own_v: Tensor) -> Tensor:
    """attention.own_sum: the values of all tokens, summed with w as weights."""
    if not in_rows(own_v):
        return attention.own_sum(w, own_v)
    group = w.shape[1] // own_v.shape[2]
    rows = row_numbers(own_v.shape, own_v.stride(), group)  # [n, H, chunks, CHUNK]
    return bags(rows.flatten(2).flatten(0, 1), w, own_v).view(*w.shape[:2], -1)


def in_rows(pieces: Tensor) -> bool:
    """Is the memory of [chunks, n, K, R, X] a table of rows of X numbers, of which it is a part?"""
    *strides, last = pieces.stride()
    end = sum((n - 1) * s for n, s in zip(pieces.shape, strides))
    whole = last == 1 and not any(s % pieces.shape[-1] for s in strides)
    return pieces.numel() > 0 and whole and end // pieces.shape[-1] < 2**31  # rows are int32


@lru_cache(4)
@torch.inference_mode(False)  # what is kept serves any later caller
def row_numbers(shape: tuple[int, ...], strides: tuple[int, ...], group: int) -> Tensor:
    """Where the rows of pieces [chunks, n, K, R, X] stand in the table: int32 [n, H, chunks, R];
    `group` heads of queries share a head of keys."""
    chunk, slot, head, row = (
        torch.arange(n, dtype=torch.int32) * (s // shape[-1]) for n, s in zip(shape[:-1], strides)
    )
    head = head.repeat_interleave(group)  # [H]
    return (slot[:, None] + head)[..., None, None] + chunk[:, None] + row


def bags(rows: Tensor, weights: Tensor, pieces: Tensor) -> Tensor:
    """Sum [bags, X] of a bag's rows [bags, R] of the pieces [.., X], each times its weight."""
    X = pieces.shape[-1]
    table = pieces.as_strided((int(rows[-1, -1]) + 1, X), (X, 1))
    return F.embedding_bag(rows, table, per_sample_weights=weights.reshape(rows.shape), mode="sum")
