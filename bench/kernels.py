"""Time of one sampling step's kernels on a GPU: ours against what people use, and the hardware.

From logits: sample_score.py against PyTorch's chain (softmax, top-k, cumsum, multinomial, gather) and
a chain as vLLM's sampler has it, both as they are and compiled. From hidden states: the sampler's head
against the bare product of cuBLAS, and against that product followed by the compiled chains. Attention
of one layer over shared prompts: against PyTorch's attention over keys where each row has a copy of its
prompt's.

Inputs take turns, so that no candidate reads them from a warm cache; times are the GPU's, without the
host's launches; every candidate of sampling gives tokens and log-probs. The same run checks results
against the reference.

    python bench/kernels.py --out bench/results/kernels.json     (needs a GPU)
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F

from bench.common import DEVICE, TOP_K, TOP_P, finish, gpu_medians, machine, parser
from sert_min import kernels
from sert_min.kernels import attention

V, C, HEADS = 50257, 768, 12  # GPT-2's vocabulary, width and number of heads
ROWS = 25, 250, 1000
PATHS, PROMPT_TOKENS = 25, 130  # rows of a prompt, and its tokens
GIVEN = {"top_k": TOP_K, "top_p": TOP_P, "seed": 1}


def eager(logits):
    """Top-k, then top-p on the renormalised rest, draw, log-prob: as one writes it in PyTorch."""
    logprobs = F.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(TOP_K)
    share = values.softmax(-1)
    keep = share.cumsum(-1) - share < TOP_P
    drawn = torch.multinomial(torch.where(keep, share, 0.0), 1)
    return ids.gather(1, drawn), values.gather(1, drawn)


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


def one_pass(logits):
    return kernels.sample_and_score(logits, **GIVEN)


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


def microseconds(times: dict[str, float]) -> dict[str, float]:
    return {name: round(t * 1e6, 2) for name, t in times.items()}


def errors(found, logits) -> dict:
    """Tokens that differ from the reference's, and the largest log-prob error of the others."""
    tokens, logprobs = (x.cpu() for x in found)
    wanted, exact = kernels.sample_and_score(logits.cpu(), backend="reference", **GIVEN)
    same = tokens == wanted
    error = float((logprobs - exact).abs()[same].max())
    return {"tokens_differ": int((~same).sum()), "logprob_error": error}


def from_logits(B: int, runs: int, bandwidth: float) -> dict:
    nxt = rotate(lambda: torch.randn(B, V, device="cuda") * 4 - 100, B * V * 4)
    chains = {"ours": one_pass, "eager": eager, "as vLLM": without_sort, **compiled_chains()}
    times = gpu_medians({name: lambda f=f: f(nxt()) for name, f in chains.items()}, runs)
    x = nxt()
    return {
        "from": "logits", "B": B, "V": V, "us": microseconds(times),
        "share_of_bandwidth": round(B * V * 4 / times["ours"] / bandwidth, 3),
        **errors(one_pass(x), x),
    }  # fmt: skip


def head_times(h, w, runs: int) -> dict[str, float]:
    """Seconds of each way from hidden states h to tokens and log-probs, with the head w."""
    nxt = rotate(lambda: F.pad(w, (0, 0, 0, -V % 64)), w.nbytes)  # a multiple of 64 is quick
    product = kernels.fp32_product
    candidates = {
        "ours": lambda: kernels.head_sample_and_score(h, nxt(), n_vocab=V, **GIVEN),
        "bare product": lambda: product(h, nxt()),
        "bare product, not padded": lambda: product(h, nxt()[:V]),
    }
    for name, chain in compiled_chains().items():
        candidates[f"product + {name}"] = lambda f=chain: f(product(h, nxt())[:, :V])
    return gpu_medians(candidates, runs)


def from_hidden(B: int, runs: int) -> dict:
    """Hidden state to token and log-prob, with a plain bf16 head, and at fp32's precision."""
    x, weight = torch.randn(B, C, device="cuda"), torch.randn(V, C, device="cuda") * 0.05
    pieces = kernels.bf16_pieces(x, weight=False), kernels.bf16_pieces(weight, weight=True)
    heads = {"bf16": (x.bfloat16(), weight.bfloat16()), "3 bf16 pieces": pieces}
    times = {name: microseconds(head_times(h, w, runs)) for name, (h, w) in heads.items()}
    exact = (x.double() @ weight.double().T).float()
    found = errors(kernels.head_sample_and_score(*pieces, **GIVEN), exact)
    return {"from": "hidden", "B": B, "V": V, "C": C, "us": times, **found}


def attention_inputs(G: int, t: int) -> tuple[tuple, tuple]:
    """Arguments of shared_attention for G prompts of PATHS rows in any order, t own tokens each; and
    q, k, v for PyTorch's attention, where each row has all its keys."""
    n, D, size = G * PATHS, C // HEADS, {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(n, HEADS, D, **size) * D**-0.5
    shared = torch.randn(2, G, HEADS, PROMPT_TOKENS, D, **size)
    own = torch.randn(2, -(-t // attention.CHUNK), n, HEADS, attention.CHUNK, D, **size)
    place = torch.randperm(n, device="cuda")
    lengths, ends = (torch.full((m,), x, device="cuda") for m, x in ((G, PROMPT_TOKENS), (n, t)))
    flat = own.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[..., :t, :]  # [2, n, H, t, D]
    k, v = torch.cat([shared[:, place // PATHS], flat], 3)
    return (q, attention.Keys(*shared, lengths, *own), ends, place, PATHS), (q[:, :, None], k, v)


def from_prompts(G: int, t: int, runs: int, bandwidth: float) -> dict:
    """Attention of one layer in bf16; the floor is every key and value, q and out once."""
    n = G * PATHS
    floor = (2 * (G * PROMPT_TOKENS + n * t) + 2 * n) * C * 2
    nxt = rotate(lambda: attention_inputs(G, t), 4 * floor)
    candidates = {
        "ours": lambda: kernels.shared_attention(*nxt()[0]),
        "attention over copies": lambda: F.scaled_dot_product_attention(*nxt()[1], scale=1.0),
    }
    times = gpu_medians(candidates, runs)
    given, (q, k, v) = nxt()
    exact = ((q.float() @ k.float().mT).softmax(-1) @ v.float())[:, :, 0]
    return {
        "from": "prompts", "B": n, "G": G, "t": t, "dtype": "bfloat16", "us": microseconds(times),
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
    result = {"machine": machine(), "copy_bandwidth": bandwidth, "rows": []}
    cells = [partial(from_hidden, B, runs) for B in ROWS]
    cells += [partial(from_logits, B, runs, bandwidth) for B in ROWS]
    shapes = itertools.product((8, 40), (16, 64, 128))
    cells += [partial(from_prompts, G, t, runs, bandwidth) for G, t in shapes]
    for cell in cells:
        result["rows"].append(cell())
        print(result["rows"][-1], flush=True)
        finish(result, args.out)


if __name__ == "__main__":
    main()
