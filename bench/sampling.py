"""Sampling with log-probs: tokens per second, ours against what people use, and against the limit.

Q questions x 25 continuations of exactly N new tokens, top-k 10, top-p 0.95, random weights of a
GPT-2 shape, the same weights, prompts and dtype for all, and every candidate gives token ids and
their log-probs:
    ours            sert_min/generate.py, plain samples (--raw)
    transformers    generate(num_return_sequences=25), with its growing and its static cache
    recompute       the whole text again for each token, as nanoGPT samples (few tokens)
Candidates run in turn, five times (--runs); figures are medians. The limit is the time of the matrix
products alone at this number of rows: the body's in the dtype, the head's as ours runs it.

    python bench/sampling.py --out bench/results/sampling-cpu.json     # 124M on a CPU: 40 minutes
    python bench/sampling.py --quick                                   # 2 minutes, a smaller model
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import ROOT, TOP_K, TOP_P, eager, finish, interleaved, machine, replay_seconds
from sert_min.generate import SampleSettings, sample_block
from sert_min.gpt2 import GPT2, GPT2Config, product
from sert_min.kernels import bf16_pieces, fp32_product
from sert_min.kernels.fast import cpu
from sert_min.kernels.reference import BLOCK
from sert_min.models import save_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {  # layers, heads, width
    "quick": (4, 6, 384),
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
}
NEVER = SimpleNamespace(
    n_vocab=50257, eot=-1, ends={}
)  # in place of a tokenizer: no row ends early


def make_model(shape: str) -> GPT2:
    layers, heads, width = SHAPES[shape]
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
    return GPT2(config).init_weights_(0).eval()


# --- the candidates: each returns token ids [rows, N] and their log-probs [rows, N] ---------------


def ours(model: GPT2, prompts: list[list[int]], new: int):
    s = SampleSettings(raw=True, max_new_tokens=new, rows=25 * len(prompts))
    names, kept = [f"question {i}" for i in range(len(prompts))], {}

    def run() -> tuple[Tensor, Tensor]:
        rows = sample_block(model, NEVER, prompts, names, s, kept=kept)
        return torch.tensor([r.token_ids for r in rows]), torch.tensor([r.logprobs for r in rows])

    return run


def transformers_generate(folder: str, model: GPT2, prompts: list[list[int]], new: int, **cache):
    """`generate` on the same weights, and log-probs from the logits that it returns: one log-softmax
    a step, as compute_transition_scores would do at once on a stack of all of them."""
    from transformers import AutoModelForCausalLM

    dtype, device = model.h[0].mlp.c_fc.weight.dtype, model.wte.weight.device
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=device)
    settings = dict(do_sample=True, top_k=TOP_K, top_p=TOP_P, num_return_sequences=25)
    settings |= dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **cache)
    settings |= dict(return_dict_in_generate=True, output_logits=True)

    @torch.inference_mode()
    def run() -> tuple[Tensor, Tensor]:
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        tokens = out.sequences[:, len(prompts[0]) :]
        steps = [
            x.float().log_softmax(-1).gather(1, t[:, None]) for x, t in zip(out.logits, tokens.T)
        ]
        return tokens.cpu(), torch.cat(steps, 1).cpu()

    return run


def recompute(model: GPT2, prompts: list[list[int]], new: int):
    """No cache: each token from the whole text so far."""
    ids = torch.tensor([p for p in prompts for _ in range(25)], device=model.wte.weight.device)

    @torch.inference_mode()
    def run() -> tuple[Tensor, Tensor]:
        text, scores = ids, []
        for _ in range(new):
            token, logprob = eager(model.logits(model(text)[:, -1]))
            scores.append(logprob)
            text = torch.cat([text, token], 1)
        return text[:, ids.shape[1] :].cpu(), torch.cat(scores, 1).cpu()

    return run


# --- measuring ------------------------------------------------------------------------------------


@torch.inference_mode()
def product_seconds(model: GPT2, rows: int) -> dict[str, float]:
    """Median seconds of one decoding step's matrix products: the body's, and the head's as the
    sampler runs it. The weights rotate through all layers, as in the model."""
    weight = model.head_weight
    bf16 = model.h[0].mlp.c_fc.weight.dtype is torch.bfloat16
    x = torch.randn(rows, model.config.n_embd, device=weight.device)
    rough = weight.bfloat16()
    pieces, h = bf16_pieces(weight, weight=True), bf16_pieces(x, weight=False)
    pieces = F.pad(pieces, (0, 0, 0, -len(weight) % 64))  # rows, as make_draw does

    def head() -> None:
        if weight.is_cuda:
            fp32_product(h, pieces) if bf16 else fp32_product(x, weight)
            return
        for w, r in zip(weight.split(BLOCK), rough.split(BLOCK)):
            x.bfloat16() @ r.T if bf16 and cpu.has_bf16() else cpu.linear(x, w)

    def body() -> None:
        for b in model.h:
            product(x, b.attn.c_attn)
            product(x, b.attn.c_proj)
            product(product(x, b.mlp.c_fc), b.mlp.c_proj)

    both = {"body": body, "head": head}
    if weight.is_cuda:
        return {name: replay_seconds(f) for name, f in both.items()}
    return interleaved(both, 15)


@torch.inference_mode()
def largest_error(model: GPT2, prompts: list[list[int]], found: tuple[Tensor, Tensor]) -> float:
    """Largest difference of ours' log-probs from a plain forward of the same tokens, few rows."""
    some = range(0, len(found[0]), 12)
    tokens, logprobs = (x[list(some)] for x in found)
    ids = torch.cat([torch.tensor([prompts[i // 25] for i in some]), tokens], 1)
    ids, start = ids.to(model.wte.weight.device), len(prompts[0])
    logits = model.logits(model(ids)[:, start - 1 : -1])
    wanted = logits.log_softmax(-1).gather(2, ids[:, start:, None])[:, :, 0]
    return float((wanted.cpu() - logprobs).abs().max())


def measure(args, name: str, folder: str, model: GPT2) -> dict:
    """All figures of one dtype."""
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 49152, (args.questions, args.prompt_tokens), generator=g).tolist()
    model.cast_(DTYPES[name])
    rows, few = 25 * args.questions, max(2, args.new_tokens // 32)
    candidates, failed = {"ours": ours(model, prompts, args.new_tokens)}, {}
    if not args.ours_only:
        given = (folder, model, prompts, args.new_tokens)
        static = transformers_generate(*given, cache_implementation="static")
        peers = {"transformers": transformers_generate(*given), "transformers, static": static}
        warm = {}
        for c, f in peers.items():  # warm up; only the best one goes on
            try:
                warm |= interleaved({c: f}, 1, warm_up=0)
            except Exception as e:
                failed[c] = f"{type(e).__name__}: {str(e)[:200]}"
        print(f"  warm-up: {warm or failed}", flush=True)
        candidates |= {c: peers[c] for c in sorted(warm, key=warm.get)[:1]}
        candidates["recompute"] = recompute(model, prompts[:1], few)
    tokens = {c: rows * args.new_tokens for c in candidates} | {"recompute": 25 * few}
    found = candidates["ours"]()
    times = interleaved(candidates, args.runs, warm_up=0)
    rate = {c: tokens[c] / t for c, t in times.items()}
    products = product_seconds(model, rows)
    limit = rows / sum(products.values())
    return {
        "tokens_per_s": {c: round(r, 1) for c, r in rate.items()},
        "ratio": {c: round(rate["ours"] / r, 2) for c, r in rate.items()},
        "failed": failed,
        "product_ms_a_step": {k: round(t * 1e3, 2) for k, t in products.items()},
        "limit_tokens_per_s": round(limit, 1),
        "share_of_limit": round(rate["ours"] / limit, 3),
        "logprob_error": largest_error(model, prompts, found),
    }


def main(argv=None) -> dict:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="small model, few tokens, 3 runs")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--shape", choices=SHAPES, default="124M")
    p.add_argument("--dtypes", default="fp32,bf16", help="default: %(default)s")
    p.add_argument("--questions", type=int, help="default: 8 on a CPU, 40 on a GPU")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--ours-only", action="store_true", help="no peers")
    args = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.questions = args.questions or (40 if device == "cuda" else 8)
    if args.quick:
        args.shape, args.questions, args.new_tokens, args.runs = "quick", 4, 24, 3
    model = make_model(args.shape).to(device)
    result: dict = {"machine": machine(), "settings": vars(args)}
    print(result)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", ROOT, {})
        for name in args.dtypes.split(","):
            result[name] = measure(args, name, f"{folder}/model", model)
            print(name, *(f"{k}: {v}" for k, v in result[name].items()), sep="\n  ", flush=True)
            finish(result, args.out)
    for name in args.dtypes.split(","):
        print(f"{name}: {result[name]['share_of_limit']:.0%} of the limit by matrix products")
        best = [r for c, r in result[name]["ratio"].items() if c.startswith("transformers")]
        print(*(f"{name}: ratio to transformers' best: {ratio}" for ratio in best))
    return result


if __name__ == "__main__":
    main()
