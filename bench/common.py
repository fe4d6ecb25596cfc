"""What all benchmarks share: timing of candidates in turn, the machine in words, peers, one JSON."""

import gc
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
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    for name in ("torch", "triton", "transformers", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor()


def interleaved(candidates: dict[str, Callable], runs: int, warm_up: int = 1) -> dict[str, float]:
    """Median wall seconds of each candidate, in turn (A B C A B C ..), so that drift of the machine
    hits all alike. Only for work that is done when the call returns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warm_up + runs):
        for name, f in candidates.items():
            gc.collect()
            start = time.perf_counter()
            f()
            times[name] += [time.perf_counter() - start] if i >= warm_up else []
    return {name: statistics.median(t) for name, t in times.items()}


def gpu_medians(candidates: dict[str, Callable], runs: int) -> dict[str, float]:
    """Median seconds of each candidate on the GPU, in turn, by CUDA events around each call.

    The GPU first waits for BUSY clock ticks, in which the host hands over everything up to the last
    event: so the time between the events is the GPU's, not that of launching. A candidate that takes
    the host longer than that, or waits for the device, is measured with its host's time."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(runs + 3):
        for name, f in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY)
            start.record()
            f()
            end.record()
            torch.cuda.synchronize()
            times[name] += [start.elapsed_time(end) / 1e3] if i >= 3 else []
    return {name: statistics.median(t) for name, t in times.items()}


def replay_seconds(f: Callable, times: int = 15) -> float:
    """Median seconds of f on the GPU as a CUDA graph: without the time of launching its kernels."""
    f()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        f()
    return gpu_medians({"graph": graph.replay}, times)["graph"]


def eager(logits):
    """Top-k, then top-p on the renormalised rest, draw, log-prob: as one writes it in PyTorch."""
    logprobs = F.log_softmax(logits.float(), -1)
    values, ids = logprobs.topk(TOP_K)
    share = values.softmax(-1)
    keep = share.cumsum(-1) - share < TOP_P
    drawn = torch.multinomial(torch.where(keep, share, 0.0), 1)
    return ids.gather(1, drawn), values.gather(1, drawn)


def finish(result: dict, out: str | None) -> None:
    """Write the JSON, if asked for."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
