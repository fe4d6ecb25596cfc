"""Do the Triton kernels work on a device? They are tried once, before they first serve there: a machine
may lack Triton or a C compiler, and a compiler may reject a card or be wrong for it."""

import functools
from contextlib import nullcontext

import torch

from . import attention, reference

OFF: dict[torch.device, str] = {}  # devices for which somebody else decided, and why


@functools.cache
def problem(device: torch.device) -> str:
    """Why the Triton kernels can't serve on `device`; "" if they can. The head, both samplers and the
    attention run on 5 rows, and have to give what the definitions give."""
    if device in OFF:
        return OFF[device]
    try:
        return "" if agree(device) else "a kernel's result is wrong"
    except Exception as e:  # of Triton, its compiler, the driver: anything
        return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"


def agree(device: torch.device) -> bool:
    from . import sample_score
    from .fast import attention_triton, head_sample_score, search

    generator = torch.Generator().manual_seed(0)

    def random(*size) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.allclose(found.cpu(), wanted, atol=1e-3)

    hidden, weight = random(5, 64), random(300, 64)
    logits = hidden @ weight.T
    x, h, w = (x.to(device) for x in (logits, hidden, weight))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for top_k in (10, 0):  # the one-pass kernel and the fused head; the search
            s = reference.Settings(1.0, top_k, 0.95, 1, torch.arange(5))
            tokens, scores = reference.sample_and_score(logits, s)
            s, max_k = reference.checked(x, 300, s._replace(streams=s.streams.to(device)))
            if top_k:
                found = [
                    head_sample_score.launch(h, w, s, max_k, None),
                    sample_score.launch(x, s, max_k),
                ]
            else:
                found = [search.launch(x, s)]
            if not all(torch.equal(t.cpu(), tokens) and close(lp, scores) for t, lp in found):
                return False
        keys = [random(1, 2, 32, 16), random(1, 2, 32, 16), torch.tensor([20])]
        keys += [random(1, 5, 2, 32, 16), random(1, 5, 2, 32, 16)]
        given = random(5, 2, 16), attention.Keys(*keys), torch.arange(1, 6), torch.arange(5)
        wanted = attention.shared_attention(*given, 5)
        q, t, place = (x.to(device) for x in (given[0], *given[2:]))
        there = attention.Keys(*(x.to(device) for x in keys))
        return close(attention_triton.launch(q, there, t, place, 5), wanted)
