"""Sampling with log-probs: tokens per second, ours against what people use, and against the limit.

Q questions x 25 continuations of exactly N new tokens, top-k 10, top-p 0.95, random weights of a
GPT-2 shape, the same weights, prompts and dtype for all, and every candidate gives token ids and
their log-probs:
    ours                     sert_min/generate.py, plain samples (--raw)
    transformers             generate(num_return_sequences=25), with its growing and its static cache
    transformers, batching   its continuous batching (generate_batch), where it runs
    recompute                the whole text again for each token, as nanoGPT samples (few tokens)
Candidates run in turn, five times (--runs); figures are medians. The limit is the time of the matrix
products alone at this number of rows: the body's in the dtype, the head's as ours runs it.

    python bench/sampling.py --out bench/results/sampling-cpu.json     # 124M on a CPU: 40 minutes
    python bench/sampling.py --quick                                   # 2 minutes, a smaller model
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import ROOT, TOP_K, TOP_P, eager, finish, machine, replay_seconds
from kernels import bf16_pieces, fp32_product
from kernels.fast import cpu
from kernels.reference import BLOCK
from sert_min.generate import SampleSettings, sample_block
from sert_min.gpt2 import GPT2, GPT2Config, product
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


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="small model, few tokens, 3 runs")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--shape", choices=SHAPES, default="124M")
    p.add_argument("--dtypes", default="fp32,bf16", help="default: %(default)s")
    p.add_argument("--questions", type=int, help="default: 8 on a CPU, 40 on a GPU")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--ours-only", action="store_true", help="no peers")
    p.add_argument("--no-batching", action="store_true", help="without continuous batching")
    args = p.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.questions = args.questions or (40 if args.device == "cuda" else 8)
    if args.quick:
        args.shape, args.questions, args.new_tokens, args.runs = "quick", 4, 24, 3
    return args


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
        return (
            torch.tensor([r.token_ids for r in rows]),
            torch.tensor([r.logprobs for r in rows]),
        )

    return run


def transformers_generate(model, prompts: list[list[int]], new: int, **cache):
    """`generate`, and log-probs from the logits that it returns: one log-softmax a step, as
    compute_transition_scores would do at once on a stack of all of them."""
    ids = torch.tensor(prompts, device=model.device)
    settings = dict(do_sample=True, top_k=TOP_K, top_p=TOP_P, num_return_sequences=25)
    settings |= dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **cache)

    def run() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                return_dict_in_generate=True,
                output_logits=True,
                **settings,
            )
            tokens = out.sequences[:, len(prompts[0]) :]
            steps = [
                x.float().log_softmax(-1).gather(1, t[:, None])
                for x, t in zip(out.logits, tokens.T)
            ]
        return tokens.cpu(), torch.cat(steps, 1).cpu()

    return run


def transformers_batching(model, prompts: list[list[int]], new: int):
    """transformers' continuous batching: paged attention, 25 requests a question."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        top_p=TOP_P,
        max_new_tokens=new,
        eos_token_id=-1,
        pad_token_id=0,
    )

    def run() -> tuple[Tensor, Tensor]:
        inputs = [p for p in prompts for _ in range(25)]
        done = model.generate_batch(inputs, generation_config=config, return_logprobs=True)
        rows = sorted(done.values(), key=lambda r: r.request_id)
        return (
            torch.tensor([r.generated_tokens for r in rows]),
            torch.tensor([r.logprobs for r in rows]),
        )

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


def seconds(run) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def product_seconds(model: GPT2, rows: int, times: int = 15) -> dict[str, float]:
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
        for i in range(0, len(weight), BLOCK):
            if bf16 and cpu.has_bf16():
                x.bfloat16() @ rough[i : i + BLOCK].T
            else:
                cpu.linear(x, weight[i : i + BLOCK])

    def body() -> None:
        for b in model.h:
            product(x, b.attn.c_attn)
            product(x, b.attn.c_proj)
            product(product(x, b.mlp.c_fc), b.mlp.c_proj)

    def timed(f) -> float:
        if weight.is_cuda:
            return replay_seconds(f, times)
        f()
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            f()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return {"body": timed(body), "head": timed(head)}


def largest_error(model: GPT2, prompts: list[list[int]], found: tuple[Tensor, Tensor]) -> float:
    """Largest difference of ours' log-probs from a plain forward of the same tokens, 16 rows."""
    tokens, logprobs = (x[:: max(1, len(x) // 16)] for x in found)
    owners = [prompts[i // 25] for i in range(0, len(found[0]), max(1, len(found[0]) // 16))]
    ids = torch.cat([torch.tensor(owners), tokens], 1).to(model.wte.weight.device)
    start = len(prompts[0])
    with torch.inference_mode():
        logits = model.logits(model(ids)[:, start - 1 : -1])
        wanted = logits.log_softmax(-1).gather(2, ids[:, start:, None])[:, :, 0]
    return float((wanted.cpu() - logprobs).abs().max())


def peers(folder: str, model: GPT2, dtype: torch.dtype, prompts, new: int, batching: bool) -> dict:
    """The candidates of transformers, on the same weights."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    theirs.to(model.wte.weight.device)
    theirs.generation_config.eos_token_id = None
    found = {
        "transformers": transformers_generate(theirs, prompts, new),
        "transformers, static cache": transformers_generate(
            theirs, prompts, new, cache_implementation="static"
        ),
    }
    if hasattr(theirs, "generate_batch") and batching:
        found["transformers, batching"] = transformers_batching(theirs, prompts, new)
    return found


def measure(args, name: str, folder: str, model: GPT2, result: dict) -> None:
    """All figures of one dtype, printed and put into result[name]."""
    g = torch.Generator().manual_seed(1)
    shape = (args.questions, args.prompt_tokens)
    prompts = torch.randint(0, 50257, shape, generator=g).tolist()
    model.cast_(DTYPES[name])
    candidates = {"ours": ours(model, prompts, args.new_tokens)}
    failed = {}
    if not args.ours_only:
        candidates |= peers(
            folder, model, DTYPES[name], prompts, args.new_tokens, not args.no_batching
        )
    rows, few = 25 * args.questions, max(2, args.new_tokens // 32)
    tokens = {c: rows * args.new_tokens for c in candidates}
    warm = {}
    for c in list(candidates):  # warm up; of transformers' ways only the best one goes on
        try:
            warm[c] = seconds(candidates[c])
        except Exception as e:
            failed[c] = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            candidates.pop(c)
        print(f"  warm-up {c}: {warm.get(c, failed.get(c))}", flush=True)
    for c in sorted((c for c in candidates if c != "ours"), key=warm.get)[1:]:
        candidates.pop(c)
    if not args.ours_only:
        candidates["recompute"] = recompute(model, prompts[:1], few)
        tokens["recompute"] = 25 * few
    times = {c: [] for c in candidates}
    for _ in range(args.runs):
        for c in candidates:
            times[c].append(seconds(candidates[c]))
        print(
            "  " + ", ".join(f"{c} {tokens[c] / t[-1]:,.1f}" for c, t in times.items()), flush=True
        )
    products = product_seconds(model, rows)
    rate = {c: tokens[c] / statistics.median(t) for c, t in times.items()}
    limit = rows / sum(products.values())
    result[name] = {
        "tokens_per_s": {c: round(r, 1) for c, r in rate.items()},
        "ratio": {c: round(rate["ours"] / r, 2) for c, r in rate.items()},
        "ours_continuations_per_s": round(rate["ours"] / args.new_tokens, 2),
        "warm_up_s": {c: round(t, 2) for c, t in warm.items()},
        "failed": failed,
        "product_ms_a_step": {k: round(t * 1e3, 2) for k, t in products.items()},
        "limit_tokens_per_s": round(limit, 1),
        "share_of_limit": round(rate["ours"] / limit, 3),
        "logprob_error": largest_error(model, prompts, candidates["ours"]()),
        "seconds": {c: [round(t, 2) for t in ts] for c, ts in times.items()},
    }
    for key, value in result[name].items():
        print(f"  {key}: {value}")


def main(argv=None) -> dict:
    args = parse_args(argv)
    model = make_model(args.shape).to(args.device)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick", "dtypes")}
    result = {"machine": machine(), "settings": settings}
    print(f"{result['machine']}\n{settings}")
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", ROOT, {})
        for name in args.dtypes.split(","):
            print(name)
            measure(args, name, f"{folder}/model", model, result)
            finish(result, args.out)
    for name in args.dtypes.split(","):
        best = [c for c in result[name]["ratio"] if c.startswith("transformers")]
        print(f"{name}: {result[name]['share_of_limit']:.0%} of the limit by matrix products")
        if best:
            ratio = min(result[name]["ratio"][c] for c in best)
            print(f"{name}: ratio to transformers' best: {ratio}")
    return result


if __name__ == "__main__":
    main()
