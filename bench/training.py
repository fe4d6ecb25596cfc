"""Training: tokens per second, ours against transformers, and against what the hardware allows.

Batches of 8 examples with the lengths of real CommonsenseQA examples and random ids, random weights of
a GPT-2 shape, Adam at 3e-4, gradient norm clipped at 1, the loss on the completion alone.
    ours            sert_min/finetune.py, train_step
    transformers    its model and the step of its Trainer, without the Trainer's logging (it
                    needs `accelerate`): padded batch, labels -100 where there is no loss, autocast
                    for bf16, clip_grad_norm_, fused Adam
Both start from the same weights and take the same batches in turn, so the timed steps are also a
loss curve: the largest difference is printed. Figures are medians over the steps.

The limit is the time of what no training can leave out, measured in turn with the steps, on the same
batch: the three products (forward, gradient of the input, of the weight) of each linear layer at N
packed tokens, through the library that ours takes; the head's in fp32 at the M tokens that have a
loss; the products of attention; and the bytes of the optimiser (Adam reads 4 and writes 3 numbers of
4 bytes a parameter, clipping reads 1) at the measured speed of a copy. Activations, LayerNorms,
softmax and casts are not in it.

    python bench/training.py --out bench/results/training-cpu.json     # 124M on a CPU: 15 minutes
    python bench/training.py --quick                                   # 1 minute, a smaller model
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
from torch import Tensor, nn

from bench import common
from bench.common import DEVICE, bare_seconds, clock
from sert_min import finetune
from sert_min.finetune import IGNORE, Example, n_supervised
from sert_min.gpt2 import GPT2
from sert_min.io.machine import keep_freed_memory
from sert_min.kernels.fast import cpu
from sert_min.models import load_model
from sert_min.report.likelihood import padded

LR = 3e-4
# Tokens of prompt + completion, GPT-2's BPE, of every 76th question of CommonsenseQA's train split
# with a reasoning path in front of its answer: PaLM-540B's rationale, end-of-text included
# (tests/test_bench.py makes them anew). A label alone (method finetune) is always LABEL tokens.
LENGTHS = """
57+31 52+32 46+37 60+33 51+39 52+36 47+42 49+36 53+32 46+40 50+48 48+34 45+30 51+31 49+45 50+34
49+31 53+33 57+35 53+31 45+33 58+30 54+38 55+30 57+32 43+31 55+35 56+36 50+38 63+32 53+29 46+36
51+33 49+36 51+36 58+43 56+40 57+32 40+30 52+37 40+37 60+31 46+37 54+32 48+29 60+35 58+39 49+38
54+36 50+34 46+45 47+29 60+51 47+38 44+36 53+31 49+38 57+28 55+44 48+40 46+35 56+31 51+37 50+45
45+32 44+36 39+34 45+33 50+32 45+36 49+31 52+34 61+49 60+32 59+43 49+50 45+38 61+32 51+34 51+33
61+33 60+35 66+36 43+37 49+40 45+31 44+39 43+32 61+36 59+33 45+31 55+29 47+33 46+38 46+37 69+27
48+33 45+28 50+39 52+30 47+35 56+32 71+31 51+32 53+43 55+32 41+29 68+35 50+43 47+42 53+33 47+38
53+32 54+35 54+29 47+43 50+41 48+40 48+32 61+33 44+35 44+31 46+36 62+31 57+31 51+34 58+35 44+32
"""
LABEL = 8


def make_batches(n: int, size: int, paths: bool) -> list[list[Example]]:
    """n batches of `size` examples; over and over through LENGTHS, with random ids."""
    lengths, g = itertools.cycle(LENGTHS.split()), torch.Generator().manual_seed(0)

    def example() -> Example:
        prompt, completion = map(int, next(lengths).split("+"))
        length = prompt + (completion if paths else LABEL)
        ids = torch.randint(0, 49152, (length,), generator=g).tolist()
        return ids[:-1], [IGNORE] * (prompt - 1) + ids[prompt:]

    return [[example() for _ in range(size)] for _ in range(n)]


# --- the candidates: each is called with a batch, takes one step and returns its loss -------------


def ours(folder: Path, bf16: bool) -> Callable:
    model = load_model(folder, DEVICE)
    model.wte.sparse = finetune.sparse_embedding(model)  # as `fit` does
    optimizer = finetune.make_optimizer(model, LR)
    return lambda batch: finetune.train_step(model, optimizer, batch, 0, bf16=bf16)


def transformers_step(folder: Path, bf16: bool) -> Callable:
    """One step as transformers' Trainer takes it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step(batch: list[Example]) -> float:
        # the whole texts, padded: the model shifts the labels by itself
        ids = padded([i + t[-1:] for i, t in batch]).to(DEVICE)
        mask = padded([[1] * (len(t) + 1) for _, t in batch]).to(DEVICE)
        labels = padded([[IGNORE, *t] for _, t in batch], IGNORE).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# --- measuring ------------------------------------------------------------------------------------


@torch.no_grad()
def limit_seconds(model: GPT2, batch: list[Example], bf16: bool) -> float:
    """Seconds of what a step on `batch` can't do without, done once."""
    c, head, dtype = model.config, model.head_weight, torch.bfloat16 if bf16 else torch.float32
    lengths, M = [len(ids) for ids, _ in batch], n_supervised(batch)
    B, T, N = len(batch), max(lengths), sum(lengths)

    def random(*shape) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    def products(x, w, g) -> list[Callable]:
        return [partial(cpu.linear, *pair) for pair in ((x, w), (g, w.t()), (g.t(), x.t()))]

    weights = [m.weight.to(dtype) for m in model.h.modules() if isinstance(m, nn.Linear)]
    sides = {n: random(N, n) for w in weights[:4] for n in w.shape}  # of one layer
    q, p = random(B * c.n_head, T, c.n_embd // c.n_head), random(B * c.n_head, T, T)
    a, b = (torch.ones(64 * 2**20, device=DEVICE) for _ in range(2))
    needed = [f for w in weights for f in products(sides[w.shape[1]], w, sides[len(w)])]
    # attention: forward q k' and p v; backward the gradients of p, v, q and k
    needed += [lambda: q @ q.mT, lambda: p @ q] * (3 * c.n_layer)
    needed += products(random(M, c.n_embd).float(), head, random(M, len(head)).float())
    copy, all_needed = bare_seconds(lambda: a.copy_(b), 1), lambda: [f() for f in needed]
    copies = 8 * 4 * model.n_params() / (2 * a.nbytes)  # that move the optimiser's bytes
    return bare_seconds(all_needed, 1) + copies * copy


def measure(folder: Path, dtype: str, batches: list) -> dict:
    """The figures of one dtype and kind of examples, both candidates in turn. The first batch warms
    up: its loss counts, its time does not."""
    bf16 = dtype == "bf16"
    steps = {"ours": ours(folder, bf16), "transformers": transformers_step(folder, bf16)}
    times, losses, limits = {n: [] for n in steps}, {n: [] for n in steps}, []
    plain = load_model(folder, DEVICE)  # its weights for the products alone
    for batch in batches:
        for name, step in steps.items():
            start = clock()
            losses[name].append(float(step(batch)))
            times[name].append(clock() - start)
        limits.append(limit_seconds(plain, batch, bf16))
        print(f"  { ({n: round(t[-1], 4) for n, t in times.items()}) } s", flush=True)
    tokens = [sum(len(ids) for ids, _ in batch) for batch in batches]

    def typical(values: list, per: list) -> float:
        return round(statistics.median(a / b for a, b in list(zip(values, per))[1:]), 3)

    return {
        "tokens": statistics.median(tokens),
        "tokens_per_s": {name: typical(tokens, t) for name, t in times.items()},
        "ratio": typical(times["transformers"], times["ours"]),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values())),
        "losses": losses["ours"],
        "share_of_limit": typical(limits, times["ours"]),
    }


def main(argv=None) -> None:
    p = common.parser(__doc__)
    p.set_defaults(batch=8, steps=30 if DEVICE == "cuda" else 7)
    args = p.parse_args(argv)
    args.steps = 3 if args.quick else args.steps
    keep_freed_memory()  # as `fit` does; it serves both

    def figures(folder: Path, name: str) -> dict:
        dtype, kind = name.split(", ")
        return measure(folder, dtype, make_batches(args.steps + 1, args.batch, kind == "paths"))

    names = [f"{d}, {kind}" for d in args.dtypes.split(",") for kind in ("paths", "labels")]
    with common.saved_model(args.quick) as folder:
        common.report(args, names, partial(figures, folder))


if __name__ == "__main__":
    main()
