"""The state of a training on disk: weights, optimiser and step, written all or nothing.

Training uses no random numbers but those that follow from (seed, epoch), so none are stored.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sert_min.io import files
from sert_min.io.errors import SertError, need, this_command


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """Replace the state in `folder` by this one."""
    tensors = {}
    for name, p in model.named_parameters():
        both = {"model": p.detach(), **optimizer.state[p]}
        tensors |= {f"{key}.{name}": value for key, value in both.items()}
    with files.atomic_folder(folder) as part:
        try:
            save_file(tensors, part / "state.safetensors", metadata={"step": str(step)})
        except SafetensorError as e:  # what safetensors makes of an OSError
            kept = "the state before is kept. Free some space, then continue with"
            raise SertError(f"{folder} can't be written ({e}); {kept}: {this_command()}") from None


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Restore the state in `folder` and return its step; 0 if there is none."""
    files.recover_folder(folder)
    path = folder / "state.safetensors"
    if not path.exists():
        old = list(folder.glob("step-*"))
        need(not old, f"{folder} is of an earlier version; choose another --out-dir")
        return 0
    try:
        with safe_open(path, framework="pt") as f:
            step = int(f.metadata()["step"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise SertError(f"{path} is damaged ({e}); remove {folder} to start again") from None
    shapes = {f"model.{name}": p.shape for name, p in model.named_parameters()}
    fits = {k: t.shape for k, t in tensors.items() if k.startswith("model.")} == shapes
    need(fits, f"{folder} belongs to another model; choose another --out-dir")
    keys = {k.split(".", 1)[0] for k in tensors} - {"model"}  # none before the first step
    state = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        p.data.copy_(tensors[f"model.{name}"])
        state |= {i: {key: tensors[f"{key}.{name}"] for key in keys}} if keys else {}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    print(f"going on from step {step:,}")
    return step


def keep_metrics_before(metrics: Path, step: int) -> int:
    """Drop what metrics.jsonl holds of steps after `step`, the saved one: they are taken again.
    Returns the last step that was validated."""
    files.set_torn_tail_aside(metrics)
    there = files.read_jsonl(metrics, {"step": int}) if metrics.exists() else ()
    kept = [r for r in there if r["step"] <= step]
    files.write_atomic(metrics, map(files.to_line, kept))
    return max((r["step"] for r in kept if "validation_loss" in r), default=0)
