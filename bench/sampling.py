"""Sampling with log-probs: tokens per second, ours against what people use, and against the limit.

Q questions x 25 continuations of exactly N new tokens, top-k 10, top-p 0.95, random weights of a
GPT-2 shape, the same weights, prompts and dtype for all, and every candidate gives token ids and
their log-probs:
    ours            sert_min/generate.py, plain samples (--raw)
    transformers    generate(num_return_sequences=25), with its growing and its static cache
Candidates run in turn, five times (--runs); figures are medians. The limit is the time of the matrix
products alone at this number of rows: the body's in the dtype, the head's as ours runs it.

    python bench/sampling.py --out bench/results/sampling-cpu.json     # 124M on a CPU: 40 minutes
    python bench/sampling.py --quick                                   # 2 minutes, a smaller model
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from sert_min.generate import SampleSettings, sample_block
from sert_min.gpt2 import GPT2, product
from sert_min.kernels import bf16_pieces, fp32_product
from sert_min.kernels.fast import cpu
from sert_min.kernels.reference import BLOCK
from sert_min.models import save_model

NEVER = SimpleNamespace(n_vocab=50257, eot=-1, ends={})  # instead of a tokenizer: no row ends early


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
    settings = dict(do_sample=True, top_k=common.TOP_K, top_p=common.TOP_P, num_return_sequences=25)
    settings |= dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **cache)
    settings |= dict(return_dict_in_generate=True, output_logits=True)

    @torch.inference_mode()
    def run() -> tuple[Tensor, Tensor]:
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        tokens = out.sequences[:, len(prompts[0]) :]
        steps = zip(out.logits, tokens.T)
        scores = [x.float().log_softmax(-1).gather(1, t[:, None]) for x, t in steps]
        return tokens.cpu(), torch.cat(scores, 1).cpu()

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
        return {name: common.replay_seconds(f) for name, f in both.items()}
    return common.interleaved(both, 15)


def measure(args, name: str, folder: str, model: GPT2) -> dict:
    """All figures of one dtype."""
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 49152, (args.questions, args.prompt_tokens), generator=g).tolist()
    model.cast_(common.DTYPES[name])
    rows, candidates = 25 * args.questions, {"ours": ours(model, prompts, args.new_tokens)}
    if not args.ours_only:
        given = (folder, model, prompts, args.new_tokens)
        static = transformers_generate(*given, cache_implementation="static")
        peers = {"transformers": transformers_generate(*given), "transformers, static": static}
        warm = common.interleaved(peers, 1, warm_up=0)  # only the best one goes on
        print(f"  warm-up: {warm}", flush=True)
        best = min(warm, key=warm.get)
        candidates[best] = peers[best]
    times = common.interleaved(candidates, args.runs)
    rate = {c: rows * args.new_tokens / t for c, t in times.items()}
    products = product_seconds(model, rows)
    limit = rows / sum(products.values())
    return {
        "tokens_per_s": {c: round(r, 1) for c, r in rate.items()},
        "ratio": {c: round(rate["ours"] / r, 2) for c, r in rate.items()},
        "product_ms_a_step": {k: round(t * 1e3, 2) for k, t in products.items()},
        "limit_tokens_per_s": round(limit, 1),
        "share_of_limit": round(rate["ours"] / limit, 3),
    }


def main(argv=None) -> None:
    p = common.parser(__doc__)
    p.add_argument("--questions", type=int, help="default: 8 on a CPU, 40 on a GPU")
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--ours-only", action="store_true", help="no peers")
    args = p.parse_args(argv)
    args.questions = args.questions or (40 if common.DEVICE == "cuda" else 8)
    if args.quick:
        args.shape, args.questions, args.new_tokens, args.runs = "quick", 4, 24, 3
    model = common.make_model(args.shape).to(common.DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", common.ROOT, {})
        cells = [(d, lambda d=d: measure(args, d, f"{folder}/model", model))
                 for d in args.dtypes.split(",")]  # fmt: skip
        common.report(args, cells)


if __name__ == "__main__":
    main()
