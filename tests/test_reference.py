"""The definition of sampling: `kernels.reference` against naive float64 code and known bits."""

import random

import numpy as np
import pytest
import torch
from conftest import shared

from sert_min.kernels import head_sample_and_score, reference, sample_and_score

WORD = 0xFFFFFFFF
NEAR = 1e-9  # the reference adds up in float64; fp32 kernels need 1e-6
KNOWN = [  # counter, key, output: Random123's kat_vectors, "philox4x32 10"
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
INF = float("inf")
TIED, EQUAL = [1.0, 5.0, 5.0, 5.0, 0.0], [0.5] * 1000
BORDER = [0.0] * 5000 + [9.0, 9.0] + [1.0] * 500  # two stand out, then 500 equals
LEVELS = {
    "B": (0, 1, 3, 24), "V": (1, 7, 1000, 50257), "k": (0, 1, 5, 10, "V", "more"),
    "p": (1e-9, 0.5, 0.95, 1.0), "t": (0.0, 0.5, 1.0, 2.0),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "layout": ("plain", "columns", "rows"), "settings": ("numbers", "tensors")}  # fmt: skip


def philox_ints(key: tuple, counter: tuple) -> tuple:
    """Philox4x32-10 in Python integers, from the paper's description."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for r in range(10):
        x, y = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        a, b = (k0 + r * 0x9E3779B9) & WORD, (k1 + r * 0xBB67AE85) & WORD
        c0, c1, c2, c3 = (y >> 32) ^ c1 ^ a, y & WORD, (x >> 32) ^ c3 ^ b, x & WORD
    return c0, c1, c2, c3


def philox_of(seed: int, stream: int, position: int) -> tuple:
    counter = (position, 0, stream & WORD, (stream >> 32) & WORD)
    return philox_ints((seed & WORD, (seed >> 32) & WORD), counter)


def uniform_ints(seed: int, stream: int, position: int) -> float:
    return (philox_of(seed, stream, position)[0] >> 8) / 2**24


def kept_set(row: np.ndarray, temperature: float, k: int, p: float) -> tuple:
    """Ids in order and probabilities of what may be drawn, and how near top-p came to a border."""
    order = np.lexsort((np.arange(len(row)), -row))[: 1 if temperature == 0 else k or len(row)]
    order = order[row[order] > -np.inf]
    mass = np.exp((row[order] - row[order[0]]) / (temperature or 1.0))
    before = np.concatenate([[0.0], np.cumsum(mass)[:-1]]) / mass.sum()
    n = len(order) if p >= 1 else max(1, int((before < p).sum()))
    border = np.abs(before[1:] - p).min(initial=1.0) if p < 1 else 1.0
    ids = np.sort(order[:n])
    mass = np.exp((row[ids] - row[order[0]]) / (temperature or 1.0))
    return ids, mass / mass.sum(), border


def oracle(row, temperature, k, p, u, near=NEAR) -> tuple[int, float, bool]:
    """Token, its log-prob, and whether rounding could decide it (a border is near)."""
    ids, probs, border = kept_set(row, temperature, k, p)
    cdf = np.cumsum(probs)
    token = ids[min(int((cdf <= u).sum()), len(ids) - 1)]
    close = min(np.abs(cdf[:-1] - u).min(initial=1.0), border) < near
    top = row.max()
    return int(token), row[token] - top - np.log(np.exp(row - top).sum()), bool(close)


def chi_square_p(counts: np.ndarray, probs: np.ndarray) -> float:
    """Probability of counts this far from `probs` or farther; rare cells are put together."""
    order = np.argsort(-probs)
    counts, expected = counts[order].astype(float), probs[order] * counts.sum()
    n = max(1, int((expected >= 5).sum()))
    if n < len(expected):
        counts = np.append(counts[:n], counts[n:].sum())
        expected = np.append(expected[:n], expected[n:].sum())
    counts, expected = counts[expected > 1e-9], expected[expected > 1e-9]
    x = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([(len(counts) - 1) / 2, x / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item() if len(counts) > 1 else 1.0


def random_ints(n: int, bits: int, seed: int) -> list[int]:
    """Signed integers of `bits` bits, with the corners first."""
    r = random.Random(seed)
    corners = [0, -1, 1, 2**31, 2**32, -(2**32), 2 ** (bits - 1) - 1, -(2 ** (bits - 1))]
    return (corners + [r.getrandbits(bits) - 2 ** (bits - 1) for _ in range(n)])[:n]


def golden_rows() -> torch.Tensor:
    """Real GPT-2 logits [5, V]."""
    return torch.from_numpy(np.load(shared("golden", "gpt2_logits.npz"))["logits"])


def test_philox_and_uniform_equal_integers():
    """Guards lost high bits, sign extension, a uniform of 1 or off the 2^-24 grid."""
    for known in KNOWN:
        counter, key, want = (tuple(int(w, 16) for w in x.split()) for x in known)
        assert philox_ints(key, counter) == want
    seeds, streams = random_ints(40, 64, 1), random_ints(40, 64, 2)
    positions = [0, 1, 2**31 - 1, 2**31] + [random.Random(3).getrandbits(31) for _ in range(36)]
    given = torch.tensor(streams), torch.tensor(positions)
    for seed in seeds + [2**64 - 1]:
        rows = zip(*(x.tolist() for x in reference.philox(seed, *given)))
        assert [*rows] == [philox_of(seed, *row) for row in zip(streams, positions)]
        wanted = [uniform_ints(seed, *row) for row in zip(streams, positions)]
        assert reference.uniform(seed, *given).tolist() == wanted


def make_logits(B: int, V: int, case: dict, g: torch.Generator) -> torch.Tensor:
    """Logits near -100 as GPT-2's are, in the asked dtype and memory layout."""
    x = (torch.randn(B, V, generator=g) * 3 - 100).to(case["dtype"])
    if case["layout"] == "rows":
        wide = torch.full((2 * B, V + 5), 3e4, dtype=case["dtype"])
        wide[::2, 2 : V + 2] = x
        return wide[::2, 2 : V + 2]
    return x.t().contiguous().t() if case["layout"] == "columns" else x


def test_tokens_equal_oracle():
    """Guards any wrong cut, order, tie, renormalisation or index, draws by batch slot and settings
    that leak between rows. Rows of bf16 and fp16 are full of ties. Draws near a border are counted."""
    g, r = torch.Generator().manual_seed(7), random.Random(7)
    cases = [{name: r.choice(values) for name, values in LEVELS.items()} for _ in range(60)]
    rows, near, worst = 0, 0, 0.0
    for number, case in enumerate(cases):
        B, V = case["B"], case["V"]
        x = make_logits(B, V, case, g)
        k = {"V": V, "more": V + 3}.get(case["k"], case["k"])
        given = {"temperature": case["t"], "top_p": case["p"], "top_k": k, "position": number}
        t, p, k, position = ([x] * B for x in given.values())
        if case["settings"] == "tensors":  # a mixture, with the case's own values in row 0
            for i in range(1, B):
                t[i], p[i] = r.choice(LEVELS["t"]), r.choice(LEVELS["p"])
                k[i], position[i] = r.choice((0, 1, 5, 10, V, V + 3)), r.randrange(1000)
            tensors = (torch.tensor(x, dtype=torch.float64) for x in (t, p, k, position))
            given = dict(zip(given, tensors))
        streams = torch.tensor(random_ints(B, 64, number), dtype=torch.int64)
        if number % 2:
            streams, given["streams"] = torch.arange(B), None  # the usual ones
        before = x.clone()
        tokens, logprobs = sample_and_score(x, **{"streams": streams, "seed": number} | given)
        assert tokens.shape == logprobs.shape == (B,)
        assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
        assert torch.equal(x, before), "the input was changed"
        for i in range(B):
            u = uniform_ints(number, streams[i].item(), position[i])
            row = x[i].double().numpy()
            token, logprob, close = oracle(row, t[i], k[i], p[i], u)
            rows, near = rows + 1, near + close
            assert tokens[i] == token or close, (case, i)
            worst = max(worst, 0.0 if close else abs(logprobs[i].item() - logprob))
    print(f"\n{len(cases)} cases, {rows} rows, {near} too near to call, log-prob error {worst:.1e}")
    assert near < rows * 0.02 and worst < 4e-6  # near -100 fp32 has steps of 7.6e-6


@pytest.mark.parametrize("batches", [12, pytest.param(100, marks=pytest.mark.slow)])  # of 2,000
def test_draws_have_the_right_frequencies(batches):
    """Guards a bias that single draws do not show. A right sampler fails with odds of 1 in 200."""
    row = torch.randn(200, generator=torch.Generator().manual_seed(3)) * 2 - 100
    row[50:90] = float("-inf")
    settings = [(10, 0.95, 1.0), (0, 0.9, 0.7), (0, 1.0, 1.0), (50, 1.0, 2.0), (3, 0.5, 1.0)]
    for seed, (k, p, t) in enumerate(settings):
        check_frequencies(row, k, p, t, seed, batches)


def check_frequencies(row, k, p, t, seed: int, batches: int, size=2000, **launch):
    """Draws of one row in batches; half by stream, half by position."""
    counts = np.zeros(len(row), dtype=np.int64)
    launch |= {"top_k": k, "top_p": p, "temperature": t, "seed": seed}
    for i in range(batches):
        n = torch.arange(size) + size * i
        streams, position = (n * 0x9E3779B97F4A7C15, 5) if i % 2 else (torch.full_like(n, -7), n)
        rows = row.expand(size, -1)
        tokens, _ = sample_and_score(rows, streams=streams, position=position, **launch)
        counts += np.bincount(tokens.cpu().numpy(), minlength=len(row))
    ids, probs, _ = kept_set(row.double().cpu().numpy(), t, k, p)
    assert counts[ids].sum() == size * batches, "a draw outside the kept set"
    print(f"chi-square p = {chi_square_p(counts[ids], probs):.4f}")
    assert chi_square_p(counts[ids], probs) > 0.001, (k, p, t)


@pytest.mark.parametrize("row, settings, wanted", [
    # Equal logits go by the lowest id, at the border of what is kept and inside of it.
    (TIED, {"top_k": 2}, [1, 2]),
    (TIED, {"top_k": 1}, [1]),
    (TIED, {"temperature": 0.0}, [1]),
    (TIED, {"top_k": 3, "top_p": 0.6}, [1, 2]),
    (TIED, {"top_p": 1e-9}, [1]),
    (TIED, {"top_p": 0.0}, [1]),
    (EQUAL, {"top_k": 8}, [*range(8)]),
    (EQUAL, {"top_k": 8, "top_p": 0.5}, [*range(4)]),
    (BORDER, {"top_k": 4, "temperature": 50.0}, [5000, 5001, 5002, 5003]),
    ([*BORDER[:5001], 8.0, *BORDER[5002:]], {"top_k": 3, "temperature": 50.0}, [5000, 5001, 5002]),
    # Masked tokens do not come back, huge numbers do not overflow.
    ([-INF, 1.0, -INF, 1.0, -INF], {}, [1, 3]),
    ([-INF, 1.0, -INF, 1.0, -INF], {"top_k": 4}, [1, 3]),
    ([-INF, 1.0, -INF, 1.0, -INF], {"temperature": 2.0}, [1, 3]),
    ([-INF, -7.0, -INF], {}, [1]),
    ([-1e30, 1e30, 9e29], {}, [1]),
    ([-2e30, -1e30, -1.1e30], {}, [1]),
    ([1e30, 1e30, 0.0], {"temperature": 1e-20}, [0, 1]),
    ([1.0, 2.0, 3.0], {"temperature": 1e-45}, [2]),
    ([1.0, 2.0, 3.0], {"temperature": 1e30}, [0, 1, 2]),
])  # fmt: skip
def test_which_tokens_come_up(row, settings, wanted):
    """In 1,000 draws (a kept token of probability 1/8 stays unseen with odds 1e-58)."""
    tokens, logprobs = sample_and_score(torch.tensor(row).expand(1000, -1), **settings)
    assert tokens.unique().tolist() == wanted
    assert (logprobs - torch.tensor(row).double().log_softmax(0)[tokens]).abs().max() < 1e-5


def test_order_of_ids_decides_not_order_of_logits(monkeypatch):
    """Guards borders, and the first and the last kept id (uniforms 0 and 1 - 2^-24)."""
    row, tie = [-INF, 1.0, 3.0, -50.0, 2.0, -200.0], [-1e6, 0.0, 0.0, -1e6]
    last = 1 - 2**-24
    cases = [(row, 3, 0.0, 1), (row, 3, last, 4), (row, 0, 0.0, 1), (row, 0, last, 4)]
    cases += [(tie, 0, 0.0, 1), (tie, 0, 0.5 - 2**-24, 1), (tie, 0, 0.5, 2), (tie, 0, last, 2)]
    cases += [([-90.0, 0.0], 0, 0.0, 0)]  # top_p 1 is off: nothing is cut, however unlikely
    for logits, k, u, want in cases:
        fixed = torch.tensor([u], dtype=torch.float64)
        monkeypatch.setattr(reference, "uniform", lambda *_, fixed=fixed: fixed)
        tokens, _ = sample_and_score(torch.tensor([logits]), top_k=k)
        assert tokens.item() == want, (k, u)


def test_unusable_rows_say_so():
    """Guards a token from NaN, +inf or nothing but -inf, and such a row spoiling its neighbours."""
    nan = float("nan")
    bad = [[nan, 1, 2], [1, nan, nan], [nan] * 3, [INF, 1, 2], [INF, INF, 1], [-INF] * 3]
    x = torch.tensor([[1.0, 2.0, 3.0], *bad, [INF, -INF, nan], [1.0, 2.0, 3.0]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tokens, logprobs = sample_and_score(x.to(dtype), **settings)
            assert tokens[1:-1].eq(-1).all() and logprobs[1:-1].isnan().all()
            for i in (0, len(x) - 1):
                stream = torch.tensor([i])
                alone = sample_and_score(x[i : i + 1].to(dtype), streams=stream, **settings)
                assert tokens[i] == alone[0] and logprobs[i] == alone[1]


def test_bad_arguments_are_refused():
    """Guards against settings that would silently mean something else."""
    x = torch.zeros(2, 5)
    wrong = {
        "temperature": (-1.0, float("nan"), float("inf"), torch.ones(3)), "top_p": (-0.1, 1.1),
        "top_k": (-1, torch.ones(2, 2), torch.ones(2, 1)), "position": (-1,), "backend": ("abacus",),
        "streams": (torch.arange(3), torch.zeros(2))}  # fmt: skip
    calls = [(x, {name: value}) for name, values in wrong.items() for value in values]
    calls += [(y, {}) for y in (torch.zeros(5), torch.zeros(2, 0), x.long())]
    for logits, given in calls:
        with pytest.raises(ValueError):
            sample_and_score(logits, **given)
    with pytest.raises(ValueError, match="do not fit"):
        head_sample_and_score(torch.zeros(2, 4), torch.zeros(9, 5))
