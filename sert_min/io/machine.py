"""The machine: device, dtype, threads, signals, and what of it decides the bytes of a run."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator

import torch

from kernels.fast import cpu
from sert_min.io.errors import SertError, need


def pick_device(name: str) -> torch.device:
    """The device of a flag. `auto` takes CUDA, then MPS, then the CPU; a missing device is an error."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, ok in there.items() if ok)
    if name == "cuda" and there["cuda"]:  # under torchrun each process has its own
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    kind = name.split(":")[0]
    if kind not in there:
        raise SertError(f"--device {name} is unknown; choose auto, cpu, cuda or mps")
    if not there[kind]:
        raise SertError(f"--device {name} is not available here; leave it out or use --device cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise SertError(f"--device {name} is not available here; use --device {kind}") from None
    if kind == "cuda":  # streams, graphs and Triton take the current device
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, n_params: int) -> torch.dtype:
    """The dtype of a flag. `auto` takes bf16 where its products are fast and the model is not small."""
    if name == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else device.type == "cpu" and cpu.has_bf16()
        )
        name = "bf16" if fast and n_params > 20e6 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def pick_threads(n_params: int) -> int:
    """Set and return the number of PyTorch's CPU threads: OMP_NUM_THREADS if it is set, one for a small
    model, else the faster of one and all on a product of the model's shape (more threads can be slower
    where cores are shared)."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    everything = torch.get_num_threads()
    if n_params < 20e6 or everything == 1:
        torch.set_num_threads(1)
        return 1
    x, w = torch.randn(200, 768), torch.randn(3072, 768)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        return sorted(times)[4]

    threads = min((1, everything), key=seconds)
    torch.set_num_threads(threads)
    return threads


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


MACHINE = ("device", "dtype", "threads", "cpu", "gpu", "torch")  # what decides a run's bytes


def resolve_machine(
    device: str, dtype: str, stored: dict, n_params: int
) -> tuple[torch.device, dict]:
    """The device of a run, and everything about this machine that decides the run's bytes (MACHINE).
    `device` and `dtype` are flags; where they say auto, and for the threads, what the run's `stored`
    settings hold goes on. Another CPU, GPU or torch is refused later (files.check_settings). The
    CPU's name also says whether F.linear serves where `cpu.linear` would use oneDNN."""
    threads = stored.get("threads", 1)
    whole = (
        type(threads) is int and 0 < threads < 2**15 and isinstance(stored.get("device", ""), str)
    )
    whole = whole and stored.get("dtype", "fp32") in ("fp32", "bf16")
    need(
        whole,
        "the settings in this folder are damaged or not of this script; choose another --out-dir",
    )
    where = pick_device(stored.get("device", "auto") if device == "auto" else device)
    wanted = stored.get("dtype", "auto") if dtype == "auto" else dtype
    wanted = pick_dtype(wanted, where, n_params)
    threads = stored.get("threads") or pick_threads(n_params)
    torch.set_num_threads(threads)
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else None
    name = "bf16" if wanted is torch.bfloat16 else "fp32"
    kind = torch.backends.cpu.get_cpu_capability() + (" with bf16" if cpu.has_bf16() else "")
    if torch.backends.mkldnn.is_available() and not cpu.onednn_is_right():
        kind += " without oneDNN"
    return where, dict(zip(MACHINE, (where.type, name, threads, kind, gpu, torch.__version__)))
