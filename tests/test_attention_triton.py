"""Attention over shared prompts, definition and kernels, on a GPU or in Triton's interpreter."""

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

from sert_min import kernels
from sert_min.kernels import attention
from sert_min.kernels.attention import CHUNK, Keys
from sert_min.kernels.fast import attention_triton

GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    """Guards memory that nobody wrote; and gives the interpreter a product of bf16 numbers."""
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


def make(G, J, P, chunks, D, dtype, H=2, K=None, absent=0, empty=0, loud=3.0) -> dict:
    """Random arguments as the decoder has them: parts of larger buffers, in any order, `absent`
    places without a row, `empty` slots without one, huge numbers where nothing is real."""
    g = torch.Generator().manual_seed(G * 1000 + J * 100 + P + D)
    n = G * J - absent + empty

    def random(*size):
        return torch.randn(*size, generator=g)

    def ends(count, most):
        x = torch.randint(1, most + 1, (count,), generator=g)
        some = torch.tensor([most, 1, CHUNK, CHUNK + 1])[:count]
        x[torch.randperm(count, generator=g)[:4]] = some
        return x.clamp(max=most)

    place = torch.cat([torch.randperm(G * J, generator=g)[absent:], torch.full((empty,), G * J)])
    place = place[torch.randperm(n, generator=g)]
    lengths, t = ends(G, P), ends(n, chunks * CHUNK)
    t[4:5] = 0
    K = K or H
    shared = random(2, 2, G + 2, K, P, D)[:, 1, 1 : 1 + G]  # of a layer and a window of prompts
    own = random(2, 2, chunks + 1, n + 3, K, CHUNK, D)[:, 1, :chunks, :n]
    stale = torch.arange(P) >= lengths[:, None]  # [G, P]
    shared.mul_(1 + 1e4 * stale[:, None, :, None])
    stale = torch.arange(chunks * CHUNK).view(-1, 1, CHUNK) >= t[:, None]  # [chunks, n, CHUNK]
    own.mul_(1 + 1e4 * stale[:, :, None, :, None])
    q = random(n, 3, H, D)[:, 1] * loud * D**-0.5
    q, shared, own = (x.to(dtype) for x in (q, shared, own))
    return {"q": q, "keys": Keys(*shared, lengths, *own), "t": t, "place": place, "J": J}


def moved(given: dict, f) -> dict:
    """The same arguments with f of each tensor."""
    new = {k: f(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return {**new, "keys": Keys(*map(f, given["keys"]))}


def kernel(given: dict) -> torch.Tensor:
    given = moved(given, lambda x: x.to(DEVICE))
    return kernels.shared_attention(*given.values(), backend="triton").cpu()


def exact(q, keys, t, place, J) -> torch.Tensor:
    """float64 [n, H, D], one row at a time; 0 for slots without a row."""
    shared_k, shared_v, lengths, own_k, own_v = keys
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i, at in enumerate(place.tolist()):
        if at == len(lengths) * J:
            continue
        of = at // J
        both = []
        for a, b in ((shared_k, own_k), (shared_v, own_v)):
            b = b[:, i].transpose(0, 1).flatten(1, 2)  # [K, chunks * CHUNK, D]
            both.append(torch.cat([a[of, :, : lengths[of]], b[:, : t[i]]], 1))
        k, v = (x.repeat_interleave(q.shape[1] // len(x), 0) for x in both)  # [H, tokens, D]
        w = (k.double() @ q[i].double()[:, :, None]).softmax(1)
        out[i] = (w * v.double()).sum(1)
    return out


CASES = {
    "paper": {"G": 2, "J": 25, "P": 70, "chunks": 3, "D": 64},
    "greedy": {"G": 9, "J": 1, "P": 40, "chunks": 2, "D": 32},
    "holes": {"G": 3, "J": 25, "P": 64, "chunks": 2, "D": 16, "absent": 30, "empty": 5},
    "two tiles of rows": {"G": 1, "J": 70, "P": 33, "chunks": 1, "D": 16, "absent": 3, "H": 3},
    "long": {"G": 2, "J": 2, "P": 300, "chunks": 7, "D": 16},
    "heads in threes": {"G": 2, "J": 5, "P": 40, "chunks": 2, "D": 16, "H": 6, "K": 2, "absent": 2},
    "one head of keys": {"G": 2, "J": 3, "P": 33, "chunks": 2, "D": 32, "H": 4, "K": 1, "empty": 1},
    "D 24": {"G": 2, "J": 5, "P": 40, "chunks": 2, "D": 24, "absent": 1, "empty": 2},
    "D 8": {"G": 2, "J": 5, "P": 1, "chunks": 1, "D": 8},
    "D 128": {"G": 1, "J": 3, "P": 70, "chunks": 2, "D": 128, "H": 1},
    "one of 25": {"G": 2, "J": 25, "P": 70, "chunks": 2, "D": 16, "absent": 49, "empty": 3},
    "loud": {"G": 2, "J": 5, "P": 70, "chunks": 3, "D": 16, "loud": 100.0},
}


@pytest.mark.parametrize("name, dtype", [
    *((name, torch.float32) for name in CASES),
    *((name, torch.bfloat16) for name in ("paper", "holes", "long", "D 8")),
])  # fmt: skip
def test_equals_float64(name, dtype):
    """Guards every offset, mask and rescaling. In bf16 weights and results are rounded (2^-9)."""
    case = CASES[name]
    given = make(**case, dtype=dtype)
    wanted, found = exact(**given), kernel(given)
    live = given["place"] < case["G"] * case["J"]
    assert found.dtype is dtype and found.shape == given["q"].shape
    assert found.isfinite().all()
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    for out, factor in ((found, 1), (attention.shared_attention(**given), 5)):
        assert (out.double() - wanted)[live].abs().max() < tolerance * factor
    assert wanted[live].abs().max() > 1  # so that an error shows


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has an order of its own")
def test_order_of_programs_does_not_matter(monkeypatch):
    """Guards rows that two programs write: the right one could hide a wrong one before it."""
    given = make(G=3, J=40, P=20, chunks=1, D=16, H=1, absent=8, empty=2, dtype=torch.float32)
    forwards, plain = kernel(given), interpreter.InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, *at):
        plain(self, *(n - 1 - i for n, i in zip(self.grid_dim, at)))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)
    assert torch.equal(kernel(given), forwards)


def test_a_row_does_not_depend_on_the_others():
    """Guards rows that reach into each other: another order, other rows absent, one of NaN."""
    given = make(G=2, J=25, P=70, chunks=2, D=16, dtype=torch.float32)
    whole = kernel(given)
    some = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]
    given["q"] = given["q"].clone()
    given["q"][some[3]] = float("nan")
    part = {name: given[name][some] for name in ("q", "t", "place")}
    *prompts, own_k, own_v = given["keys"]
    part["keys"] = Keys(*prompts, own_k[:, some], own_v[:, some])
    found = kernel({**given, **part})
    assert found[3].isnan().all()
    other = torch.arange(20) != 3
    assert torch.equal(found[other], whole[some][other])


def test_offsets_above_2_to_the_31(monkeypatch):
    """Rows and prompts stand 2^30 numbers apart (the interpreter would copy all onto itself)."""
    plain = torch.UntypedStorage.copy_

    def copy_(self, other, *rest):
        return self if self.data_ptr() == other.data_ptr() else plain(self, other, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_)
    memory = torch.UntypedStorage(6 * 2**30 + 2**21, device=DEVICE)
    memory = torch.zeros(0, dtype=torch.bfloat16, device=DEVICE).set_(memory)
    given = make(G=4, J=1, P=20, chunks=2, D=16, dtype=torch.bfloat16, H=1)
    at = iter(range(5))

    def spread(x):
        if x.dtype is not torch.bfloat16:
            return x.to(DEVICE)
        rows = (2**30, 2**12, 16, 1)[-4:] if x.dim() > 3 else (2**30, 16, 1)
        strides = (2**12, *rows) if x.dim() == 5 else rows
        return memory.as_strided(x.shape, strides, next(at) * 2**16).copy_(x)

    far = moved(given, spread)
    assert (kernel(far).double() - exact(**given)).abs().max() < 2e-2


def test_what_no_kernel_takes():
    """Heads above 128, values laid out otherwise than keys, numbers of a head apart."""
    fits = make(G=1, J=2, P=5, chunks=1, D=16, dtype=torch.float32)
    wide = make(G=1, J=2, P=5, chunks=1, D=130, dtype=torch.float32)
    keys, none = fits["keys"], slice(0)
    other = {**fits, "keys": keys._replace(shared_v=keys.shared_v.mT.contiguous().mT)}
    apart = {**fits, "q": fits["q"].mT.contiguous().mT}
    assert attention_triton.supported(fits["q"], keys)
    for given in (wide, other, apart):
        assert not attention_triton.supported(given["q"], given["keys"])
        with pytest.raises(ValueError, match="attention"):
            kernel(given)
        found = kernels.shared_attention(*given.values(), backend="reference")
        assert torch.equal(found, attention.shared_attention(**given))
    with pytest.raises(ValueError, match="abacus"):
        kernels.shared_attention(*fits.values(), backend="abacus")
    keys = keys._replace(own_k=keys.own_k[:, none], own_v=keys.own_v[:, none])
    empty = fits["q"][none], keys, fits["t"][none], fits["place"][none], 2
    for backend in (None, "triton", "reference"):
        assert kernels.shared_attention(*empty, backend=backend).shape == (0, 2, 16)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("G, J, chunks", [(8, 25, 4), (64, 25, 2), (640, 1, 4)])
def test_real_shapes(G, J, chunks, dtype):
    """Guards what small shapes do not show (races, a grid too small)."""
    given = make(G, J, 130, chunks, 64, dtype, H=12, absent=7, empty=7)
    given = moved(given, torch.Tensor.cuda)
    wide = moved(given, lambda x: x.float() if x.is_floating_point() else x)
    live = given["place"] < G * J
    found = kernels.shared_attention(*given.values())
    error = (found - attention.shared_attention(**wide))[live].abs()
    assert error.max() < (1e-4 if dtype is torch.float32 else 3e-2)


@GPU
def test_cuda_graph_replays_see_new_numbers():
    """Guards a graph that keeps what it was captured with: rows grow, end and move in between."""
    given = make(G=3, J=25, P=130, chunks=3, D=64, dtype=torch.float32, absent=20, empty=5)
    given = moved(given, torch.Tensor.cuda)
    kernels.shared_attention(*given.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.shared_attention(*given.values())
    for _ in range(3):
        graph.replay()
        live = given["place"] < 75
        wanted = attention.shared_attention(**given)
        assert (out - wanted)[live].abs().max() < 1e-4
        given["t"].add_(1).clamp_(max=96)
        given["place"].copy_(given["place"].roll(7))
        given["place"][:3] = 75
