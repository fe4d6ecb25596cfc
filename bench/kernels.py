"""Time of one sampling step's kernels on a GPU: ours against what people use, and the hardware.

From logits: one pass of sample_score.py against PyTorch eager (softmax, top-k, cumsum, multinomial,
gather), a chain as vLLM's sampler has it (common.without_sort), both compiled, transformers' logits
warpers, and FlashInfer with a log-sum-exp and a gather where it can be imported. From hidden states:
the fused head against the product followed by the one-pass kernel, against the bare product of
cuBLAS, and against that product followed by the compiled chains. Attention of one layer over shared prompts: against
its definition, and against PyTorch's attention over keys where each row has a copy of its prompt's
(made beforehand, and without a mask, as all rows are equally long here). So many inputs take turns
that no candidate reads them from a warm cache, and times are the GPU's, without the host's launches; every candidate of sampling gives tokens and log-probs.
Results are checked against the reference in the same run.

    python bench/kernels.py --out bench/results/kernels.json     (needs a GPU)
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F

import kernels
from bench.common import TOP_K as K
from bench.common import TOP_P as P
from bench.common import cold_inputs, eager, finish, gpu_medians, machine, without_sort
from kernels import attention, head_sample_score, reference, sample_score

SHAPES = [(50257, 768), (128256, 768)]  # GPT-2's; a larger vocabulary
ROWS = [25, 250, 1000]
PROMPTS = [(8, torch.bfloat16), (40, torch.bfloat16), (256, torch.bfloat16), (40, torch.float32)]
PATHS, PROMPT_TOKENS, HEADS, WIDTH = 25, 130, 12, 64  # rows of a prompt; GPT-2's heads


def warpers(logits):
    """transformers' own processors, in the order of generate."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = TopPLogitsWarper(P)(None, TopKLogitsWarper(K)(None, logits))
    drawn = torch.multinomial(scores.softmax(-1), 1)
    return drawn, F.log_softmax(logits.float(), -1).gather(1, drawn)


def flashinfer_chain():
    """FlashInfer's sampler plus log-sum-exp and gather; None where it is not installed."""
    try:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits
    except ImportError:
        return None

    def chain(logits):
        ids = top_k_top_p_sampling_from_logits(logits, K, P).long()[:, None]
        return ids, logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)

    return chain


def copy_bandwidth(n_bytes: int = 2**30) -> float:
    """Bytes per second of a device-to-device copy, reads and writes both counted."""
    a = torch.empty(n_bytes // 4, device="cuda")
    b = torch.empty_like(a)
    return 2 * n_bytes / gpu_medians({"copy": lambda: b.copy_(a)}, 20)["copy"]


def rotate(make, n: int):
    """A function that returns a fresh one of n inputs at each call."""
    inputs = itertools.cycle([make() for _ in range(n)])
    return lambda: next(inputs)


def compiled_chains() -> dict[str, Callable]:
    """The chains of PyTorch, compiled anew for the next shape."""
    torch._dynamo.reset()
    return {
        "compiled": torch.compile(eager, dynamic=False),
        "as vLLM, compiled": torch.compile(without_sort, dynamic=False),
    }


def from_logits(B: int, V: int, runs: int, bandwidth: float) -> dict:
    n = cold_inputs(B * V * 4)
    nxt = rotate(lambda: torch.randn(B, V, device="cuda") * 4 - 100, n)
    given = {"top_k": K, "top_p": P, "seed": 1}
    chains = {"eager": eager, "as vLLM": without_sort, **compiled_chains()}
    try:
        warpers(nxt())
        chains["transformers warpers"] = warpers
    except ImportError:
        pass
    if chain := flashinfer_chain():
        chains["flashinfer chain"] = chain
    candidates = {"ours": lambda: kernels.sample_and_score(nxt(), **given)}
    candidates |= {name: lambda f=f: f(nxt()) for name, f in chains.items()}
    times = gpu_medians(candidates, runs)
    x = nxt()
    tokens, logprobs = kernels.sample_and_score(x, **given)
    wanted, wanted_lp = reference.sample_and_score(x.cpu(), **given)
    bytes_moved = B * V * 4
    return {
        "from": "logits", "B": B, "V": V,
        "us": {k: round(t * 1e6, 2) for k, t in times.items()},
        "ratio": {k: round(t / times["ours"], 2) for k, t in times.items()},
        "share_of_bandwidth": round(bytes_moved / times["ours"] / bandwidth, 3),
        "tokens_differ": int((tokens.cpu() != wanted).sum()),
        "logprob_error": float((logprobs.cpu() - wanted_lp).abs().max()),
    }  # fmt: skip


def head_times(weight, make_hidden, B: int, V: int, given: dict, runs: int) -> dict[str, float]:
    """Seconds of the bare product, of the two ways from hidden states to tokens, of what a caller
    gets, and of PyTorch's chains behind the product."""
    n = cold_inputs(weight.nbytes)
    h = rotate(make_hidden, 4)
    w = rotate(lambda: F.pad(weight, (0, 0, 0, -V % 64)), n)  # rows: else products are slow
    blocks = head_sample_score.tiles(B, V, weight.dtype)

    def product():
        return kernels.fp32_product(h(), w())

    def one_pass():
        return kernels.sample_and_score(product()[:, :V], **given)

    candidates = {
        "bare product": product,
        "bare product, not padded": lambda: kernels.fp32_product(h(), w()[:V]),
        "product + one pass": one_pass,
        "fused": lambda: kernels.head_sample_and_score(h(), w()[:V], blocks=blocks, **given),
        "ours": lambda: kernels.head_sample_and_score(h(), w(), n_vocab=V, **given),
        **{
            f"product + {name}": lambda f=f: f(product()[:, :V])
            for name, f in compiled_chains().items()
        },
    }
    return gpu_medians(candidates, runs)


def from_hidden(B: int, V: int, C: int, runs: int) -> dict:
    """Hidden state to token and log-prob, with a plain bf16 head, at fp32's precision, and in fp32."""
    weight = torch.randn(V, C, device="cuda") * 0.05
    pieces = kernels.bf16_pieces(weight, weight=True)
    given = {"top_k": K, "top_p": P, "seed": 1}
    result = {"from": "hidden", "B": B, "V": V, "C": C, "us": {}, "ratio": {}, "ratio_to_chain": {}}
    plain = (weight.bfloat16(), lambda: torch.randn(B, C, device="cuda").bfloat16())
    split = (pieces, lambda: kernels.bf16_pieces(torch.randn(B, C, device="cuda"), weight=False))
    exact = (weight, lambda: torch.randn(B, C, device="cuda"))
    for name, (w, make_hidden) in {"bf16": plain, "3 bf16 pieces": split, "fp32": exact}.items():
        times = head_times(w, make_hidden, B, V, given, runs)
        result["us"][name] = {k: round(t * 1e6, 2) for k, t in times.items()}
        result["ratio"][name] = round(times["ours"] / times["bare product"], 3)
        best = min(t for k, t in times.items() if k.endswith("compiled"))
        result["ratio_to_chain"][name] = round(best / times["ours"], 3)
    x = torch.randn(B, C, device="cuda")
    blocks = head_sample_score.tiles(B, V, torch.bfloat16)
    tokens, logprobs = kernels.head_sample_and_score(
        kernels.bf16_pieces(x, weight=False), pieces, blocks=blocks, **given
    )
    exact = (x.double() @ weight.double().T).float().cpu()
    wanted, wanted_lp = reference.sample_and_score(exact, **given)
    same = tokens.cpu() == wanted
    result["tokens_differ"] = int((~same).sum())
    result["logprob_error"] = float((logprobs.cpu() - wanted_lp).abs()[same].max())
    return result


def attention_inputs(G: int, t: int, dtype: torch.dtype) -> tuple[dict, tuple]:
    """Arguments of shared_attention for G prompts of PATHS rows in any order, t own tokens each; and
    q, k, v for PyTorch's attention, where each row has all its keys."""
    n, chunks = G * PATHS, -(-t // attention.CHUNK)

    size = {"device": "cuda", "dtype": dtype}
    q = torch.randn(n, HEADS, WIDTH, **size) * WIDTH**-0.5
    shared = torch.randn(2, G, HEADS, PROMPT_TOKENS, WIDTH, **size)
    own = torch.randn(2, chunks, n, HEADS, attention.CHUNK, WIDTH, **size)
    place = torch.randperm(n, device="cuda")
    lengths = torch.full((G,), PROMPT_TOKENS, device="cuda")
    given = dict(zip(("shared_k", "shared_v", "own_k", "own_v"), (*shared, *own)))
    given |= {"q": q, "lengths": lengths, "t": torch.full((n,), t, device="cuda")}
    flat = own.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[..., :t, :]  # [2, n, H, t, D]
    k, v = torch.cat([shared[:, place // PATHS], flat], 3)
    return {**given, "place": place, "J": PATHS}, (q[:, :, None], k, v)


def from_prompts(G: int, t: int, dtype: torch.dtype, runs: int, bandwidth: float) -> dict:
    """Attention of one layer; the floor is every key and value, q and out once."""
    n, C = G * PATHS, HEADS * WIDTH
    floor = (2 * (G * PROMPT_TOKENS + n * t) + 2 * n) * C * dtype.itemsize
    inputs = [attention_inputs(G, t, dtype) for _ in range(min(8, cold_inputs(floor)))]
    a, b, c = (itertools.cycle(inputs) for _ in range(3))
    candidates = {
        "ours": lambda: kernels.shared_attention(**next(a)[0]),
        "definition": lambda: attention.shared_attention(**next(b)[0]),
        "attention over copies": lambda: F.scaled_dot_product_attention(*next(c)[1], scale=1.0),
    }
    times = gpu_medians(candidates, runs)
    given, (q, k, v) = inputs[0]
    weights = (q.float() @ k.float().mT).softmax(-1)
    exact = (weights @ v.float())[:, :, 0]
    error = (kernels.shared_attention(**given).float() - exact).abs().max()
    return {
        "from": "prompts", "B": n, "G": G, "t": t, "dtype": str(dtype).removeprefix("torch."),
        "us": {k: round(t * 1e6, 2) for k, t in times.items()},
        "ratio": {k: round(t / times["ours"], 2) for k, t in times.items()},
        "share_of_bandwidth": round(floor / times["ours"] / bandwidth, 3),
        "error": float(error),
    }  # fmt: skip


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="fewer shapes and runs")
    p.add_argument("--out", help="write the figures as JSON")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA GPU; without one, see "
                         "bench/compile_kernels.py for what can be checked")  # fmt: skip
    runs = 30 if args.quick else 200
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s (reads and writes)")
    rows: list[dict] = []
    result = {"machine": machine(), "copy_bandwidth": bandwidth, "rows": rows}

    def note(row: dict) -> None:
        rows.append(row)
        print(row, flush=True)
        finish(result, args.out, quiet=True)

    for V, C in SHAPES[: 1 if args.quick else 2]:
        for B in ROWS:
            note(from_hidden(B, V, C, runs))
            note(from_logits(B, V, runs, bandwidth))
    for G, dtype in PROMPTS[: 2 if args.quick else None]:
        for t in (16, 64, 128):
            note(from_prompts(G, t, dtype, runs, bandwidth))
    finish(result, args.out)
    main_row = next(r for r in rows if r["from"] == "hidden" and r["B"] == 1000)
    print(f"hidden to token and log-prob, 1,000 rows: {main_row['ratio']} of the bare product, "
          f"best chain {main_row['ratio_to_chain']}")  # fmt: skip
    return result


if __name__ == "__main__":
    assert sample_score.MAX_K >= K
    main()
