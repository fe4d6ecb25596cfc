"""Training: tokens per second, ours against transformers, and against what the hardware allows.

Batches of 8 examples (and one large size) with the lengths of real CommonsenseQA examples and random
ids, random weights of a GPT-2 shape, Adam at 3e-4, gradient norm clipped at 1, the loss on the
completion alone: the same weights, batches, dtype and loss for both.
    ours            sert_min/finetune.py, train_step; on a GPU also with the compiled loss
    transformers    GPT2LMHeadModel and the step of its Trainer, without the Trainer's logging (it
                    needs `accelerate`): padded batch, labels -100 where there is no loss, autocast
                    for bf16, clip_grad_norm_, fused Adam; on a GPU also compiled
All start from the same weights and take the same batches in turn, so the timed steps are also a
loss curve: the largest difference is printed. Figures are medians over the steps.

The limit is the time of what no training can leave out, measured in turn with the steps, on the same
batch: the three products (forward, gradient of the input, of the weight) of each linear layer at N
packed tokens, through the library that ours takes; the head's in fp32 at the M tokens that have a
loss; the products of attention; and the bytes of the optimiser (Adam reads 4 and writes 3 numbers of
4 bytes a parameter, clipping reads 1) at the measured speed of a copy. Activations, LayerNorms,
softmax and casts are not in it.

On a CPU with one thread all times are CPU seconds of this process, which other processes on the
machine disturb little; else wall seconds.

    python bench/training.py --out bench/results/training-cpu.json     # 124M on a CPU: 20 minutes
    python bench/training.py --quick                                   # 1 minute, a smaller model
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import torch
from torch import Tensor

from bench.common import ROOT, finish, machine, replay_seconds
from bench.sampling import SHAPES, make_model
from kernels.fast import cpu
from sert_min.finetune import (
    IGNORE,
    Example,
    loss_sum,
    make_optimizer,
    n_supervised,
    sparse_embedding,
    train_step,
)
from sert_min.gpt2 import GPT2
from sert_min.io.machine import keep_freed_memory
from sert_min.models import load_model, save_model

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


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="small model, 3 steps, no large batch")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--shape", choices=SHAPES, default="124M")
    p.add_argument("--dtypes", default="fp32,bf16", help="default: %(default)s")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--large", type=int, help="the large batch; default: 32 on a CPU, 64 on a GPU")
    p.add_argument("--steps", type=int, help="default: 7 on a CPU, 30 on a GPU")
    p.add_argument("--kinds", default="paths,labels,large", help="default: %(default)s")
    p.add_argument("--no-compiled", action="store_true", help="GPU: without torch.compile's minute")
    args = p.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.large = args.large or (64 if args.device == "cuda" else 32)
    args.steps = args.steps or (30 if args.device == "cuda" else 7)
    if args.quick:
        args.shape, args.steps, args.large = "quick", 3, None
    return args


def clock(device: str) -> float:
    """Seconds now: CPU seconds on a CPU with one thread, else wall seconds of finished work."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def make_batches(n: int, size: int, paths: bool) -> list[list[Example]]:
    """n batches of `size` examples; over and over through LENGTHS, with random ids."""
    lengths = [tuple(map(int, pair.split("+"))) for pair in LENGTHS.split()]
    g, batches = torch.Generator().manual_seed(0), []
    for i in range(n * size):
        prompt, completion = lengths[i % len(lengths)]
        completion = completion if paths else LABEL
        ids = torch.randint(0, 50257, (prompt + completion,), generator=g).tolist()
        if i % size == 0:
            batches.append([])
        batches[-1].append((ids[:-1], [IGNORE] * (prompt - 1) + ids[prompt:]))
    return batches


# --- the candidates: each is called with a batch, takes one step and returns its loss -------------


def ours(folder: str, device: str, bf16: bool, compiled: bool = False) -> Callable:
    model = load_model(Path(folder), device)
    model.wte.sparse = sparse_embedding(model) and not compiled  # as `fit` does
    optimizer = make_optimizer(model, LR)
    loss_of = torch.compile(loss_sum, dynamic=True) if compiled else loss_sum
    return lambda batch: train_step(model, optimizer, batch, 0, bf16=bf16, loss_of=loss_of)


def transformers_step(folder: str, device: str, bf16: bool, compiled: bool = False) -> Callable:
    """One step as transformers' Trainer takes it."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    forward = torch.compile(model, dynamic=True) if compiled else model

    def step(batch: list[Example]) -> float:
        longest = max(len(ids) for ids, _ in batch) + 1
        rows = []  # ids, mask, labels: the whole text, which the model shifts by itself
        for ids, targets in batch:
            pad = longest - len(ids) - 1
            text, labels = ids + targets[-1:], [IGNORE] + targets
            rows.append((text + [0] * pad, [1] * len(text) + [0] * pad, labels + [IGNORE] * pad))
        ids, mask, labels = (torch.tensor(x, device=device) for x in zip(*rows))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = forward(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# --- measuring ------------------------------------------------------------------------------------


def race(args, folder: str, bf16: bool, batches: list) -> tuple[dict, dict, list, dict]:
    """Seconds and losses of each candidate's steps, taken in turn with what they can't do without,
    and what failed. The first batch warms up: its loss counts, its time does not."""
    kinds = {"ours": (ours, False), "transformers": (transformers_step, False)}
    if args.device == "cuda" and not args.no_compiled:
        kinds |= {
            "ours, compiled": (ours, True),
            "transformers, compiled": (transformers_step, True),
        }
    steps, times, losses, failed, limits = {}, {}, {}, {}, []
    plain = load_model(Path(folder), args.device)  # its weights for the products alone
    for name, (make, compiled) in kinds.items():
        steps[name] = make(folder, args.device, bf16, compiled)
        times[name], losses[name] = [], []
    for i, batch in enumerate(batches):
        for name in list(steps):
            start = clock(args.device)
            try:
                losses[name].append(steps[name](batch))
            except Exception as e:
                failed[name] = f"{type(e).__name__}: {str(e)[:200]}"
                for d in (steps, times, losses):
                    d.pop(name)
                continue
            if i > 0:
                times[name].append(clock(args.device) - start)
        if i > 0:
            limits.append(limit_seconds(plain, batch, bf16))
        last = {name: round(t[-1], 4) for name, t in times.items() if t}
        print(f"  step {i}: seconds {last}, losses {[x[-1] for x in losses.values()]}", flush=True)
    return times, losses, limits, failed


@torch.no_grad()
def limit_seconds(model: GPT2, batch: list[Example], bf16: bool) -> dict[str, float]:
    """What a step on `batch` can't do without, done once: seconds by part."""
    c, weight = model.config, model.head_weight
    device, dtype = weight.device.type, torch.bfloat16 if bf16 else torch.float32
    N, M = sum(len(ids) for ids, _ in batch), n_supervised(batch)
    B, T, D = len(batch), max(len(ids) for ids, _ in batch), c.n_embd // c.n_head

    def random(*shape) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def seconds(*products: Callable) -> float:
        if device == "cuda":
            return replay_seconds(lambda: [product() for product in products], 3)
        start = clock(device)
        for product in products:
            product()
        return clock(device) - start

    def three(x, w, g) -> list[Callable]:
        return [
            lambda: cpu.linear(x, w),
            lambda: cpu.linear(g, w.t()),
            lambda: cpu.linear(g.t(), x.t()),
        ]

    q, p = random(B * c.n_head, T, D), random(B * c.n_head, T, T)
    sides = {n: random(N, n) for b in model.h[:1] for x in linears(b) for n in x.weight.shape}
    weights = [layer.weight.to(dtype) for block in model.h for layer in linears(block)]
    linear = [f for w in weights for f in three(sides[w.shape[1]], w, sides[w.shape[0]])]
    # forward q k' and p v; backward the gradients of p, v, q and k
    attention = [lambda: q @ q.mT, lambda: p @ q] * (3 * c.n_layer)
    head = three(random(M, c.n_embd).float(), weight, random(M, len(weight)).float())
    found = {"linear": seconds(*linear), "attention": seconds(*attention), "head": seconds(*head)}
    a, b = (torch.ones(64 * 2**20, device=device) for _ in range(2))
    per_byte = seconds(lambda: a.copy_(b)) / (2 * 4 * a.numel())
    found["optimiser"] = 8 * 4 * model.n_params() * per_byte
    return found


def linears(block) -> list:
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


def measure(args, folder: str, dtype: str, size: int, paths: bool, steps: int) -> dict:
    """The figures of one dtype, batch size and kind of examples."""
    batches = make_batches(steps + 1, size, paths)
    times, losses, limits, failed = race(args, folder, dtype == "bf16", batches)
    tokens = [sum(len(ids) for ids, _ in batch) for batch in batches[1:]]
    rate = {
        name: statistics.median(n / t for n, t in zip(tokens, ts)) for name, ts in times.items()
    }
    ratio = {  # seconds of each in units of ours, not compiled
        name: statistics.median(t / o for t, o in zip(ts, times["ours"]))
        for name, ts in times.items()
    }
    mine, peers = (
        min((r for name, r in ratio.items() if name.startswith(who)), default=None)
        for who in ("ours", "transformers")
    )
    best = min(times, key=lambda name: (not name.startswith("ours"), ratio[name]))
    shares = [sum(parts.values()) / t for parts, t in zip(limits, times[best])]
    limit = statistics.median(n / sum(parts.values()) for n, parts in zip(tokens, limits))
    typical = {name: statistics.median(parts[name] for parts in limits) for name in limits[0]}
    apart = [abs(a - b) for name in losses for a, b in zip(losses[name], losses["ours"])]
    figures = {
        "batch": size,
        "tokens": statistics.median(tokens),
        "supervised": statistics.median(map(n_supervised, batches[1:])),
        "tokens_per_s": {name: round(r, 1) for name, r in rate.items()},
        "ratio": {name: round(r, 3) for name, r in ratio.items()},
        "ratio_to_best": peers and round(peers / mine, 3),
        "limit_ms": {name: round(t * 1e3, 2) for name, t in typical.items()},
        "limit_tokens_per_s": round(limit, 1),
        "share_of_limit": round(statistics.median(shares), 3),
        "largest_loss_difference": max(apart),
        "failed": failed,
        "losses": losses,
        "seconds": {name: [round(t, 4) for t in ts] for name, ts in times.items()},
    }
    for key in list(figures)[:-2]:
        print(f"  {key}: {figures[key]}")
    return figures


def main(argv=None) -> dict:
    args = parse_args(argv)
    from transformers.utils import logging

    logging.set_verbosity_error()
    keep_freed_memory()  # as `fit` does; it serves both
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick", "dtypes")}
    cpu_clock = args.device == "cpu" and torch.get_num_threads() == 1
    result = {
        "machine": machine(),
        "settings": settings,
        "clock": "CPU seconds of one thread" if cpu_clock else "wall seconds",
    }
    print(f"{result['machine']}\n{settings}, {result['clock']}")
    with tempfile.TemporaryDirectory() as folder:
        save_model(make_model(args.shape), Path(folder) / "model", ROOT, {})
        for dtype in args.dtypes.split(","):
            rows = {
                "paths": (args.batch, True, args.steps),
                "labels": (args.batch, False, args.steps),
            }
            if args.large:
                rows["large"] = (args.large, True, max(2, args.steps // 3))
            for name in [n for n in rows if n in args.kinds.split(",")]:
                row, name = rows[name], name.replace("large", "paths, large")
                print(f"{dtype}, {name}")
                result[f"{dtype}, {name}"] = measure(args, f"{folder}/model", dtype, *row)
                finish(result, args.out)
    for dtype in args.dtypes.split(","):
        r = result.get(f"{dtype}, paths")
        if not r:
            continue
        print(
            f"{dtype}: {r['share_of_limit']:.0%} of the limit, "
            f"losses within {r['largest_loss_difference']:.1e} of transformers'"
        )
        print(f"{dtype}: ratio to transformers' best: {r['ratio_to_best']}")
    return result


if __name__ == "__main__":
    main()
