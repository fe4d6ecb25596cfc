"""The Triton kernels against the reference, token for token, on a GPU or interpreted."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before any module with a kernel is imported

import json
import random
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
from conftest import ROOT
from test_cpu import head_like_gpt2
from test_reference import check_frequencies, oracle, uniform_ints

pytest.importorskip("triton", reason="triton is not installed on this platform")
from sert_min import kernels
from sert_min.io import machine
from sert_min.kernels import sample_score
from sert_min.kernels.fast import attention_triton, head_sample_score, search

NAN, INF = float("nan"), float("inf")
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def draw(logits, **given):
    """Tokens and log-probs of the kernel."""
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    found = kernels.sample_and_score(logits.to(DEVICE), **{"backend": "triton", **given})
    return [x.cpu() for x in found]


def check_draws(tokens, logprobs, logits, streams, seed, position, tolerance, **given):
    """Against naive float64 code. A draw within 1e-6 of a border may go to the neighbour, once."""
    near = 0
    for row, token, logprob, stream in zip(logits.double().numpy(), tokens, logprobs, streams):
        u = uniform_ints(seed, stream.item(), position)
        wanted, _, close = oracle(row, u=u, near=1e-6, **given)
        assert token == wanted or close
        exact = torch.from_numpy(row).log_softmax(0)[token]
        assert abs(logprob.double() - exact) < tolerance + 1e-6 * abs(exact)
        near += close
    assert near <= 1


def some_cases(n: int, seed: int, **axes) -> list[dict]:
    """n random cases, the values of each axis about equally often."""
    rng = random.Random(seed)
    columns = [rng.sample((values * n)[:n], n) for values in axes.values()]
    return [dict(zip(axes, row)) for row in zip(*columns)]


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SMALL = some_cases(
    32, 0, B=[0, 1, 3], V=[1, 7, 1000], k=[1, 5, 10, 64], p=[1e-6, 0.5, 0.95, 1.0],
    temperature=[0.0, 0.5, 1.0, 2.0], dtype=FLOATS, block=[64, 256, 2048], parts=[None, 1, 3],
    stride=[0, 5], coarse=[False, True],
)  # fmt: skip
LARGE_K = some_cases(
    16, 1, B=[1, 2], V=[7, 300], k=[0, 65, 200, 5000], p=[1e-6, 0.5, 0.95, 1.0],
    temperature=[0.5, 1.0], dtype=FLOATS[:2], stride=[0], coarse=[False, True],
)  # fmt: skip


BIG = {"p": 0.95, "temperature": 1.0, "stride": 0, "coarse": False, "block": 2048}
CORNERS = [  # many rows; GPT-2's vocabulary in one part and in several; rows in several
    {"B": 64, "V": 7, "k": 5, "dtype": torch.float32, **BIG},
    {"B": 1, "V": 50257, "k": 10, "dtype": torch.bfloat16, "parts": 1, **BIG},
    {"B": 1, "V": 50257, "k": 64, "dtype": torch.float32, "parts": 5, **BIG},
    {"B": 3, "V": 1000, "k": 10, "dtype": torch.float32, **BIG, "block": 128, "parts": 3},
]
CASES = SMALL + LARGE_K + CORNERS


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_equals_the_reference(case):
    """Guards block edges, blocks and parts, ties (coarse), dtypes, strides, streams, settings."""
    case = dict(case)
    B, V, dtype, stride, coarse = map(case.pop, ("B", "V", "dtype", "stride", "coarse"))
    g = torch.Generator().manual_seed(V * 31 + B)
    logits = torch.randn(B, V + stride, generator=g) * 4 - 110  # as GPT-2's
    logits = (logits.round() if coarse else logits).to(dtype)[:, :V]
    streams = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
    launch = {name: case.pop(name) for name in ("block", "parts") if name in case}
    seed, (k, p, temperature) = 2**40 + 3, map(case.get, ("k", "p", "temperature"))
    given = {"top_k": k, "top_p": p, "temperature": temperature, "seed": seed, "position": 9}
    found = draw(logits, streams=streams, **given, **launch)
    assert found[0].shape == found[1].shape == (B,)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    check_draws(*found, logits, streams, seed, 9, tolerance, **case)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_settings_as_tensors_of_any_stride(backend):
    """Guards memory that is not one number per row: expanded, 0-dimensional, columns."""
    g, B = torch.Generator().manual_seed(6), 4
    logits = torch.randn(B, 40, generator=g) * 3
    wide = torch.randint(0, 2**60, (B, 3), generator=g)
    zero, of_row = torch.zeros(1), torch.arange(B)
    for given in (
        {"temperature": zero.expand(B), "top_k": 5},
        {"temperature": zero[0], "top_k": 0},
        {"temperature": torch.tensor(0.7), "top_k": 0},
        {"temperature": (zero + 1).expand(B), "top_k": torch.tensor(0)},
        {"streams": wide[:1, 1].expand(B), "top_k": 9},
        {
            "streams": wide[:, 1], "position": (wide % 99)[:, 2], "top_k": (wide % 20 + 1)[:, 2],
            "temperature": (wide % 3 / 2.0)[:, 2], "top_p": ((wide % 9 + 1).double() / 9)[:, 0],
        },
    ):  # fmt: skip
        found, _ = draw(logits, seed=3, backend=backend, **given)
        streams = given.pop("streams", of_row)
        for i in range(B):
            own = {k: torch.as_tensor(v).expand(B)[i].item() for k, v in given.items()}
            own |= {"streams": streams[i : i + 1], "seed": 3, "backend": "reference"}
            assert kernels.sample_and_score(logits[i : i + 1], **own)[0] == found[i]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("top_k", [10, 0])  # 0: by way of the logits, as the head has 64 slots
def test_padded_rows_of_a_weight_are_never_drawn(backend, top_k):
    """Guards the padding that makes products quick: tokens from n_vocab on have no mass."""
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(3, 32, generator=g), torch.randn(70, 32, generator=g)
    padded = torch.cat([weight, 9 * hidden])  # by far the largest logits
    given = {"top_k": top_k, "top_p": 0.9, "seed": 2}
    wanted = kernels.sample_and_score(hidden @ weight.T, backend="reference", **given)
    head = hidden.to(DEVICE), padded.to(DEVICE)
    found = kernels.head_sample_and_score(*head, n_vocab=70, backend=backend, **given)
    assert torch.equal(wanted[0], found[0].cpu())
    torch.testing.assert_close(found[1].cpu(), wanted[1])


def test_launches_are_on_the_gpu_of_their_tensors(monkeypatch):
    """Guards a second GPU: Triton launches on the current one, whatever its tensors are on."""
    entered = []

    class OnSecond(torch.Tensor):
        is_cuda, device = True, "cuda:1"

    x = torch.zeros(2, 5).as_subclass(OnSecond)
    monkeypatch.setattr(torch.cuda, "device", lambda name: entered.append(name) or nullcontext())
    f = kernels.on_its_device(lambda x: entered.append("f"))
    f(x)
    f(torch.zeros(1))
    assert entered == ["cuda:1", "f", "f"]
    for name in ("sample_and_score", "head_sample_and_score", "score", "shared_attention"):
        assert hasattr(getattr(kernels, name), "__wrapped__")


@pytest.mark.parametrize("top_k", [5, 0])
def test_odd_rows(top_k):
    """What can't be sampled says so (-1, NaN); what can be is exact next to odd numbers."""
    at = torch.arange(300)
    unusable = at - INF, torch.where(at == 250, NAN, 0.0), torch.where(at == 4, INF, 0.0)
    usable = [at * 0.0, torch.where(at % 2 == 0, -0.0, 0.0), torch.linspace(-1e30, 1e30, 300)]
    usable += [torch.where(some, at / 50.0, -INF) for some in (at == 17, at == 299, at % 2 == 1)]
    logits = torch.stack([*unusable, *usable])
    given = {"top_k": top_k, "top_p": 0.905}
    tokens, logprobs = kernels.sample_and_score(logits, backend="reference", **given)
    k_tokens, k_logprobs = draw(logits, **given, **({"block": 128} if top_k else {}))
    assert torch.equal(tokens, k_tokens)
    torch.testing.assert_close(k_logprobs, logprobs, equal_nan=True, atol=1e-5, rtol=1e-6)
    assert (k_tokens >= 0).tolist() == [False] * 3 + [True] * 6
    assert logits[3:].gather(1, k_tokens[3:, None]).min() > -INF
    assert not top_k or k_tokens[3:5].max() < 5  # ties: the five lowest ids


DRAWS = 200_000 if DEVICE == "cuda" else 60


@pytest.mark.parametrize("n", [DRAWS, pytest.param(5_000, marks=pytest.mark.slow)])
def test_frequencies(n):
    """Guards the distribution. 5,000 interpreted draws take about five minutes."""
    row = (torch.randn(48, generator=torch.Generator().manual_seed(8)) * 1.5).to(DEVICE)
    launch = {"backend": "triton", "block": 64, "parts": 1}
    check_frequencies(row, 10, 0.95, 1.0, seed=1, batches=2, size=n // 2, **launch)


@pytest.mark.parametrize("B, V, C, blocks, dtype, top_k", [
    (1, 7, 8, (16, 128, 16, 128, 1), torch.float32, 5),  # one ragged block
    (3, 1000, 48, (16, 128, 32, 512, 2), torch.float32, 10),  # two strips
    (5, 1000, 40, (16, 128, 32, 128, 8), torch.float16, 10),  # ragged depth, many strips
    (3, 600, 64, (16, 64, 32, 256, 3), torch.float32, 64),
    (17, 300, 32, (16, 128, 16, 384, 1), torch.float32, 1),  # a second, nearly empty row tile
    (3, 1000, 64, None, torch.float32, 10),  # the default tiles
])  # fmt: skip
def test_head_equals_product_then_reference(B, V, C, blocks, dtype, top_k):
    """Guards ragged vocabulary, rows and depth, strips, and padded tokens that count."""
    g = torch.Generator().manual_seed(V + C)
    hidden = torch.randn(B, C, generator=g).to(dtype)
    weight = (torch.randn(V, C, generator=g) * 0.4).to(dtype)
    exact = hidden.double() @ weight.double().T
    given = {"top_k": top_k, "top_p": 0.95, "seed": 7, "position": 3, "blocks": blocks}
    hidden, weight = hidden.to(DEVICE), weight.to(DEVICE)
    found = kernels.head_sample_and_score(hidden, weight, backend="triton", **given)
    tokens, logprobs = (x.cpu() for x in found)
    tolerance, case = 1e-5 if dtype is torch.float32 else 1e-3, {"k": top_k, "p": 0.95}
    check_draws(tokens, logprobs, exact, torch.arange(B), 7, 3, tolerance, temperature=1.0, **case)
    targets = torch.randint(0, V, (B,), generator=g)
    wanted = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for backend in ("triton", "reference"):
        scored = kernels.score(hidden, weight, targets.to(DEVICE), backend, blocks)
        torch.testing.assert_close(scored.cpu().double(), wanted, atol=1e-4, rtol=1e-4)


def test_bf16_pieces():
    """On logits near -100 (GPT-2's) within 0.01 of float64, where bf16 is off by more than 0.1."""
    both = head_like_gpt2(1000, B=8)

    def logprobs(hidden, weight):
        return (hidden.double() @ weight.double().T).log_softmax(-1)

    wanted = logprobs(*both)
    plain = logprobs(*(x.bfloat16() for x in both))
    ours = logprobs(*map(kernels.bf16_pieces, both, (False, True)))
    assert (ours - wanted).abs().max() < 0.01 and (plain - wanted).abs().max() > 0.1


@pytest.mark.slow
def test_every_variant_compiles_without_spills():
    """For A100 (sm_80) and H100/H200 (sm_90)."""
    script = [sys.executable, str(ROOT / "bench" / "compile_kernels.py")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    p = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert p.returncode == 0, p.stderr[-2000:]
    rows = [json.loads(line) for line in p.stdout.splitlines()]
    assert {r["target"] for r in rows} == {"sm_80", "sm_90"}
    kinds = ("stream", "merge", "search", "head", "own", "prompt")
    assert {r["kernel"] for r in rows} == {f"{kind}_kernel" for kind in kinds}
    for r in rows:
        spills, shared_kib = (32, 163) if r["target"] == "sm_80" else (0, 227)
        assert r["spill_bytes"] <= spills and r["shared_bytes"] <= shared_kib * 1024, r
        assert r["registers"] <= 255, r


@GPU
def test_cuda_graph_replays_give_new_draws():
    """Guards frozen randomness: a replay after the positions moved draws anew."""
    logits = torch.randn(64, 50257, device="cuda") * 3
    streams, position = torch.arange(64, device="cuda"), torch.zeros(64, dtype=torch.int64).cuda()
    given = {"top_k": 10, "top_p": 0.95, "streams": streams, "position": position}
    kernels.sample_and_score(logits, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = kernels.sample_and_score(logits, **given)
    drawn = []
    for i in range(3):
        position.fill_(i)
        graph.replay()
        drawn.append(tokens.clone())
        wanted, _ = kernels.sample_and_score(logits, backend="reference", **given)
        assert torch.equal(tokens, wanted)
    assert not torch.equal(drawn[0], drawn[1])


def zeros(*_):
    return torch.zeros(5).long(), torch.zeros(5)


@pytest.mark.parametrize("module, broken, why", [
    (None, None, ""),
    (sample_score, mock.Mock(side_effect=RuntimeError("no C")), "RuntimeError: no C"),
    (head_sample_score, zeros, "result is wrong"),
    (search, zeros, "result is wrong"),
    (attention_triton, lambda q, *_: q, "result is wrong"),
])  # fmt: skip
def test_the_kernels_are_tried_before_they_serve(module, broken, why, monkeypatch):
    """Guards a crash, or wrong draws, where Triton can't serve."""
    if module:
        monkeypatch.setattr(module, "launch", broken)
    kernels.check.problem.cache_clear()
    problem = kernels.check.problem(torch.device(DEVICE))
    kernels.check.problem.cache_clear()
    assert why in problem if why else not problem


def test_without_the_kernels_plain_pytorch_serves(monkeypatch):
    """The reason on a machine without Triton, what a GPU does then, and the name in settings."""
    code = ("import sys; sys.modules['triton'] = None\nimport torch\nfrom sert_min import kernels\n"
            "print(kernels.check.problem(torch.device('cpu')))")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "triton" in said.stdout, said.stderr
    row = type("Row", (), {"__len__": lambda _: 2, "is_cuda": True, "device": "card"})()
    for why in ("", "no compiler"):
        monkeypatch.setattr(kernels.check, "problem", lambda device, why=why: why)
        assert kernels.use_triton(row, None) == (not why) and kernels.use_triton(row, "triton")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
        assert machine.gpu_name(row.device, {}) == "T4" + " without Triton" * bool(why)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(machine, "RANK", 1)  # process 0 has decided
    assert machine.gpu_name("card 1", {"gpu": "T4 without Triton"}) == "T4 without Triton"
