"""The quick CPU path (kernels/fast/cpu.py) against float64: products, the vocabulary in blocks, the bf16 head."""

import platform
from unittest import mock

import pytest
import torch
from conftest import pretend_bf16
from test_reference import golden_rows
from torch.nn.functional import gelu, normalize
from torch.nn.functional import linear as exact_linear

from sert_min.io.machine import resolve_machine
from sert_min.kernels import attention, head_sample_and_score, reference, sample_and_score
from sert_min.kernels.fast import cpu
from sert_min.kernels.fast.largest import largest


def head_like_gpt2(V: int, C: int = 256, B: int = 40, seed: int = 0):
    """Hidden states [B, C] and a weight [V, C]: logits near -100, spread by 4, as GPT-2's."""
    g = torch.Generator().manual_seed(seed)
    common = normalize(torch.randn(C, generator=g), dim=0)
    weight = 0.25 * torch.randn(V, C, generator=g) + 10 * common
    return torch.randn(B, C, generator=g) - 10 * common, weight


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86 CPU")
def test_bf16_needs_instructions(monkeypatch):
    """Guards bf16 where oneDNN only emulates it, eight times as slow as fp32."""
    for name in cpu.X86_BF16:
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False, raising=False)
    assert not cpu.has_bf16()


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 768, 3072), (3, 4, 512, 600), (1, 300, 300), (2, 8, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_product_with_fp32_sums(shape, bias, dtype, has_bf16, monkeypatch):
    """Guards a product at less than fp32, and a lost bias, activation, dimension or stride."""
    pretend_bf16(monkeypatch, has_bf16)
    *lead, i, o = shape
    x, w = torch.randn(*lead, 2 * i)[..., ::2].to(dtype), torch.randn(i, o).T.to(dtype)
    b = torch.randn(2 * o)[::2].to(dtype) if bias else None
    with torch.no_grad():
        found, active = cpu.linear(x, w, b), cpu.linear(x, w, b, gelu_tanh=True)
    wanted = x.double() @ w.double().T + (0 if b is None else b.double())
    off = 2**-8 if dtype is torch.bfloat16 else 0  # rounded at the end
    for x, y in ((found, wanted), (active, gelu(wanted, approximate="tanh"))):
        assert x.shape == y.shape and x.dtype is dtype
        assert ((x - y).abs() <= 1e-6 * i + 2 * off * y.abs() + off).all()


@pytest.mark.parametrize("operator", [
    mock.Mock(side_effect=RuntimeError("no such operator")),
    lambda x, w, b, *_: exact_linear(x, w, b),  # no activation
    lambda x, w, b, *_: gelu(exact_linear(x, w), approximate="tanh"),  # no bias
    lambda x, w, b, *_: gelu(exact_linear(x, w, b), approximate="tanh").double(),
    lambda x, w, b, *_: exact_linear(x, w, b) * float("nan"),
])  # fmt: skip
def test_pytorch_serves_where_onednn_is_wrong(operator, monkeypatch, request):
    """Guards a private operator that another PyTorch changed; a run says who multiplied."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    assert cpu.onednn_is_right()
    before = resolve_machine("cpu", "fp32", {}, 10)[1]
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operator)
    cpu.onednn_is_right.cache_clear()
    request.addfinalizer(cpu.onednn_is_right.cache_clear)
    x, w, b = torch.randn(4, 300), torch.randn(5000, 300), torch.randn(5000)
    with torch.no_grad():
        assert torch.equal(cpu.linear(x, w, b), exact_linear(x, w, b))
    told = {**before, "cpu": before["cpu"] + " without oneDNN"}
    assert resolve_machine("cpu", "fp32", {}, 10)[1] == told


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 300, 400), (2, 3, 400, 300)])
def test_linear_has_gradients(shape, bias):
    """Guards a gradient that is transposed, partial or of less than fp32, and autocast to bf16."""
    *lead, i, o = shape
    given = [torch.randn(*lead, i), torch.randn(o, i), torch.randn(o) if bias else None]
    given = [x if x is None else x.requires_grad_() for x in given]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in given]
    g = torch.randn(*lead, o)
    (cpu.linear(*given, gelu_tanh=True) * g).sum().backward()
    (gelu(exact_linear(*exact), approximate="tanh") * g).sum().backward()
    for x, y in zip(given, exact):
        assert x is None or (x.grad - y.grad).abs().max() < 2e-6 * i
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.linear(*given).dtype is torch.bfloat16
    with torch.no_grad():  # nothing is wanted; other numbers, and a mixture that PyTorch refuses
        assert not cpu.linear(*given).requires_grad
        x, w = given[0].double(), given[1].double()
        assert torch.equal(cpu.linear(x, w), exact_linear(x, w))
        with pytest.raises(RuntimeError):
            cpu.linear(given[0], given[1].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks, n, slots, group", [(1, 5, 5, 1), (3, 4, 7, 1), (3, 4, 7, 2)])
def test_own_attention_is_that_of_the_definition(dtype, chunks, n, slots, group):
    """Guards rows of another slot, head, chunk, layer or call, and weights of another token."""
    H, D, C = 3, 16, attention.CHUNK
    g = torch.Generator().manual_seed(chunks)
    size = (2, chunks + 1, slots, H)
    keys = torch.randn(*size, D, C, generator=g).to(dtype).mT[1, :chunks, :n]
    values = torch.randn(*size, C, D, generator=g).to(dtype)[1, :chunks, :n]
    q = torch.randn(n, 3, H * group, D, generator=g).to(dtype)[:, 1]  # a part of q, k, v
    w = torch.rand(n, H * group, 7 + chunks * C, generator=g).to(dtype)[..., 7:]
    assert cpu.in_rows(keys.mT) and cpu.in_rows(values)  # else the definition runs twice
    exact = attention.own_scores(q.double(), keys.double())
    exact = exact, attention.own_sum(w.double(), values.double())
    off = 1e-5 if dtype is torch.float32 else 0.13  # of bf16 numbers up to 32
    for x, y in zip((cpu.own_scores(q, keys), cpu.own_sum(w, values)), exact):
        assert x.dtype is dtype and x.shape == y.shape and (x - y).abs().max() < off


def test_own_attention_in_any_layout():
    """Guards a table read where the memory is none: keys as a GPU has them, heads that lie apart."""
    keys = torch.randn(2, 3, 4, attention.CHUNK, 8)
    q, w = torch.randn(3, 4, 8), torch.rand(3, 4, 2 * attention.CHUNK)
    apart = torch.randn(2, 3, 4, attention.CHUNK, 9)[..., 1:]
    assert torch.equal(cpu.own_scores(q, keys), attention.own_scores(q, keys))
    assert torch.equal(cpu.own_sum(w, apart), attention.own_sum(w, apart))
    with torch.inference_mode():
        cpu.own_sum(w, keys)
    cpu.own_sum(w.clone().requires_grad_(), keys)  # what was kept then serves now
    far = torch.empty_strided((1, 3, 1, 1, 8), (8, 8 * 2**30, 8, 8, 1), device="meta")
    assert not cpu.in_rows(far)  # its rows have no int32 number
    assert cpu.own_sum(w[:0], keys[:, :0]).shape == (0, 4, 8)


@pytest.mark.parametrize("V", [1, 7, 100, 8 * 23 + 7, 8 * 60, 1105, 8192])
@pytest.mark.parametrize("k", [1, 11, 30])
def test_largest_is_topk(V, k):
    """Guards entries behind the table's last line, two best ones in a column, and odd rows."""
    k = min(k, V)
    x = torch.randn(40, V, generator=torch.Generator().manual_seed(V))
    x[0, -k:] += 9
    x[1, :: max(1, V // 8)] += 9  # most of them in one column
    wanted, wanted_ids = x.topk(k)
    found, ids = largest(x, k)
    assert torch.equal(found, wanted) and torch.equal(ids, wanted_ids)
    odd = torch.zeros(3, V)
    odd[1], odd[2, V // 2] = float("-inf"), float("nan")
    found, ids = largest(odd, k)
    assert torch.equal(found.nan_to_num(5), odd.topk(k)[0].nan_to_num(5))
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("V", [reference.BLOCK - 1, reference.BLOCK, 2 * reference.BLOCK + 3])
def test_blocks_change_nothing(V):
    """Guards ids off by a block, partial sums, ties of two blocks, and blocks without mass."""
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0)) * 4 - 100
    best, lse, values, ids = reference.summary(lambda i, j: logits[:, i:j], V, 10)
    wanted, wanted_ids = logits.topk(10)
    assert torch.equal(values, wanted) and torch.equal(ids, wanted_ids)
    assert ((best + lse) - logits.double().logsumexp(-1)).abs().max() < 2e-5
    places = [V - 5, 7, V // 2, 3, V - 1]
    logits[:, places] = 1.0
    ids = reference.summary(lambda i, j: logits[:, i:j], V, 4)[3]
    assert ids[0].tolist() == sorted(places)[:4]
    logits[:2] = float("-inf")  # a block without any mass, and no block with any
    logits[0, -1] = -100.0
    tokens, logprobs = sample_and_score(logits, top_k=3)
    assert tokens[:2].tolist() == [V - 1, -1]
    assert logprobs[0] == 0 and logprobs[1].isnan()


@pytest.mark.parametrize("real", [False, True])
def test_bf16_head_is_as_good_as_fp32(real):
    """Guards the point of screening, on logits near -100 (where rounded ones are off by 0.25)."""
    gpt2 = (torch.eye(5), golden_rows().T.contiguous()) if real else None
    hidden, weight = gpt2 or head_like_gpt2(20_000)
    wanted = hidden.double() @ weight.double().T
    assert wanted.amax(1).mean() < -70
    wanted = wanted.log_softmax(-1)
    head = cpu.prepare(weight, hidden[:8], 64)
    best, lse, values, ids = cpu.screen(hidden, head, torch.full((len(hidden),), 10))
    assert torch.equal(ids[:, :10], wanted.topk(10).indices)
    found = values - best[:, None] - lse[:, None]
    assert (found - wanted.gather(1, ids))[:, :10].abs().max() < 0.01
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).double().log_softmax(-1)
    assert (rounded.gather(1, ids) - wanted.gather(1, ids)).abs().max() > 0.1


@pytest.mark.parametrize("given, twice", [
    ({"top_p": 0.9}, False), ({"top_k": 0}, False), ({"top_k": 100}, False),
    *((given, twice) for given in ({"temperature": 0.0}, {"top_k": 9}) for twice in (False, True)),
])  # fmt: skip
def test_draws_equal_those_of_an_exact_head(given, twice):
    """Guards the way from screening to the drawn token, and equal tokens (lowest id first)."""
    hidden, weight = head_like_gpt2(9_000)
    weight = torch.cat([weight, weight]) if twice else weight
    screened = given.get("top_k") not in (0, 100)
    if "top_p" in given:
        k = torch.arange(len(hidden)) % 16 + 1
        given = {**given, "top_k": k, "position": k}
    found = head_sample_and_score(hidden, cpu.prepare(weight, hidden, 64), seed=5, **given)
    wanted = sample_and_score((hidden.double() @ weight.double().T).float(), seed=5, **given)
    same = found[0] == wanted[0]  # a draw among thousands may flip at the edge of a uniform
    assert same.all() if screened else same.float().mean() > 0.97
    assert (found[1] - wanted[1])[same].abs().max() < 0.01


def test_rows_that_screening_can_not_tell_apart_are_computed_in_full(monkeypatch):
    """In flat rows the 32 rough best are not the best: only these must take the exact way."""
    hidden, weight = head_like_gpt2(9_000, B=6)
    hidden[2] *= 1e-3
    full, exact_blocks = [], cpu.blocks
    monkeypatch.setattr(cpu, "blocks", lambda h, w: full.append(len(h)) or exact_blocks(h, w))
    ids = cpu.screen(hidden, cpu.prepare(weight, hidden, 64), torch.full((6,), 10))[3]
    assert full == [1]
    assert torch.equal(ids[2, :10], (hidden @ weight.T).topk(10).indices[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_hidden_states_say_so(bad):
    """Guards a token drawn from NaN, and a bad row that spoils its neighbours."""
    hidden, weight = head_like_gpt2(9_000, B=4)
    head, given = cpu.prepare(weight, hidden, 64), {"top_k": 10, "top_p": 0.95, "seed": 3}
    wanted = head_sample_and_score(hidden, head, **given)[0]
    hidden[1, 3] = bad
    tokens, logprobs = head_sample_and_score(hidden, head, **given)
    assert tokens[1] == -1 and logprobs[1].isnan()
    assert torch.equal(tokens[[0, 2, 3]], wanted[[0, 2, 3]])
