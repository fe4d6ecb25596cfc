"""Stages 2 and 3, the learning: tensors, loss, and the loop that every training here shares.

A prompt and its completion are tokenised apart, as in sampling (together they could merge over the
seam and give other ids), and exactly one end-of-text closes the completion. The loss covers the
completion, or the whole text (`loss_on="all"`). Prompts and padding are masked by their position:
GPT-2 has one special token, and a mask of that id would also hide the end-of-text that the student
must learn.

The examples of a batch stand one after another in one row of N tokens, so linear layers waste nothing
on padding. Only attention puts them into a padded [B, T] grid and takes them out again, so that no
example sees another. The head runs on the M tokens that have a loss.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sert_min.gpt2 import GPT2, causal_attention
from sert_min.io import parallel
from sert_min.io.errors import SertError, need, this_command
from sert_min.io.files import sync, to_line
from sert_min.io.machine import keep_freed_memory, stop_signals
from sert_min.io.progress import Bar
from sert_min.io.state import keep_metrics_before, load_state, save_state
from sert_min.kernels.fast.graph import replay
from sert_min.kernels.fast.head_loss import HeadLoss
from sert_min.models import first_not_finite

IGNORE = -100  # target of a position that has no loss
CLIP = 1.0  # largest gradient norm (paper silent)
Example = tuple[list[int], list[int]]  # ids and targets, equally long

# --- tensors --------------------------------------------------------------------------------------


def encode_example(tokenizer, prompt: str, completion: str, loss_on: str = "answer") -> Example:
    """Ids and targets of one example; targets are shifted by one.

    Prompt ids [5, 6], completion ids [7, 8] and end-of-text 9 give the ids [5, 6, 7, 8] and the
    targets [IGNORE, 7, 8, 9], or [6, 7, 8, 9] with loss_on="all".
    """
    p, c = tokenizer.encode_prompt(prompt), tokenizer.encode(completion) + [tokenizer.eot]
    targets = (p if loss_on == "all" else [IGNORE] * len(p)) + c
    return (p + c)[:-1], targets[1:]


class Batch(NamedTuple):
    """B examples of N tokens in all, one after another; M of the tokens have a loss."""

    ids: Tensor  # [N]
    positions: Tensor  # [N] from 0 in each example
    targets: Tensor  # [N]
    supervised: Tensor  # [M] places in [N] whose target is not IGNORE
    counts: Tensor  # [M] 1.0, or 0.0 for padding
    place: Tensor  # [N] where a token stands in the flattened grid [B, T] of attention
    grid: tuple[int, int]  # B, T: T is the longest example


def pack(examples: list[Example], device="cpu", few_sizes: bool = False) -> Batch:
    """Put examples into one Batch. With `few_sizes` T is a multiple of 32, N fills the grid and M is
    a multiple of 64: the padding has no loss, and few shapes need few CUDA graphs."""
    T, fill = max(len(ids) for ids, _ in examples), few_sizes
    T += -T % 32 * fill
    ids, positions, targets, place = [], [], [], []
    for row, (example_ids, example_targets) in enumerate(examples):
        n = len(example_ids)
        pad = (T - n) * fill
        ids += example_ids + [0] * pad
        targets += example_targets + [IGNORE] * pad
        positions += [*range(n), *[0] * pad]
        place += range(row * T, row * T + n + pad)
    # The places are found on the host, so nothing has to wait for the device to count them.
    supervised = [i for i, t in enumerate(targets) if t != IGNORE]
    pad = -len(supervised) % 64 * fill
    counts, supervised = [1.0] * len(supervised) + [0.0] * pad, supervised + [0] * pad
    columns = (torch.tensor(x) for x in (ids, positions, targets, supervised, counts, place))
    return Batch(*(x.to(device, non_blocking=True) for x in columns), (len(examples), T))


def packed_attention(batch: Batch) -> Callable:
    """Causal attention inside each example, [N, H, D] to [N, H, D]. No token looks at the padding,
    which stands on the right of the grid."""
    B, T = batch.grid

    def attend(layer, q, k, v):
        if q.device.type == "cpu":  # where fp32 is quicker than bf16, above all going back
            q, k, v = q.float(), k.float(), v.float()
        grids = []  # [B, T, H, D] each
        for x in (q, k, v):
            grid = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, batch.place, x)
            grids.append(grid.view(B, T, *x.shape[1:]))
        with torch.autocast(q.device.type, enabled=False):
            out = causal_attention(layer, *grids)
        return out.reshape(B * T, *q.shape[1:]).index_select(0, batch.place)

    return attend


def loss_sum(model: GPT2, batch: Batch, bf16: bool = False) -> Tensor:
    """Summed cross-entropy (nats) of the tokens that have a loss, as by F.cross_entropy. With `bf16`
    the blocks' products are in bf16; residual stream, head and loss stay fp32."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model(batch.ids, batch.positions, packed_attention(batch))  # [N, C]
    hidden = hidden.index_select(0, batch.supervised).float()  # [M, C]
    targets = batch.targets[batch.supervised].clamp(min=0)
    return (HeadLoss.apply(hidden, model.head_weight, targets) * batch.counts).sum()


def n_supervised(examples: list[Example]) -> int:
    """How many tokens have a loss."""
    return sum(t != IGNORE for _, targets in examples for t in targets)


@torch.no_grad()
def mean_loss(model: GPT2, examples: list[Example], bf16: bool = False) -> float:
    """Mean loss (nats) per token that has one, 32 examples at a time."""
    device = model.wte.weight.device
    parts = (pack(examples[i : i + 32], device) for i in range(0, len(examples), 32))
    total = sum(loss_sum(model, part, bf16).item() for part in parts)
    need(math.isfinite(total), f"the loss on the validation examples is {total}; lower --lr")
    return total / n_supervised(examples)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n examples, a function of (seed, epoch) alone: a resumed run finds it again."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=g).tolist()


# --- one step -------------------------------------------------------------------------------------


def make_optimizer(model: GPT2, lr: float) -> torch.optim.Optimizer:
    """Adam [SERT §III-A] with PyTorch's other defaults, fused into one pass where possible."""
    return torch.optim.Adam(model.parameters(), lr, fused=model.wte.weight.device.type != "mps")


def sparse_embedding(model: GPT2) -> bool:
    """Whether the token embedding may give a sparse gradient. Added to the dense one of a tied head,
    it saves a tenth of gpt2's step on a CPU. On a GPU the addition would not be deterministic."""
    return model.lm_head is None and model.wte.weight.device.type == "cpu"


def add_gradient(model: GPT2, examples: list[Example], n: int, bf16: bool) -> Tensor:
    """Add to the gradients those of the examples' part of a mean over n tokens; returns that part of
    the loss. On a GPU it is a CUDA graph, because its thousand small kernels run faster than the host
    can launch them one by one."""
    device = model.wte.weight.device

    def run(batch: Batch, n: Tensor) -> Tensor:
        loss = loss_sum(model, batch, bf16) / n
        loss.backward()
        return loss.detach()

    batch = pack(examples, device, few_sizes=device.type == "cuda")
    inputs = (*batch[:-1], torch.tensor(float(n)).to(device))
    if device.type != "cuda":
        return run(batch, inputs[-1])
    key = (batch.grid, len(batch.supervised), bf16)
    return replay(model, key, lambda *x: run(Batch(*x[:-1], batch.grid), x[-1]), inputs)


def train_step(
    model: GPT2, optimizer, examples: list[Example], step: int, accumulate=1, bf16=False
) -> float:
    """Take one optimiser step on the mean loss (nats) per token that has one; returns that loss.
    `accumulate` runs the examples in so many parts, and torchrun gives each process its share: the
    result is the same. A loss or gradient that is not finite is an error before the update."""
    n, device = n_supervised(examples), model.wte.weight.device
    on_cpu = device.type == "cpu"  # elsewhere gradients stay where they are, for the graphs
    mine, total = examples[parallel.RANK :: parallel.WORLD], torch.zeros((), device=device)
    size = -(-len(mine) // accumulate) or 1
    for i in range(0, len(mine), size):
        total += add_gradient(model, mine[i : i + size], n, bf16)
    parameters = list(model.parameters())
    parallel.sum_up(total, parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # This is a step's only wait for the device: a broken number must not reach the weights.
    total, length = torch.stack([total, norm]).tolist()
    if not (math.isfinite(total) and math.isfinite(length)):
        optimizer.zero_grad(on_cpu)
        places = (first_not_finite(model, ids) for ids, _ in examples)
        where = next((p for p in places if p.startswith("first")), "finite in fp32 when run again")
        raise SertError(
            f"step {step}: loss {total:.4g}, gradient norm {length:.4g} ({where}); the weights are "
            "as before this step. Lower --lr, use --dtype fp32, or look at the examples of this step"
        )
    if length > CLIP:
        torch.nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
    optimizer.step()
    optimizer.zero_grad(on_cpu)
    return total


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation as in [SERT §III-A]; constant learning rate, no dropout (paper silent)."""

    epochs: int = 20
    batch_size: int = 8
    lr: float = 3e-4
    max_steps: int | None = None
    seed: int = 0
    accumulate: int = 1

    def check(self) -> "TrainSettings":
        """Refuse values that have no meaning; the error names the flag."""
        for name in ("epochs", "batch_size", "max_steps", "accumulate"):
            value, flag = getattr(self, name), name.replace("_", "-")
            need(value is None or value >= 1, f"--{flag} must be at least 1")
        need(0 < self.lr < math.inf, "--lr must be above 0")
        need(0 <= self.seed < 2**40, "--seed must be from 0 to 2^40 - 1")
        return self

    def steps(self, n_examples: int) -> int:
        """Optimiser steps of the whole training."""
        steps = self.epochs * -(-n_examples // self.batch_size)
        return min(steps, self.max_steps or steps)


def fit(
    model: GPT2,
    examples: list[Example],
    names: list[str],
    out: Path,
    s: TrainSettings,
    bf16: bool = False,
    validate: Callable[[], dict] | None = None,
    save_seconds: float = 300,
) -> None:
    """Train `model` in place for s.steps(len(examples)) steps, from the state (weights, optimiser,
    step) in `out`/state if there is one. metrics.jsonl gets the loss of each step and, after each
    epoch, what `validate()` returns. The state is saved every `save_seconds`, at the end, and when
    SIGINT or SIGTERM asks to stop: the resumed run takes the very steps that the uninterrupted one
    would have taken. `names` are the examples' question ids, for errors."""
    steps, per_epoch = s.steps(len(examples)), -(-len(examples) // s.batch_size)
    keep_freed_memory()
    optimizer = make_optimizer(model, s.lr)
    step = parallel.process_0_first(lambda: load_state(model, optimizer, out / "state"))
    told = f"{out} has gone {step:,} steps already, asked are {steps:,}"
    need(step <= steps, f"{told}; raise --epochs or --max-steps, or choose another --out-dir")
    main, log = parallel.RANK == 0, out / "metrics.jsonl"
    validated = keep_metrics_before(log, step) if main else 0
    model.wte.sparse = sparse_embedding(model)
    saved = time.perf_counter()  # when the state was written last

    def note(**record) -> None:
        metrics.write(to_line({"step": step, "epoch": (step - 1) // per_epoch + 1, **record}))

    def save() -> None:
        if main:
            sync(metrics.fileno())
            save_state(model, optimizer, out / "state", step)

    with (
        open(log if main else os.devnull, "a", buffering=1) as metrics,  # line by line
        stop_signals() as stopped,
        Bar(steps, "step", disable=not main, initial=step) as bar,
    ):
        while True:
            epoch, at = divmod(step, per_epoch)
            if main and validate and step > validated and (at == 0 or step == steps):
                note(**validate())
            if number := parallel.largest(stopped[0] if stopped else 0):
                save()
                print(f"\nsaved at step {step}; continue with: {this_command()}", flush=True)
                raise SystemExit(128 + number)
            if step == steps:
                return save()
            order = epoch_order(len(examples), s.seed, epoch)
            chosen = order[at * s.batch_size : (at + 1) * s.batch_size]
            batch = [examples[i] for i in chosen]
            where = f"epoch {epoch + 1}, questions {', '.join(names[i] for i in chosen)}"
            try:
                loss = train_step(model, optimizer, batch, step + 1, s.accumulate, bf16)
            except torch.OutOfMemoryError:
                hint = "--accumulate N runs each batch in N parts (another --out-dir)"
                raise SertError(f"{where}: out of memory; {hint}") from None
            except SertError as e:
                raise SertError(f"{where}: {e}") from None
            step += 1
            note(loss=round(loss, 6))
            bar.note = f", epoch {epoch + 1}, loss {loss:.3f}"
            bar.count(sum(len(ids) for ids, _ in batch), 1)
            if time.perf_counter() - saved > save_seconds:
                save()
                saved = time.perf_counter()
