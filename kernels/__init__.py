"""One step of sampling: the next token under temperature, top-k and top-p, and its exact log-prob;
and the attention of rows that share prompts.

    from kernels import sample_and_score
    tokens, logprobs = sample_and_score(logits, temperature=0.8, top_k=10, top_p=0.95, seed=1)

reference.py is the definition and what runs on the CPU; cpu.py makes it quick there. On CUDA the
Triton kernels run: sample_score.py from logits, head_sample_score.py from hidden states. Attention is
defined in attention.py; attention_triton.py is what runs on CUDA. They need nothing else of this
repository. Read the files in this order.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor

from kernels import attention, cpu, reference

# Timed on an H100 at V = 50,257: in bf16 the fused head takes 1.04 to 1.15 times as long as a padded
# product and the one-pass kernel at 25 rows, 1.3 to 1.7 times at 250 and 1,000. In fp32 it is 1.1
# times as slow at 25 and 1.04 to 1.08 times as fast at more. It needs no memory for logits.
FUSE_ROWS = 16  # in bf16 and fp16
BACKENDS = (None, "reference", "triton")  # None: Triton on CUDA, the reference elsewhere


def use_triton(x: Tensor, backend: str | None) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    return backend == "triton" or (backend is None and x.is_cuda)


def on_its_device(f: Callable) -> Callable:
    """`f`, launched on the GPU of its tensors: Triton takes the current one."""

    @wraps(f)
    def g(*args, **given):
        x = next(x for x in (*args, *given.values()) if isinstance(x, Tensor))
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return f(*args, **given)

    return g


def highest(top_k, temperature, settled: Tensor) -> int:
    """The largest top_k of a step. Numbers cost nothing; a tensor on a GPU is waited for (give a
    number where the step is captured in a CUDA graph)."""
    if not isinstance(temperature, Tensor) and temperature == 0:
        return 1
    if isinstance(top_k, Tensor):
        return int(settled.max()) if len(settled) else 1
    return top_k if top_k > 0 else 2**31


@on_its_device
def sample_and_score(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seed: int = 0,
    streams: Tensor | None = None,
    position: int | Tensor = 0,
    backend: str | None = None,
    **launch,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits [B, V] (fp32, bf16 or fp16; rows may be strided) and score
    it: tokens int64 [B], logprobs fp32 [B]. The contract is reference.sample_and_score's. `launch`
    goes to the kernel's launcher (block, parts)."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given |= {"streams": streams, "position": position}
    if not use_triton(logits, backend):
        return reference.sample_and_score(logits, seed=seed, **given)
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be float [B, V], not {logits.dtype} {list(logits.shape)}")
    from kernels import sample_score  # here, so that machines without Triton can import the rest

    if logits.stride(1) != 1:
        logits = logits.contiguous()
    heat, k, p, streams, position = reference.checked(logits, logits.shape[1], **given)
    if len(logits) == 0:
        return streams, logits.float().sum(1)
    max_k = min(highest(top_k, temperature, k), logits.shape[1])
    return sample_score.launch(logits, heat, k, p, max_k, seed, streams, position, **launch)


@on_its_device
def head_sample_and_score(
    hidden: Tensor,
    weight: Tensor | cpu.Head,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seed: int = 0,
    streams: Tensor | None = None,
    position: int | Tensor = 0,
    backend: str | None = None,
    n_vocab: int | None = None,
    **launch,
) -> tuple[Tensor, Tensor]:
    """sample_and_score of the logits hidden [B, C] @ weight [V, C].T, which are not stored on a
    CPU, nor on a GPU if top_k is 1 to 64 and B at most FUSE_ROWS or both in fp32, or `launch` (blocks)
    is given to the fused kernel; else they are computed first, in fp32. Both of one dtype: fp32, bf16,
    fp16; sums are fp32. Rows of the weight from `n_vocab` on are padding: a bf16 product is several
    times as quick on a GPU if there are a multiple of 8. On a CPU, `cpu.prepare(weight, ..)` in place
    of an fp32 weight reads it in bf16, at nearly fp32's accuracy (and stores rough logits)."""
    head, weight = (weight, weight.weight) if isinstance(weight, cpu.Head) else (None, weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; give both one dtype")
    V = len(weight) if n_vocab is None else n_vocab
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given |= {"streams": streams, "position": position}
    fused = use_triton(hidden, backend)
    if not len(hidden) or not (fused or hidden.device.type == "cpu"):
        logits = fp32_product(hidden, weight)[:, :V]
        return sample_and_score(logits, seed=seed, backend=backend, **given)
    heat, k, p, streams, position = reference.checked(hidden, V, **given)
    max_k = min(highest(top_k, temperature, k), V)
    if not fused:
        u = reference.uniform(seed, streams, position)
        if head and max_k <= cpu.MAX_K:
            found = cpu.screen(hidden, head, k)
        else:
            found = reference.summary(cpu.blocks(hidden, weight), V, int(k.max()))
        return reference.draw(*found, heat, k, p, u)
    from kernels import head_sample_score, sample_score

    few = len(hidden) <= FUSE_ROWS or hidden.dtype is torch.float32
    if max_k <= sample_score.MAX_K and (launch or few):
        hidden, weight = hidden.contiguous(), weight[:V].contiguous()
        settings = (heat, k, p, max_k, seed, streams, position)
        return head_sample_score.launch(hidden, weight, *settings, **launch)
    logits = fp32_product(hidden, weight)[:, :V]
    return sample_and_score(logits, seed=seed, backend=backend, **given)


@on_its_device
def score(
    hidden: Tensor, weight: Tensor, targets: Tensor, backend: str | None = None, **launch
) -> Tensor:
    """Log-probs fp32 [B] of given tokens int64 [B] under softmax(hidden @ weight.T); the logits are
    never all in memory."""
    if use_triton(hidden, backend) and len(hidden):
        from kernels import head_sample_score

        return head_sample_score.launch_score(
            hidden.contiguous(), weight.contiguous(), targets, **launch
        )
    return reference.score(hidden, weight, targets)


@on_its_device
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
    backend: str | None = None,
) -> Tensor:
    """attention.shared_attention: out [n, H, D] of queries that attend to the prompts they share and
    to their own tokens. On CUDA in two Triton kernels, if heads have at most 128 numbers."""
    given = (q, shared_k, shared_v, lengths, own_k, own_v, t, place, J)
    if use_triton(q, backend) and len(q):
        from kernels import attention_triton

        if attention_triton.supported(q, shared_k, shared_v, own_k, own_v):
            return attention_triton.launch(*given)
        if backend:
            raise ValueError(f"no attention kernel for this layout or heads of {q.shape[2]}")
    own = (cpu.own_scores, cpu.own_sum) if q.device.type == "cpu" and not backend else ()
    return attention.shared_attention(*given, *own)


def fp32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T as fp32 [B, V], not rounded to a lower dtype on the way."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def bf16_pieces(x: Tensor, weight: bool) -> Tensor:
    """fp32 [N, C] -> bf16 [N, 3 C] such that pieces(h) @ pieces(w).T is h @ w.T up to about 2^-16
    of the terms: [hi, lo, hi] for hidden states against [hi, hi, lo] for the weight."""
    hi = x.bfloat16()
    lo = (x - hi.float()).bfloat16()
    return torch.cat([hi, hi, lo] if weight else [hi, lo, hi], -1)
