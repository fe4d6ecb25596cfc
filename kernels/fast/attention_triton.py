"""Attention of rows that share prompts in two kernels: the Triton form of attention.py.

The idea. One softmax over two lists of tokens needs no list of all scores. What a row has seen so far
is three things: the best score m, the sum s of exp(score - m), and acc, the sum of exp(score - m) *
value. More tokens can be added at any time, and the output is acc / s. So each list gets the shape
of program that suits it, and the second kernel goes on where the first one stopped.
  * `own_kernel`, one program per (row, head): no other row has these keys, so nothing is shared and
    products are multiplied and summed one by one. A piece of CHUNK tokens is contiguous (4 KB in
    bf16 at D = 64); each is read once, and only as many as the row has. Writes m, s and acc.
  * `prompt_kernel`, one program per (prompt, head): the J rows of a prompt are the rows of a matrix
    product (J = 25 fills 32), so the prompt's keys are read once for all of them. Starts from the
    rows' m, s and acc and writes the output.

Why two. With one program per (row, head) for both lists the prompt would be read J times. With one
per (prompt, head) there would be 96 programs for 200 rows, and each would walk through the own keys
of 25 rows one after another, while most of the GPU waits; and own keys are most of the bytes.
`own_kernel` is bound by memory: on Hopper 8 programs fit onto a multiprocessor at D = 64 in bf16, and
each asks for 8 KB at once, which is more than must be under way to keep memory busy.

Bytes of a layer, for C = H D and 2 bytes a number: 4 C for each own token of each row and each token
of each prompt, 4 C a row for q and out, and 8 C a row for acc (fp32, mostly in the L2 cache). On an
H100 this runs at 89 % of the bandwidth of a copy for 1,000 rows of 128 own tokens, and at 46 % for
200 rows of 64.

With fewer heads of keys than of queries, the H / K programs that share a head of keys each read it; all
but the first of them find it in the L2 cache.

Nothing here waits for the device or has a shape that depends on its data, so it can be captured in a
CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import Keys
from ..sample_score import FUSION

MAX_D = 128  # of a head; wider ones would not fit into registers


@triton.jit(do_not_specialize=("places", "chunks"))
def own_kernel(
    q, q_row, q_head, k, v, chunk_stride, slot_stride, head_stride, token_stride, t, place, places,
    chunks, slot_at, own_max, own_sum, own_acc, out, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (slot, head): m, s and acc [D] over a row's own tokens, and slot_at[its place] = slot.
    A slot without a row gets output 0. m is one for all tokens; s and acc are vectors over the
    places of a chunk, added at the end."""
    slot, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    cell = slot * H + h
    at = tl.load(place + slot)
    d, token = tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    inside = d < D
    if at < places:
        query = tl.load(q + slot * q_row + h * q_head + d, mask=inside, other=0.0).to(tl.float32)
        offsets = slot * slot_stride + h // GROUP * head_stride
        offsets += token[:, None] * token_stride + d[None, :]
        k_ptr, v_ptr = k + offsets, v + offsets
        m = float("-inf")
        s = tl.zeros([CHUNK], tl.float32)
        acc = tl.zeros([CHUNK, BLOCK_D], tl.float32)
        n_tokens = tl.minimum(tl.load(t + slot).to(tl.int32), chunks * CHUNK)
        for first in range(0, n_tokens, CHUNK):
            real = first + token < n_tokens
            mask = real[:, None] & inside[None, :]
            keys = tl.load(k_ptr, mask=mask, other=0.0).to(tl.float32)
            values = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(real, tl.sum(keys * query[None, :], 1), float("-inf"))
            higher = tl.maximum(m, tl.max(x, 0))
            fade, weight = tl.exp(m - higher), tl.exp(x - higher)
            s = s * fade + weight
            acc = acc * fade + weight[:, None] * values
            m = higher
            k_ptr += chunk_stride
            v_ptr += chunk_stride
        tl.store(own_max + cell, m)
        tl.store(own_sum + cell, tl.sum(s, 0))
        tl.store(own_acc + cell * D + d, tl.sum(acc, 0), mask=inside)
        tl.store(slot_at + at, slot.to(tl.int32))  # the same from every head
    else:
        tl.store(out + cell * D + d, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("n", "J", "P"))
def prompt_kernel(
    q, q_row, q_head, k, v, group_stride, head_stride, token_stride, lengths, place, slot_at,
    own_max, own_sum, own_acc, out, n, J, P, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (prompt and head, tile of its J places): adds the prompt's tokens to what the rows'
    own tokens gave, and writes the output.

    slot_at holds anything at a place without a row, also what looks like a slot. So an entry counts
    only if that slot says that it stands here; this saves a kernel that clears the table."""
    g, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    at = g * J + j
    slot = tl.load(slot_at + at, mask=j < J, other=-1).to(tl.int64)
    possible = (slot >= 0) & (slot < n)
    live = possible & (tl.load(place + slot, mask=possible, other=-1) == at)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    row_mask = live[:, None] & inside[None, :]
    q_ptr = q + (slot * q_row + h * q_head)[:, None] + d[None, :]
    queries = tl.load(q_ptr, mask=row_mask, other=0.0)
    cell = slot * H + h
    m = tl.load(own_max + cell, mask=live, other=0.0)
    s = tl.load(own_sum + cell, mask=live, other=1.0)
    acc = tl.load(own_acc + cell[:, None] * D + d[None, :], mask=row_mask, other=0.0)
    start = g * group_stride + h // GROUP * head_stride
    n_tokens = tl.minimum(tl.load(lengths + g).to(tl.int32), P)
    n_tokens = tl.where(tl.max(live.to(tl.int32), 0) > 0, n_tokens, 0)
    for first in range(0, n_tokens, BLOCK_P):
        token = first + tl.arange(0, BLOCK_P)
        real = token < n_tokens
        offsets = start + token[:, None] * token_stride + d[None, :]
        mask = real[:, None] & inside[None, :]
        keys = tl.load(k + offsets, mask=mask, other=0.0)
        values = tl.load(v + offsets, mask=mask, other=0.0)
        x = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        x = tl.where(real[None, :], x, float("-inf"))
        higher = tl.maximum(m, tl.max(x, 1))
        fade, weights = tl.exp(m - higher), tl.exp(x - higher[:, None])
        s = s * fade + tl.sum(weights, 1)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * fade[:, None], input_precision=PRECISION)
        m = higher
    result = (acc / s[:, None]).to(out.dtype.element_ty)
    tl.store(out + cell[:, None] * D + d[None, :], result, mask=row_mask)


def supported(q: Tensor, keys: Keys) -> bool:
    """Heads of up to MAX_D numbers that lie side by side; values laid out as their keys are."""
    same = keys.shared_k.stride() == keys.shared_v.stride()
    same = same and keys.own_k.stride() == keys.own_v.stride()
    near = all(x.stride(-1) == 1 for x in (q, keys.shared_k, keys.own_k))
    return same and near and q.shape[2] <= MAX_D


def tiles(J: int, D: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """BLOCK_D, BLOCK_J, BLOCK_P, and the warps of both kernels, such that nothing spills."""
    fp32 = dtype == torch.float32  # its products are done without tensor cores
    block_d = max(16, triton.next_power_of_2(D))
    block_j = 16 if J <= 16 else 32
    block_p = 32 if fp32 or block_d == 16 else 64
    return block_d, block_j, block_p, max(1, block_d // 64), 8 if fp32 else 4


def launch(q: Tensor, keys: Keys, t: Tensor, place: Tensor, J: int) -> Tensor:
    """attention.shared_attention for what is `supported`; n > 0."""
    shared_k, shared_v, lengths, own_k, own_v = keys
    (n, H, D), (G, K, P, _), (chunks, _, _, chunk, _) = q.shape, shared_k.shape, own_k.shape
    block_d, block_j, block_p, own_warps, warps = tiles(J, D, q.dtype)
    out = torch.empty(n, H, D, dtype=q.dtype, device=q.device)
    own_acc = torch.empty(n, H, D, dtype=torch.float32, device=q.device)
    own_max, own_sum = torch.empty(2, n, H, dtype=torch.float32, device=q.device)
    slot_at = torch.empty(G * J, dtype=torch.int32, device=q.device)
    lengths, t, place = lengths.contiguous(), t.contiguous(), place.contiguous()
    queries = (q, q.stride(0), q.stride(1))
    own_kernel[(n * H,)](
        *queries, own_k, own_v, *own_k.stride()[:4], t, place, G * J, chunks,
        slot_at, own_max, own_sum, own_acc, out, H,
        D=D, BLOCK_D=block_d, CHUNK=chunk, GROUP=H // K, num_warps=own_warps, **FUSION,
    )  # fmt: skip
    prompt_kernel[(G * H, triton.cdiv(J, block_j))](
        *queries, shared_k, shared_v, *shared_k.stride()[:3], lengths, place, slot_at,
        own_max, own_sum, own_acc, out, n, J, P, H,
        D=D, BLOCK_D=block_d, BLOCK_J=block_j, BLOCK_P=block_p,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", GROUP=H // K,
        num_warps=warps, num_stages=2, **FUSION,
    )  # fmt: skip
    return out
