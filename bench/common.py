"""What all benchmarks share: interleaved timing, the machine in words, one JSON at the end."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
TOP_K, TOP_P = 10, 0.95  # of all benchmarks of sampling
BUSY = 2_000_000  # clock ticks, about a millisecond


def machine() -> dict:
    """Device, versions and commit of this run."""

    def package(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def commit() -> str | None:
        try:
            command = ["git", "rev-parse", "--short", "HEAD"]
            p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return p.stdout.strip() or None

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{
            name: package(name) for name in ("torch", "triton", "transformers", "flashinfer-python")
        },
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def interleaved(candidates: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median wall seconds of each candidate; one warm-up each, then A B C A B C .., so that drift
    of the machine hits all alike. Only for work that is done when the call returns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for f in candidates.values():
        f()
    for _ in range(runs):
        for name, f in candidates.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def gpu_medians(candidates: dict[str, Callable], runs: int) -> dict[str, float]:
    """Median seconds of each candidate on the GPU, interleaved, by CUDA events around each call.

    The GPU first waits for BUSY clock ticks, in which the host hands over everything up to the last
    event: so the time between the events is the GPU's, not that of launching. A candidate that takes
    the host longer than that, or waits for the device, is measured with its host's time."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for f in candidates.values():
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    for _ in range(runs):
        for name, f in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY)
            start.record()
            f()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def replay_seconds(f: Callable, times: int = 15) -> float:
    """Median seconds of f on the GPU as a CUDA graph: without the time of launching its kernels."""
    f()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        f()
    return gpu_medians({"graph": graph.replay}, times)["graph"]


def cold_inputs(n_bytes: int) -> int:
    """How many inputs of a size must take turns so that none is still in the GPU's L2 cache, without
    more than 4 GB in all."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(2, min(-(-4 * cache // n_bytes), int(4e9 / n_bytes)))


def eager(logits):
    """Top-k, then top-p on the renormalised rest, draw, log-prob: as one writes it in PyTorch."""
    logprobs = F.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(TOP_K)
    share = values.softmax(-1)
    keep = share.cumsum(-1) - share < TOP_P
    drawn = torch.multinomial(torch.where(keep, share, 0.0), 1)
    return ids.gather(1, drawn), values.gather(1, drawn)


def without_sort(logits):
    """As vLLM's sampler does it: the best k by topk, what is below the last kept one is masked in the
    whole row, and the largest of probabilities over exponential noise is the draw; then the log-prob
    of it from a log-softmax."""
    values = logits.float().topk(TOP_K).values
    share = values.softmax(-1)
    keep = share.cumsum(-1) - share < TOP_P
    floor = values.masked_fill(~keep, float("inf")).amin(-1, keepdim=True)
    kept = logits.float().masked_fill(logits < floor, float("-inf")).softmax(-1)
    drawn = (kept / torch.empty_like(kept).exponential_()).argmax(-1, keepdim=True)
    return drawn, F.log_softmax(logits.float(), -1).gather(1, drawn)


def finish(result: dict, out: str | None, quiet: bool = False) -> None:
    """Write the JSON, if asked for."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
        if not quiet:
            print(f"wrote {out}")
