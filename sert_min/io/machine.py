"""The machine: device, dtype, threads, signals, and what of it decides the bytes of a run."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from sert_min.io.errors import SertError, need
from sert_min.io.parallel import RANK
from sert_min.kernels import check
from sert_min.kernels.fast import cpu


def pick_device(name: str) -> torch.device:
    """The device of a flag. `auto` takes CUDA, then MPS, then the CPU; a missing device is an error."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and cuda:  # under torchrun each process has its own
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    known = name.split(":")[0] in ("cpu", "cuda", "mps")
    need(known, f"--device {name} is unknown; choose auto, cpu, cuda or mps")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise SertError(f"--device {name} is not available here; use --device auto") from None
    if device.type == "cuda":  # streams, graphs and Triton take the current device
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, n_params: int) -> torch.dtype:
    """The dtype of a flag. `auto` takes bf16 where its products are fast and the model is not small."""
    if name == "auto":
        fast = {"cuda": partial(torch.cuda.is_bf16_supported, including_emulation=False),
                "cpu": cpu.has_bf16}.get(device.type, bool)  # fmt: skip
        name = "bf16" if n_params > 20e6 and fast() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def pick_threads(n_params: int) -> int:
    """The number of PyTorch's CPU threads: OMP_NUM_THREADS if it is set, one for a small model, else
    the faster of one and all on a product of the model's shape (more threads can be slower where
    cores are shared)."""
    everything = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return everything
    if n_params < 20e6:
        return 1
    data = {"f": F.linear, "x": torch.randn(200, 768), "w": torch.randn(3072, 768)}
    times = {n: Timer("f(x, w)", globals=data, num_threads=n).timeit(8) for n in (1, everything)}
    return min(times, key=lambda n: times[n].mean)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for reuse. A training step frees and takes about a gigabyte, and
    zeroing its pages anew costs a tenth of the step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying at once. A second signal kills."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        os.write(2, b"\nstopping; once more to stop at once\n")  # print is not reentrant
        signal.signal(number, before[number] or signal.SIG_DFL)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


WITHOUT = " without Triton"


def gpu_name(device: torch.device, stored: dict) -> str:
    """The name of a GPU, and whether the Triton kernels can't serve there: then plain PyTorch does. For
    a further process of torchrun, process 0 has decided (`stored`)."""
    if RANK > 0 and str(stored.get("gpu")).endswith(WITHOUT):
        check.OFF[device] = "process 0 runs without Triton"
    name, why = torch.cuda.get_device_name(device), check.problem(device)
    if why and RANK == 0:
        print(f"note: the Triton kernels don't serve on {name} ({why}); plain PyTorch runs, which is "
              "several times slower", file=sys.stderr)  # fmt: skip
    return name + WITHOUT * bool(why)


MACHINE = ("device", "dtype", "threads", "cpu", "gpu", "torch")  # what decides a run's bytes


def resolve_machine(
    device: str, dtype: str, stored: dict, n_params: int
) -> tuple[torch.device, dict]:
    """The device of a run, and everything about this machine that decides the run's bytes (MACHINE).
    `device` and `dtype` are flags; where they say auto, and for the threads, what the run's `stored`
    settings hold goes on. Another CPU, GPU or torch is refused later (files.check_settings). The
    CPU's name also says whether F.linear serves where `cpu.linear` would use oneDNN."""
    kept = {"device": "auto", "dtype": "fp32", "threads": 1} | stored
    whole = type(kept["threads"]) is int and 0 < kept["threads"] < 2**15
    whole = whole and isinstance(kept["device"], str) and kept["dtype"] in ("fp32", "bf16")
    need(whole, "the stored settings are damaged or not of this script; choose another --out-dir")
    where = pick_device(kept["device"] if device == "auto" else device)
    wanted = stored.get("dtype", "auto") if dtype == "auto" else dtype
    name = "bf16" if pick_dtype(wanted, where, n_params) is torch.bfloat16 else "fp32"
    threads = stored.get("threads") or pick_threads(n_params)
    torch.set_num_threads(threads)
    gpu = gpu_name(where, stored) if where.type == "cuda" else None
    kind = torch.backends.cpu.get_cpu_capability() + (" with bf16" if cpu.has_bf16() else "")
    if torch.backends.mkldnn.is_available() and not cpu.onednn_is_right():
        kind += " without oneDNN"
    return where, dict(zip(MACHINE, (where.type, name, threads, kind, gpu, torch.__version__)))
