"""The state of a training on disk: weights, optimiser, random numbers, step. Saved all or nothing."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sert_min.io.errors import SertError, printable, this_command
from sert_min.io.files import atomic_folder, read_json, sha256_file

# --- the state on disk ----------------------------------------------------------------------------


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training state by name, as references."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path, step: int) -> None:
    """Write `out`/state/step-N, all or nothing, with the hash of its tensors, and drop all older states
    but one."""

    folder = out / "state"
    with atomic_folder(folder / f"step-{step:08d}") as part:
        try:
            save_file(state_tensors(model, optimizer), part / "state.safetensors")
        except SafetensorError as e:  # its form of an OSError
            raise SertError(
                f"{folder} can't be written ({e}); the state before is kept. Free some space, then "
                f"continue with: {this_command()}"
            ) from None
        state = {"step": step, "sha256": sha256_file(part / "state.safetensors")}
        (part / "state.json").write_text(json.dumps(state) + "\n")
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> int:
    """Restore the newest whole state and return its step; 0 if there is none. A broken state is
    reported and renamed, and the one before it is taken. What killed writes left is removed."""
    for old in (out / "state").glob(".step-*.old"):  # killed between atomic_folder's two renames
        back = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        shutil.rmtree(old) if back.exists() else old.rename(back)
    for junk in (*out.glob(".*.tmp"), *(out / "state").glob(".step-*")):
        junk.unlink() if junk.is_file() else shutil.rmtree(junk)
    tensors = None
    for folder in sorted((out / "state").glob("step-*"), reverse=True):
        tensors = read_state(folder)
        if tensors is not None:
            break
    if tensors is None:
        return 0
    parameters = dict(model.named_parameters())
    stored = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    if {k: t.shape for k, t in stored.items()} != {k: p.shape for k, p in parameters.items()}:
        raise SertError(f"{folder} belongs to another model; choose another --out-dir")
    keys = {k.split(".", 1)[0] for k in tensors} - {"model", "rng"}  # none before the first step
    moments = {
        i: {key: tensors[f"{key}.{name}"] for key in keys} for i, name in enumerate(parameters)
    }
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(stored[name])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments if keys else {}})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    step = int(folder.name.removeprefix("step-"))
    print(f"going on from step {step:,}")
    return step


def read_state(folder: Path) -> dict[str, Tensor] | None:
    """The tensors of a state folder; None, after a printed line, if the state is broken."""

    try:
        state = read_json(folder / "state.json")
        if state.get("sha256") != sha256_file(folder / "state.safetensors"):
            raise SertError("its hash differs")
        if folder.name != f"step-{state.get('step'):08d}":
            raise SertError(f"its step is {state.get('step')}")
        return load_file(folder / "state.safetensors")
    except (SertError, OSError, ValueError, TypeError, SafetensorError) as e:
        aside = folder.with_name(folder.name.replace("step", "broken"))
        why = printable(str(e))
        print(f"{folder} is broken ({why}); it is now {aside.name}; the state before it is taken")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        return None
