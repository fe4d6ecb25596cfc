"""Attention of rows that share prompts: its definition, in plain PyTorch.

A row is one continuation of a prompt. Its query attends to the prompt's keys, of which there is one
copy for all J rows, and to the keys of its own tokens; both meet in one softmax.

Letters: n rows, G prompts of J rows each, P prompt tokens (padded), H heads of width D. Keys and
values may have fewer heads, K of them: each then serves H / K heads of queries, which stand side by
side. The own keys of a row stand in pieces ("chunks") of CHUNK tokens: piece c of all rows is contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 32  # own tokens of a row in one piece


class Keys(NamedTuple):
    """What the rows attend to, keys and values. What lies behind their tokens must be finite."""

    shared_k: Tensor  # [G, K, P, D], the prompts
    shared_v: Tensor
    lengths: Tensor  # [G], tokens of each prompt
    own_k: Tensor  # [chunks, n, K, CHUNK, D], the rows' own tokens
    own_v: Tensor


def own_scores(q: Tensor, own_k: Tensor) -> Tensor:
    """Each query [n, H, D] times its row's own keys [chunks, n, K, CHUNK, D]: [n, H, chunks * CHUNK]."""
    q = q.unflatten(1, (own_k.shape[2], -1))  # [n, K, H / K, D]
    return torch.cat([q @ x.mT for x in own_k], -1).flatten(1, 2)


def own_sum(w: Tensor, own_v: Tensor) -> Tensor:
    """Sum [n, H, D] of each row's own values [chunks, n, K, CHUNK, D], weighted by [n, H, chunks * CHUNK]."""
    pieces = zip(w.unflatten(1, (own_v.shape[2], -1)).split(CHUNK, -1), own_v)
    return sum(weights @ x for weights, x in pieces).flatten(1, 2)


def shared_attention(
    q: Tensor, keys: Keys, t: Tensor, place: Tensor, J: int, own_scores=own_scores, own_sum=own_sum
) -> Tensor:
    """out [n, H, D] of scaled queries q [n, H, D], all in one dtype (fp32 or bf16); sums are fp32.

    Of row i the first t[i] own tokens are real. place[i] is g * J + j for row j of prompt g, and G * J
    for a slot without a row, whose output means nothing; no two rows have one place. `own_scores`
    and `own_sum` may be quicker ways (fast/cpu.py)."""
    shared_k, shared_v, lengths, own_k, own_v = keys
    (n, H, _), (G, K, P, _), T = q.shape, shared_k.shape, own_k.shape[0] * CHUNK
    if n == 0:
        return q
    at, heads = place.clamp(max=G * J - 1), torch.arange(H, device=q.device)
    # The row of each place (any where there is none), and both orders as rows of a table.
    row = torch.zeros(G * J + 1, dtype=torch.long, device=q.device)
    row = row.index_copy_(0, place, torch.arange(n, device=q.device))[:-1].view(G, 1, J)
    there = (row * H + heads[:, None]).flatten()  # [G * H * J] of n * H
    back = ((at // J * H)[:, None] + heads) * J + (at % J)[:, None]  # [n, H] of G * H * J

    def by_prompt(x: Tensor) -> Tensor:  # [n, H, X] -> [G, K, H / K * J, X]
        return x.flatten(0, 1).index_select(0, there).view(G, K, -1, x.shape[-1])

    def by_row(x: Tensor) -> Tensor:  # [G, K, H / K * J, X] -> [n, H, X]
        return x.flatten(0, 2).index_select(0, back.flatten()).view(n, H, x.shape[-1])

    ends = torch.stack([lengths[at // J], t], 1)[:, :, None]  # [n, 2, 1]
    real = [torch.arange(x, device=q.device) < ends[:, i] for i, x in enumerate((P, T))]
    mask = torch.where(torch.cat(real, 1), 0.0, float("-inf"))[:, None].to(q.dtype)  # [n, 1, P + T]
    scores = by_row(by_prompt(q) @ shared_k.mT), own_scores(q, own_k)  # [n, H, P], [n, H, T]
    w = (torch.cat(scores, -1) + mask).softmax(-1)  # sums in fp32 also if the scores are bf16
    out = by_row(by_prompt(w[..., :P]) @ shared_v)  # [n, H, D]
    return out + own_sum(w[..., P:], own_v)
