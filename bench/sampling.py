"""Sampling with log-probs: tokens per second, ours against what people use, and against the limit.

Q questions x 25 continuations of exactly N new tokens, top-k 10, top-p 0.95, random weights of a
GPT-2 shape, the same weights, prompts and dtype for all, and every candidate gives token ids and
their log-probs:
    ours            sert_min/generate.py, plain samples (--raw)
    transformers    generate(num_return_sequences=25), with its growing and its static cache
Candidates run in turn, five times; figures are medians. The limit is the time of the matrix products
alone at this number of rows: the body's in the dtype, the head's as ours runs it.

    python bench/sampling.py --out bench/results/sampling-cpu.json     # 124M on a CPU: 45 minutes
    python bench/sampling.py --quick                                   # 2 minutes, a smaller model
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from bench.common import DEVICE, DTYPES
from sert_min.generate import SampleSettings, sample_block
from sert_min.gpt2 import GPT2, product
from sert_min.kernels import bf16_pieces, fp32_product
from sert_min.kernels.fast import cpu
from sert_min.kernels.reference import BLOCK
from sert_min.models import load_model

NEVER = SimpleNamespace(n_vocab=50257, eot=-1, ends={})  # instead of a tokenizer: no row ends early


# --- the candidates: each returns token ids [rows, N] and their log-probs [rows, N] ---------------


def ours(model: GPT2, prompts: list[list[int]], new: int):
    s = SampleSettings(raw=True, max_new_tokens=new, rows=25 * len(prompts))
    names, kept = [f"question {i}" for i in range(len(prompts))], {}

    def run() -> tuple[Tensor, Tensor]:
        rows = sample_block(model, NEVER, prompts, names, s, kept=kept)
        return torch.tensor([r.token_ids for r in rows]), torch.tensor([r.logprobs for r in rows])

    return run


def transformers_generate(folder: Path, dtype: str, prompts: list[list[int]], new: int, **cache):
    """`generate` on the same weights, and log-probs from the logits that it returns: one log-softmax
    a step, as compute_transition_scores would do at once on a stack of all of them."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().to(DEVICE)
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor(prompts, device=DEVICE)
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
def product_seconds(model: GPT2, rows: int) -> float:
    """Median seconds of one decoding step's matrix products, the head's as the sampler runs it. The
    weights rotate through all layers, as in the model."""
    weight, bf16 = model.head_weight, model.h[0].mlp.c_fc.weight.dtype is torch.bfloat16
    x, rough = torch.randn(rows, model.config.n_embd, device=DEVICE), weight.bfloat16()
    pieces, h = bf16_pieces(weight, weight=True), bf16_pieces(x, weight=False)
    pieces = F.pad(pieces, (0, 0, 0, -len(weight) % 64))  # rows, as make_draw does

    def products() -> None:
        for b in model.h:
            product(x, b.attn.c_attn)
            product(x, b.attn.c_proj)
            product(product(x, b.mlp.c_fc), b.mlp.c_proj)
        if DEVICE == "cuda":
            fp32_product(h, pieces) if bf16 else fp32_product(x, weight)
            return
        for w, r in zip(weight.split(BLOCK), rough.split(BLOCK)):
            x.bfloat16() @ r.T if bf16 and cpu.has_bf16() else cpu.linear(x, w)

    return common.bare_seconds(products, 15)


def measure(args, folder: Path, dtype: str) -> dict:
    """All figures of one dtype."""
    g, rows, new = torch.Generator().manual_seed(1), 25 * args.questions, args.new_tokens
    prompts = torch.randint(0, 49152, (args.questions, args.prompt_tokens), generator=g).tolist()
    model = load_model(folder, DEVICE, DTYPES[dtype])
    theirs = partial(transformers_generate, folder, dtype, prompts, new)
    candidates = {"ours": ours(model, prompts, new), "transformers": theirs()}
    candidates["transformers, static"] = theirs(cache_implementation="static")
    found = common.rates(candidates, rows * new, args.runs)
    limit = rows / product_seconds(model, rows)
    share = round(found["tokens_per_s"]["ours"] / limit, 3)
    return found | {"limit_tokens_per_s": round(limit, 1), "share_of_limit": share}


def main(argv=None) -> None:
    p = common.parser(__doc__)
    p.add_argument("--questions", type=int, default=40 if DEVICE == "cuda" else 8)
    p.set_defaults(prompt_tokens=64, new_tokens=64, runs=5)
    args = p.parse_args(argv)
    if args.quick:
        args.questions, args.new_tokens, args.runs = 4, 24, 3
    with common.saved_model(args.quick) as folder:
        common.report(args, args.dtypes.split(","), partial(measure, args, folder))


if __name__ == "__main__":
    main()
