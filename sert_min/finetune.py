"""Stages 2 and 3, the learning: tensors, loss and the loop that every training here shares.

An example is a prompt and a completion. They are tokenised apart, as in sampling (together they
could merge over the seam and give other ids), and exactly one end-of-text closes the completion.
The loss covers the completion only, or the whole text (`loss_on="all"`): by position, never by
token id, because GPT-2 has one special token and masking by id would hide the real end.

A batch holds no padding where it costs: its examples stand one after another in one row of N
tokens for all linear layers; only attention puts them into a padded [B, T] grid and takes them out
again, so that no example sees another.

The loop can be killed at any moment: its state (weights, optimiser, step, random state) is saved as
a folder that is wholly there or not, the order of examples follows from (seed, epoch) alone, and so
the resumed run takes the very steps that the uninterrupted one would have taken.
"""

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sert_min.gpt2 import GPT2, causal_attention
from sert_min.runtime import SertError
from sert_min.store import (
    append_durable,
    atomic_folder,
    read_json,
    read_jsonl,
    set_torn_tail_aside,
    sha256_file,
    to_line,
    write_atomic,
)

IGNORE = -100  # target of a position that has no loss
Example = tuple[list[int], list[int]]  # ids and targets, equally long

# --- tensors --------------------------------------------------------------------------------------


def encode_example(tokenizer, prompt: str, completion: str, loss_on: str = "answer") -> Example:
    """Ids and targets of one example; targets are shifted by one.

    Prompt ids [5, 6], completion ids [7, 8] and end-of-text 9 give
    ids [5, 6, 7, 8] and targets [IGNORE, 7, 8, 9], or [6, 7, 8, 9] with loss_on="all".
    """
    p, c = tokenizer.encode(prompt), tokenizer.encode(completion) + [tokenizer.eot]
    ids = p + c
    targets = ids[1:] if loss_on == "all" else [IGNORE] * (len(p) - 1) + c
    return ids[:-1], targets


class Batch(NamedTuple):
    """B examples of N tokens in all, one after another."""

    ids: Tensor  # [N]
    positions: Tensor  # [N] from 0 in each example
    targets: Tensor  # [N]
    place: Tensor  # [N] where a token stands in the flattened grid [B, T] of attention
    grid: tuple[int, int]  # B, T: T is the longest example


def pack(examples: list[Example], device="cpu") -> Batch:
    """Examples -> Batch."""
    T = max(len(ids) for ids, _ in examples)
    ids, positions, targets, place = [], [], [], []
    for row, (example_ids, example_targets) in enumerate(examples):
        ids += example_ids
        targets += example_targets
        positions += range(len(example_ids))
        place += range(row * T, row * T + len(example_ids))
    tensors = (torch.tensor(x, device=device) for x in (ids, positions, targets, place))
    return Batch(*tensors, (len(examples), T))


def packed_attention(batch: Batch) -> Callable:
    """Causal attention inside each example: q, k, v [N, H, D] -> [N, H, D]. Padding stands on the
    right of the grid, where no real token looks."""
    B, T = batch.grid

    def attend(layer, q, k, v):
        def to_grid(x):  # [N, H, D] -> [B, T, H, D]
            grid = x.new_zeros(B * T, *x.shape[1:])
            return grid.index_copy(0, batch.place, x).view(B, T, *x.shape[1:])

        out = causal_attention(layer, to_grid(q), to_grid(k), to_grid(v))
        return out.reshape(B * T, *q.shape[1:])[batch.place]

    return attend


def loss_sum(model: GPT2, batch: Batch) -> Tensor:
    """Summed next-token cross-entropy (nats) over the supervised tokens. The head runs on those
    only: with masked prompts that is a fraction of all tokens."""
    hidden = model(batch.ids, batch.positions, packed_attention(batch))  # [N, C]
    keep = batch.targets != IGNORE
    return F.cross_entropy(model.logits(hidden[keep]), batch.targets[keep], reduction="sum")


def n_supervised(examples: list[Example]) -> int:
    return sum(t != IGNORE for _, targets in examples for t in targets)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n examples in an epoch: a function of (seed, epoch) alone."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=g).tolist()


# --- one step -------------------------------------------------------------------------------------


def make_optimizer(model: GPT2, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam [SERT §III-A]; decoupled weight decay (AdamW) only in pretraining, on matrices."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others}]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=fused)


def train_step(
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    step: int,
    accumulate: int = 1,
    clip: float = 1.0,
    bf16: bool = False,
) -> float:
    """One optimiser step on the mean loss per supervised token of `examples`; returns that loss
    (nats). `accumulate` runs them in so many parts with the same result and less memory. A loss or
    gradient that is not finite is an error before the update."""
    device = model.wte.weight.device
    n = n_supervised(examples)
    size = -(-len(examples) // accumulate)
    total = 0.0
    for i in range(0, len(examples), size):
        batch = pack(examples[i : i + size], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_sum(model, batch) / n
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not (torch.isfinite(total) and torch.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise SertError(
            f"step {step}: loss {total:.4g}, gradient norm {norm:.4g}; weights are as before this "
            "step. Lower --lr, or look at the examples of this step"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


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
    clip: float = 1.0

    def check(self) -> "TrainSettings":
        """Refuse values that mean nothing, naming the flag."""
        for name in ("epochs", "batch_size", "max_steps", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SertError(f"--{name.replace('_', '-')} must be at least 1")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SertError(f"--{name} must be above 0")
        if not 0 <= self.seed < 2**40:
            raise SertError("--seed must be from 0 to 2^40 - 1")
        return self

    def steps(self, n_examples: int) -> int:
        """Optimiser steps of the whole training."""
        steps = self.epochs * -(-n_examples // self.batch_size)
        return min(steps, self.max_steps or steps)


def fit(
    model: GPT2,
    examples: list[Example],
    out: Path,
    s: TrainSettings,
    bf16: bool = False,
    after_epoch: Callable[[int], dict] | None = None,
    save_seconds: float = 600,
    bar=None,
) -> None:
    """Train `model` in place for s.steps(len(examples)) steps, going on from `out`/state if it is
    there. Writes `out`/metrics.jsonl (loss per step; what `after_epoch(epoch)` returns) and
    timings.jsonl. Saves after each epoch, every `save_seconds` and when a signal stops it."""
    if not examples:
        raise SertError("there are no examples to train on; check the input file")
    optimizer = make_optimizer(model, s.lr)
    step = load_state(model, optimizer, out)
    metrics = out / "metrics.jsonl"
    keep_metrics_before(metrics, step)
    per_epoch = -(-len(examples) // s.batch_size)
    steps, saved, lines = s.steps(len(examples)), time.monotonic(), []
    if bar is not None:
        bar.update(step)

    def save() -> None:
        nonlocal saved, lines
        append_durable(metrics, "".join(lines))
        lines = []
        save_state(model, optimizer, out, step)
        saved = time.monotonic()

    model.train()
    with stop_signals() as stopped:
        while step < steps:
            epoch, at = divmod(step, per_epoch)
            order = epoch_order(len(examples), s.seed, epoch)
            chosen = [examples[i] for i in order[at * s.batch_size : (at + 1) * s.batch_size]]
            loss = train_step(model, optimizer, chosen, step, s.accumulate, s.clip, bf16)
            step += 1
            lines.append(to_line({"step": step, "epoch": epoch, "loss": round(loss, 6)}))
            if bar is not None:
                bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
                bar.update(1)
            if step % per_epoch == 0 or step == steps:
                if after_epoch is not None:
                    model.eval()
                    lines.append(to_line({"step": step, "epoch": epoch, **after_epoch(epoch)}))
                    model.train()
                save()
            elif stopped or time.monotonic() - saved > save_seconds:
                save()
            if stopped and step < steps:
                raise SystemExit(stopped[0] + 128)
    model.eval()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying at once; a second one kills."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        print("\nstopping after this step; repeat the same command to continue", flush=True)
        signal.signal(number, before[number])

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def keep_metrics_before(metrics: Path, step: int) -> None:
    """Cut metrics.jsonl back to `step`: what was logged after the saved state is redone."""
    set_torn_tail_aside(metrics)
    if metrics.exists():
        kept = [r for r in read_jsonl(metrics) if r["step"] <= step]
        write_atomic(metrics, map(to_line, kept))


# --- the state on disk ----------------------------------------------------------------------------


def state_tensors(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training state by name; references, not copies."""
    tensors = {f"model.{name}": t.detach() for name, t in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save_state(model: GPT2, optimizer, out: Path, step: int) -> None:
    """Write `out`/state/step-N whole (fsync, rename; state.json with hashes inside) and drop all
    older states but one."""
    from safetensors.torch import save_file

    folder = out / "state"
    with atomic_folder(folder / f"step-{step:08d}") as part:
        save_file(state_tensors(model, optimizer), part / "state.safetensors")
        state = {"step": step, "sha256": sha256_file(part / "state.safetensors")}
        (part / "state.json").write_text(json.dumps(state) + "\n")
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_state(model: GPT2, optimizer, out: Path) -> int:
    """Restore the newest whole state and return its step; 0 if there is none. A broken one is
    named, and the one before it is taken."""
    from safetensors.torch import load_file

    for folder in sorted((out / "state").glob("step-*"), reverse=True):
        try:
            state = read_json(folder / "state.json")
            if sha256_file(folder / "state.safetensors") != state["sha256"]:
                raise SertError("its hash differs")
            tensors = load_file(folder / "state.safetensors")
        except (SertError, OSError, KeyError) as e:
            print(f"{folder} is broken ({e}); taking the state before it")
            continue
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
                start = f"optimizer.{name}."
                optimizer.state[p] = {
                    k.removeprefix(start): t.to(p.device if t.dim() else t.device)
                    for k, t in tensors.items()
                    if k.startswith(start)
                }
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        print(f"going on from step {state['step']}")
        return state["step"]
    return 0
