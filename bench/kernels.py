"""Time of one sampling step's kernels on a GPU: ours against what people use, and the hardware.

From logits: sample_score.py against PyTorch's chain (softmax, top-k, cumsum, multinomial, gather) and
a chain as vLLM's sampler has it, both as they are and compiled, and FlashInfer's sampler where it is
installed. From hidden states: the fused head and
what a caller gets, against the bare product of cuBLAS, and against that product followed by the
one-pass kernel or the compiled chains. Attention of one layer over shared prompts: against its
definition, and against PyTorch's attention over keys where each row has a copy of its prompt's.

Inputs take turns, so that no candidate reads them from a warm cache; times are the GPU's, without the
host's launches; every candidate of sampling gives tokens and log-probs. The same run checks results
against the reference.

    python bench/kernels.py --out bench/results/kernels.json     (needs a GPU)
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F

from bench.common import DEVICE, TOP_K, TOP_P, eager, finish, gpu_medians, machine, parser
from sert_min import kernels
from sert_min.kernels import attention
from sert_min.kernels.fast import head_sample_score

SHAPES = [(50257, 768), (128256, 768)]  # vocabulary and width: GPT-2's; a larger vocabulary
ROWS = [25, 250, 1000]
PROMPTS = [(8, torch.bfloat16), (40, torch.bfloat16), (256, torch.bfloat16), (40, torch.float32)]
PATHS, PROMPT_TOKENS, HEADS, WIDTH = 25, 130, 12, 64  # rows of a prompt; GPT-2's heads
GIVEN = {"top_k": TOP_K, "top_p": TOP_P, "seed": 1}


def without_sort(logits):
    """As vLLM's sampler does it: the best k by topk, what is below the last kept one is masked in the
    whole row, and the largest of probabilities over exponential noise is the draw; then the log-prob
    of it from a log-softmax."""
    values = logits.float().topk(TOP_K).values
    share = values.softmax(-1)
    keep = share.cumsum(-1) - share < TOP_P
    floor = values.masked_fill(~keep, float("inf")).amin(-1, keepdim=True)
    kept = logits.float().masked_fill(logits < floor, float("-inf")).softmax(-1)
    drawn = (kept / torch.empty_like(kept).exponential_()).argmax(-1, keepdim=True)
    return drawn, F.log_softmax(logits.float(), -1).gather(1, drawn)


def flashinfer_chain() -> dict[str, Callable]:
    """FlashInfer's sampler and a log-prob, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    def chain(logits):
        ids = top_k_top_p_sampling_from_logits(logits, TOP_K, TOP_P).long()[:, None]
        return ids, logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)

    return {"flashinfer": chain}


def compiled_chains() -> dict[str, Callable]:
    """The chains of PyTorch, compiled anew for the next shape."""
    torch._dynamo.reset()
    chains = {"compiled": eager, "as vLLM, compiled": without_sort}
    return {name: torch.compile(f, dynamic=False) for name, f in chains.items()}


def rotate(make: Callable, n_bytes: int) -> Callable:
    """A function that returns another input at each call: so many that none is still in the GPU's L2
    cache when its turn comes again, without more than 4 GB in all."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    n = max(2, min(-(-4 * cache // n_bytes), int(4e9 / n_bytes)))
    return itertools.cycle([make() for _ in range(n)]).__next__


def us_and_ratio(times: dict[str, float]) -> dict:
    ours, items = times["ours"], times.items()
    return {"us": {n: round(t * 1e6, 2) for n, t in items},
            "ratio": {n: round(t / ours, 2) for n, t in items}}  # fmt: skip


def errors(found, logits) -> dict:
    """Tokens that differ from the reference's, and the largest log-prob error of the others."""
    tokens, logprobs = (x.cpu() for x in found)
    wanted, exact = kernels.sample_and_score(logits.cpu(), backend="reference", **GIVEN)
    same = tokens == wanted
    error = float((logprobs - exact).abs()[same].max())
    return {"tokens_differ": int((~same).sum()), "logprob_error": error}


def from_logits(B: int, V: int, runs: int, bandwidth: float) -> dict:
    nxt = rotate(lambda: torch.randn(B, V, device="cuda") * 4 - 100, B * V * 4)
    chains = {"ours": lambda x: kernels.sample_and_score(x, **GIVEN), "eager": eager}
    chains |= {"as vLLM": without_sort, **compiled_chains(), **flashinfer_chain()}
    times = gpu_medians({name: lambda f=f: f(nxt()) for name, f in chains.items()}, runs)
    x = nxt()
    return {
        "from": "logits", "B": B, "V": V, **us_and_ratio(times),
        "share_of_bandwidth": round(B * V * 4 / times["ours"] / bandwidth, 3),
        **errors(chains["ours"](x), x),
    }  # fmt: skip


def from_hidden(B: int, V: int, C: int, runs: int) -> dict:
    """Hidden state to token and log-prob, with a plain bf16 head, at fp32's precision, and in fp32."""
    weight, pieces = torch.randn(V, C, device="cuda") * 0.05, kernels.bf16_pieces
    heads = {
        "bf16": (weight.bfloat16(), torch.Tensor.bfloat16),
        "3 bf16 pieces": (pieces(weight, weight=True), lambda x: pieces(x, weight=False)),
        "fp32": (weight, lambda x: x),
    }
    result = {"from": "hidden", "B": B, "V": V, "C": C, "us": {}, "ratio": {}, "ratio_to_chain": {}}
    x, draw = torch.randn(B, C, device="cuda"), kernels.head_sample_and_score
    for name, (head, convert) in heads.items():
        w = rotate(lambda head=head: F.pad(head, (0, 0, 0, -V % 64)), head.nbytes)  # 64: quick
        h, blocks = convert(x), head_sample_score.tiles(B, V, head.dtype)
        candidates = {
            "bare product": lambda h=h, w=w: kernels.fp32_product(h, w()),
            "bare product, not padded": lambda h=h, w=w: kernels.fp32_product(h, w()[:V]),
            "fused": lambda h=h, w=w, b=blocks: draw(h, w()[:V], blocks=b, **GIVEN),
            "ours": lambda h=h, w=w: draw(h, w(), n_vocab=V, **GIVEN),
        }
        chains = {"one pass": lambda x: kernels.sample_and_score(x, **GIVEN), **compiled_chains()}
        product = lambda h=h, w=w: kernels.fp32_product(h, w())[:, :V]  # noqa: E731
        candidates |= {f"product + {n}": lambda f=f, p=product: f(p()) for n, f in chains.items()}
        times = gpu_medians(candidates, runs)
        best = min(t for chain, t in times.items() if chain.endswith("compiled"))
        result["us"][name] = us_and_ratio(times)["us"]
        result["ratio"][name] = round(times["ours"] / times["bare product"], 3)
        result["ratio_to_chain"][name] = round(best / times["ours"], 3)
    head, convert = heads["3 bf16 pieces"]
    exact = (x.double() @ weight.double().T).float()
    return result | errors(draw(convert(x), head, **GIVEN), exact)


def attention_inputs(G: int, t: int, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """Arguments of shared_attention for G prompts of PATHS rows in any order, t own tokens each; and
    q, k, v for PyTorch's attention, where each row has all its keys."""
    n, chunks, size = G * PATHS, -(-t // attention.CHUNK), {"device": "cuda", "dtype": dtype}
    q = torch.randn(n, HEADS, WIDTH, **size) * WIDTH**-0.5
    shared = torch.randn(2, G, HEADS, PROMPT_TOKENS, WIDTH, **size)
    own = torch.randn(2, chunks, n, HEADS, attention.CHUNK, WIDTH, **size)
    place = torch.randperm(n, device="cuda")
    lengths, ends = (torch.full((m,), x, device="cuda") for m, x in ((G, PROMPT_TOKENS), (n, t)))
    flat = own.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[..., :t, :]  # [2, n, H, t, D]
    k, v = torch.cat([shared[:, place // PATHS], flat], 3)
    return (q, attention.Keys(*shared, lengths, *own), ends, place, PATHS), (q[:, :, None], k, v)


def from_prompts(G: int, t: int, dtype: torch.dtype, runs: int, bandwidth: float) -> dict:
    """Attention of one layer; the floor is every key and value, q and out once."""
    n, C = G * PATHS, HEADS * WIDTH
    floor = (2 * (G * PROMPT_TOKENS + n * t) + 2 * n) * C * dtype.itemsize
    nxt = rotate(lambda: attention_inputs(G, t, dtype), 4 * floor)
    candidates = {
        "ours": lambda: kernels.shared_attention(*nxt()[0]),
        "definition": lambda: attention.shared_attention(*nxt()[0]),
        "attention over copies": lambda: F.scaled_dot_product_attention(*nxt()[1], scale=1.0),
    }
    times = gpu_medians(candidates, runs)
    given, (q, k, v) = nxt()
    exact = ((q.float() @ k.float().mT).softmax(-1) @ v.float())[:, :, 0]
    return {
        "from": "prompts", "B": n, "G": G, "t": t, "dtype": str(dtype).removeprefix("torch."),
        **us_and_ratio(times),
        "share_of_bandwidth": round(floor / times["ours"] / bandwidth, 3),
        "error": float((kernels.shared_attention(*given).float() - exact).abs().max()),
    }  # fmt: skip


def main(argv=None) -> None:
    args = parser(__doc__).parse_args(argv)
    if DEVICE == "cpu":
        raise SystemExit("error: this needs a CUDA GPU; bench/compile_kernels.py does not")
    runs = 30 if args.quick else 200
    a, b = torch.empty(2, 2**28, device="cuda")
    bandwidth = 2 * a.nbytes / gpu_medians({"copy": lambda: b.copy_(a)}, 20)["copy"]
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s (reads and writes)")
    rows: list[dict] = []
    result = {"machine": machine(), "copy_bandwidth": bandwidth, "rows": rows}

    def note(row: dict) -> None:
        rows.append(row)
        print(row, flush=True)
        finish(result, args.out)

    for V, C in SHAPES[: 1 if args.quick else 2]:
        for B in ROWS:
            note(from_hidden(B, V, C, runs))
            note(from_logits(B, V, runs, bandwidth))
    for G, dtype in PROMPTS[: 2 if args.quick else None]:
        for t in (16, 64, 128):
            note(from_prompts(G, t, dtype, runs, bandwidth))


if __name__ == "__main__":
    main()
