"""One step of sampling: the next token under temperature, top-k and top-p, and its exact log-prob;
and the attention of rows that share prompts.

    from sert_min.kernels import sample_and_score
    tokens, logprobs = sample_and_score(logits, temperature=0.8, top_k=10, top_p=0.95, seed=1)

reference.py and attention.py are the definitions, in plain PyTorch. On a CUDA GPU the Triton kernels
run: sample_score.py, and in fast/ head_sample_score.py, search.py and attention_triton.py. On a CPU
fast/cpu.py makes the definitions quick. This folder needs nothing else of the repository; README.md
explains it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor

from . import attention, check, reference
from .fast import cpu
from .reference import Settings

# Timed on an H100 at V = 50,257: in bf16 the fused head takes 1.04 to 1.15 times as long as a padded
# product and the one-pass kernel at 25 rows, 1.3 to 1.7 times at 250 and 1,000. In fp32 it is 1.1
# times as slow at 25 and 1.04 to 1.08 times as fast at more. It needs no memory for logits.
FUSE_ROWS = 16  # in bf16 and fp16
BACKENDS = (None, "reference", "triton")  # None: Triton on CUDA if it works, else the reference


def use_triton(x: Tensor, backend: str | None) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    if backend is None and x.is_cuda:
        return len(x) > 0 and not check.problem(x.device)
    return len(x) > 0 and backend == "triton"


def on_its_device(f: Callable) -> Callable:
    """`f`, launched on the GPU of its first tensor: Triton would take the current one."""

    @wraps(f)
    def g(x: Tensor, *args, **given):
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return f(x, *args, **given)

    return g


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
    it: tokens int64 [B], logprobs fp32 [B]. The contract is that of reference.Settings and
    reference.sample_and_score. `launch` (block, parts) goes to the one-pass kernel."""
    s = Settings(temperature, top_k, top_p, seed, streams, position)
    if not use_triton(logits, backend):
        return reference.sample_and_score(logits, s)
    from . import sample_score  # here, so that machines without Triton can import the rest
    from .fast import search

    s, max_k = reference.checked(logits, logits.shape[-1], s)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if max_k > sample_score.MAX_K:
        return search.launch(logits, s)
    return sample_score.launch(logits, s, max_k, **launch)


@on_its_device
def head_sample_and_score(
    hidden: Tensor, weight: Tensor | cpu.Head, n_vocab=None, backend=None, blocks=None, **settings
) -> tuple[Tensor, Tensor]:
    """sample_and_score, with its settings, of the logits hidden [B, C] @ weight [V, C].T, fp32 sums
    of two tensors of one dtype (fp32, bf16, fp16). Rows of the weight from `n_vocab` on are padding.

    The logits are not stored on a CPU, nor by the fused kernel of a GPU. That runs for top_k 1 to 64
    in fp32, or up to FUSE_ROWS rows, or if `blocks` are given to it; else the product comes first.
    On a CPU, `cpu.prepare(weight, ..)` in place of an fp32 weight reads it in bf16, at nearly fp32's
    accuracy (and stores rough logits)."""
    head, weight = (weight, weight.weight) if isinstance(weight, cpu.Head) else (None, weight)
    if hidden.shape[1:] != weight.shape[1:] or hidden.dtype != weight.dtype:
        both = (f"{x.dtype} {list(x.shape)}" for x in (hidden, weight))
        raise ValueError("hidden states and weight do not fit: {}, {}".format(*both))
    V = n_vocab or len(weight)
    if use_triton(hidden, backend):
        from . import sample_score
        from .fast import head_sample_score

        s, max_k = reference.checked(hidden, V, Settings(**settings))
        few = len(hidden) <= FUSE_ROWS or hidden.dtype is torch.float32
        if max_k <= sample_score.MAX_K and (blocks or few):
            return head_sample_score.launch(hidden, weight[:V], s, max_k, blocks)
    elif hidden.device.type == "cpu":
        s, max_k = reference.checked(hidden, V, Settings(**settings))
        if head and max_k <= cpu.MAX_K:
            return reference.draw(*cpu.screen(hidden, head, s.top_k), s)
        return reference.draw(*reference.summary(cpu.blocks(hidden, weight), V, max_k), s)
    logits = fp32_product(hidden, weight)[:, :V]
    return sample_and_score(logits, backend=backend, **settings)


@on_its_device
def score(hidden: Tensor, weight: Tensor, targets: Tensor, backend=None, blocks=None) -> Tensor:
    """Log-probs fp32 [B] of given tokens int64 [B] under softmax(hidden @ weight.T); the logits are
    never all in memory."""
    if not use_triton(hidden, backend):
        return reference.score(hidden, weight, targets)
    from .fast import head_sample_score

    return head_sample_score.launch_score(hidden, weight, targets, blocks)


@on_its_device
def shared_attention(
    q: Tensor, keys: attention.Keys, t: Tensor, place: Tensor, J: int, backend: str | None = None
) -> Tensor:
    """attention.shared_attention: out [n, H, D] of queries that attend to the prompts they share and
    to their own tokens. On CUDA two Triton kernels do it, if heads have at most 128 numbers."""
    if use_triton(q, backend):
        from .fast import attention_triton

        if attention_triton.supported(q, keys):
            return attention_triton.launch(q, keys, t, place, J)
        if backend:
            raise ValueError(f"no attention kernel for this layout or heads of {q.shape[2]}")
    own = (cpu.own_scores, cpu.own_sum) if q.device.type == "cpu" and not backend else ()
    return attention.shared_attention(q, keys, t, place, J, *own)


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
