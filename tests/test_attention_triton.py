"""Attention over shared prompts, definition and kernels, against float64 row by row: on a GPU if
there is one, else in Triton's interpreter at small sizes."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before any module with a kernel is imported

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
import triton.language as tl
from triton.runtime import interpreter

import kernels
from kernels import attention, attention_triton
from kernels.attention import CHUNK

GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    """What is not initialised holds the worst: 0, which looks like a slot, or NaN. And the
    interpreter, which keeps bf16 as integers, gets a bf16 product that is one."""
    plain_empty, plain_dot = torch.empty, interpreter.InterpreterBuilder.create_dot

    def empty(*size, **given):
        x = plain_empty(*size, **given)
        return x.fill_(float("nan") if x.is_floating_point() else 0)

    def fp32(x):
        if x.dtype != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self, a, b, *rest):
        return plain_dot(self, fp32(a), fp32(b), *rest)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def make(G, J, P, chunks, D, dtype, H=2, absent=0, empty=0, loud=3.0) -> dict:
    """Random arguments of shared_attention as the decoder has them: parts of larger buffers, rows in
    any order, `absent` places without a row, `empty` slots without one; lengths and numbers of own
    tokens from 1 to all; huge numbers where nothing is real."""
    g = torch.Generator().manual_seed(G * 1000 + J * 100 + P + D)
    n = G * J - absent + empty

    def random(*size, scale=1.0):
        return torch.randn(*size, generator=g) * scale

    def ends(count, most):
        x = torch.randint(1, most + 1, (count,), generator=g)
        x[torch.randperm(count, generator=g)[:4]] = torch.tensor([most, 1, CHUNK, CHUNK + 1])[:count]
        return x.clamp(max=most)

    place = torch.cat([torch.randperm(G * J, generator=g)[absent:], torch.full((empty,), G * J)])
    place = place[torch.randperm(n, generator=g)]
    lengths, t = ends(G, P), ends(n, chunks * CHUNK)
    shared = random(2, 3, G + 2, H, P, D)[:, 1, 1 : 1 + G]  # of a layer and a window of prompts
    own = random(2, 3, chunks + 1, n + 3, H, CHUNK, D)[:, 1, :chunks, :n]
    stale = torch.arange(P) >= lengths[:, None]  # [G, P]
    shared.mul_(1 + 1e4 * stale[:, None, :, None])
    stale = torch.arange(chunks * CHUNK).view(-1, 1, CHUNK) >= t[:, None]  # [chunks, n, CHUNK]
    own.mul_(1 + 1e4 * stale[:, :, None, :, None])
    q = random(n, 3, H, D, scale=loud * D**-0.5)[:, 1]
    q, shared, own = (x.to(dtype) for x in (q, shared, own))
    names = ("q", "shared_k", "shared_v", "lengths", "own_k", "own_v", "t", "place", "J")
    return dict(zip(names, (q, *shared, lengths, *own, t, place, J)))


def exact(q, shared_k, shared_v, lengths, own_k, own_v, t, place, J) -> torch.Tensor:
    """float64 [n, H, D], one row at a time; 0 for slots without a row."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, at in enumerate(place.tolist()):
        if at == len(lengths) * J:
            continue
        of = at // J
        k, v = (
            torch.cat([a[of, :, : lengths[of]], b[:, i].transpose(0, 1).flatten(1, 2)[:, : t[i]]], 1)
            for a, b in ((shared_k, own_k), (shared_v, own_v))
        )  # [H, tokens, D]
        w = (k.double() @ q[i].double()[:, :, None]).softmax(1)
        out[i] = (w * v.double()).sum(1)
    return out


def kernel(given: dict) -> torch.Tensor:
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return kernels.shared_attention(**on_device, backend="triton").cpu()


CASES = {
    "paper": {"G": 2, "J": 25, "P": 70, "chunks": 3, "D": 64},
    "greedy": {"G": 9, "J": 1, "P": 40, "chunks": 2, "D": 32},
    "holes": {"G": 3, "J": 25, "P": 64, "chunks": 2, "D": 16, "absent": 30, "empty": 5},
    "two tiles of rows": {"G": 1, "J": 70, "P": 33, "chunks": 1, "D": 16, "absent": 3, "H": 3},
    "40": {"G": 2, "J": 40, "P": 9, "chunks": 1, "D": 32, "H": 1, "empty": 1},
    "long": {"G": 2, "J": 2, "P": 300, "chunks": 7, "D": 16},
    "D 24": {"G": 2, "J": 5, "P": 40, "chunks": 2, "D": 24, "absent": 1, "empty": 2},
    "D 8": {"G": 2, "J": 5, "P": 1, "chunks": 1, "D": 8},
    "D 128": {"G": 1, "J": 3, "P": 70, "chunks": 2, "D": 128},
    "one of 25": {"G": 2, "J": 25, "P": 70, "chunks": 2, "D": 16, "absent": 49, "empty": 3},
    "loud": {"G": 2, "J": 5, "P": 70, "chunks": 3, "D": 16, "loud": 100.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64(case, dtype):
    """Guards every offset, mask and rescaling: a row of another prompt, slot, layer or head, a
    token too many or too few, stale numbers, places without a row, slots without one, memory that
    nobody wrote. In bf16 the weights and the result are rounded (2^-9 each)."""
    given = make(**case, dtype=dtype)
    wanted, found = exact(**given), kernel(given)
    live = given["place"] < len(given["lengths"]) * given["J"]
    assert found.dtype is dtype and found.shape == given["q"].shape
    assert found.isfinite().all()
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    for out in (found, attention.shared_attention(**given)):
        error = (out.double() - wanted)[live].abs().max()
        assert error < tolerance * (1 if out is found else 5)
    assert wanted[live].abs().max() > 1  # so that an error shows
