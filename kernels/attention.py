"""Attention of rows that share prompts: its definition, in plain PyTorch.

A row is one continuation of a prompt. Its query attends to the prompt's keys, of which there is one
copy for all J rows of a question, and to the keys of its own tokens; both meet in one softmax.

Letters: n rows, G prompts of J rows each, P prompt tokens (padded), H heads of width D. The own keys
of a row stand in pieces ("chunks") of CHUNK tokens: piece c of all rows is contiguous.
"""

import torch
from torch import Tensor

CHUNK = 32  # own tokens of a row in one piece


def shared_attention(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    lengths: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    t: Tensor,
    place: Tensor,
    J: int,
    longest: int | None = None,
) -> Tensor:
    """out [n, H, D] of scaled queries q [n, H, D], all in one dtype (fp32 or bf16).

    shared_k, shared_v  [G, H, P, D], of which lengths [G] tokens are real
    own_k, own_v        [chunks, n, H, CHUNK, D], of which each row's first t [n] tokens are real
    place               int64 [n]: row j of prompt g stands at g * J + j, no two rows at one place;
                        G * J for a slot without a row, whose output means nothing
    longest             the largest t where the host knows it: less is read

    What is not real must be finite. Sums and softmax are fp32."""
    (G, _, P, _), T = shared_k.shape, longest or own_k.shape[0] * CHUNK
    pieces = [slice(0, T - i) for i in range(0, T, CHUNK)]  # of tokens, in each chunk
    at = place.clamp(max=G * J - 1)

    def by_prompt(x: Tensor) -> Tensor:  # [n, H, X] -> [G, H, J, X]
        full = x.new_zeros(G * J + 1, *x.shape[1:]).index_copy_(0, place, x)
        return full[:-1].unflatten(0, (G, J)).transpose(1, 2)

    def by_row(x: Tensor) -> Tensor:  # [G, H, J, X] -> [n, H, X]
        return x.transpose(1, 2).flatten(0, 1)[at]

    ends = torch.stack([lengths[at // J], t], 1)[:, :, None]  # [n, 2, 1]
    real = [torch.arange(x, device=q.device) < ends[:, i] for i, x in enumerate((P, T))]
    mask = torch.where(torch.cat(real, 1), 0.0, float("-inf"))[:, None]  # [n, 1, P + T]
    scores = [by_row(by_prompt(q) @ shared_k.mT)]  # [n, H, P]
    scores += [(q[:, :, None] @ x[:, :, s].mT)[:, :, 0] for x, s in zip(own_k, pieces)]
    w = (torch.cat(scores, -1).float() + mask).softmax(-1).to(q.dtype)  # [n, H, P + T]
    out = by_row(by_prompt(w[..., :P]) @ shared_v)  # [n, H, D]
    for weights, x, s in zip(w[:, :, None, P:].split(CHUNK, -1), own_v, pieces):
        out = out + (weights @ x[:, :, s])[:, :, 0]
    return out
