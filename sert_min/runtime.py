"""What every script needs around its real work: one-line errors, device, dtype and threads."""

import contextlib
import ctypes
import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from kernels import cpu


class SertError(Exception):
    """A problem that the user can mend. The message is one line and names the fix."""


def run_script(main, args) -> None:
    """Run `main(args)`; known errors become one line on stderr and a non-zero exit status."""
    try:
        main(args)
    except SertError as e:
        sys.exit(f"error: {printable(str(e))}")
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the same command to continue", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; give a smaller --rows or --block-questions")
    except OSError as e:
        hints = {
            errno.ENOSPC: "free some space, then repeat the same command to continue",
            errno.EDQUOT: "free some space, then repeat the same command to continue",
            errno.EROFS: "choose a writable folder with --out-dir",
            errno.EEXIST: "a file is in the way, choose a folder with --out-dir",
            errno.ENOENT: "make its folder first",
            errno.ENOTDIR: "a file is in the way, choose a folder with --out-dir",
            errno.EACCES: "choose a folder that you may use with --out-dir",
        }
        if e.errno not in hints:
            raise
        where = f": {printable(str(e.filename))}" if e.filename else ""  # writes carry no name
        sys.exit(f"error: {e.strerror}{where}; {hints[e.errno]}")


def printable(text: str) -> str:
    """`text` on one line without control characters: model and data text is not trusted."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable_lines(text: str) -> str:
    """The same for text whose line ends are wanted."""
    return "\n".join(map(printable, text.split("\n")))


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; a device that is not there is an error."""
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
    if kind == "cuda":  # also for streams, graphs and Triton, which take the current one
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, n_params: int) -> torch.dtype:
    """`auto` takes bf16 where matrix products are fast in it, else fp32; small models fp32."""
    if name == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else device.type == "cpu" and cpu.has_bf16()
        )
        name = "bf16" if fast and n_params > 20e6 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def pick_threads(n_params: int) -> int:
    """Set and return PyTorch's CPU threads: OMP_NUM_THREADS, else one for a small model, else
    the faster of one and all on a product of the model's shape (more threads can be slower where
    cores are shared)."""
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
    """Tell glibc to keep freed memory for reuse. A training step frees and takes about a gigabyte,
    and having all its pages zeroed anew costs a tenth of the step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying at once; a second one kills."""
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


def this_command() -> str:
    """The command line that started this process, or torchrun."""
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = ["torchrun", "--nproc-per-node", str(n)] if n > 1 else ["python"]
    return shlex.join([*launcher, *sys.argv])


MACHINE = ("device", "dtype", "threads", "cpu", "gpu", "torch")  # what decides a run's bytes


def resolve_machine(args, settings: Path, n_params: int) -> tuple[torch.device, dict]:
    """The device of a run, and what of this machine decides its bytes (MACHINE). Device, dtype and
    threads that were left to us stay those of the run's settings file, if there is one; another
    CPU, GPU or torch than there is refused later (store.check_settings)."""
    from sert_min.store import fits, read_json  # here: store.py needs this file's SertError

    stored = read_json(settings) if settings.exists() else {}
    form = {"device": str, "dtype": str, "threads": range(1, 2**15)}
    if stored and not (fits(stored, form) and stored["dtype"] in ("fp32", "bf16")):
        raise SertError(f"{settings} is damaged or not of this script; choose another --out-dir")

    def chosen(flag: str) -> str:
        value = getattr(args, flag)
        return stored.get(flag, value) if value == "auto" else value

    device = pick_device(chosen("device"))
    dtype = pick_dtype(chosen("dtype"), device, n_params)
    threads = stored.get("threads") or pick_threads(n_params)
    torch.set_num_threads(threads)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    dtype = "bf16" if dtype is torch.bfloat16 else "fp32"
    kind = torch.backends.cpu.get_cpu_capability() + (" with bf16" if cpu.has_bf16() else "")
    return device, dict(zip(MACHINE, (device.type, dtype, threads, kind, gpu, torch.__version__)))
