"""What all benchmarks share: flags, timing of candidates in turn, the machine in words, one JSON."""

import argparse
import gc
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

from sert_min.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parents[1]
TOP_K, TOP_P = 10, 0.95  # of all benchmarks of sampling
BUSY = 2_000_000  # clock ticks, about a millisecond
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {"quick": (4, 6, 384), "124M": (12, 12, 768), "355M": (24, 16, 1024),
          "774M": (36, 20, 1280)}  # layers, heads, width  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks with a JSON file have."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="fewer or smaller shapes, and fewer runs")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--dtypes", default="fp32,bf16", help="default: %(default)s")
    p.add_argument("--shape", choices=SHAPES, default="124M")
    return p


def report(args, cells: Iterable[tuple[str, Callable]]) -> None:
    """Measure each (name, function that returns its figures), print it and write all so far."""
    result: dict = {"machine": machine(), "settings": vars(args)}
    print(result)
    for name, figures in cells:
        result[name] = figures()
        print(name, *(f"{k}: {v}" for k, v in result[name].items()), sep="\n  ", flush=True)
        finish(result, args.out)


def make_model(shape: str) -> GPT2:
    """A GPT-2 of one of SHAPES with random weights."""
    layers, heads, width = SHAPES[shape]
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
    return GPT2(config).init_weights_(0).eval()


def machine() -> dict:
    """Device, versions and commit of this run."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.processor()


def wall_seconds(f: Callable) -> float:
    """Seconds of work that is done when the call returns."""
    gc.collect()
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def gpu_seconds(f: Callable) -> float:
    """Seconds of the GPU, by CUDA events around the call. The GPU first waits for BUSY clock ticks,
    in which the host hands over everything up to the last event: so launching is not in it, unless
    the call takes the host longer than that or waits for the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY)
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    candidates: dict[str, Callable], runs: int, warm_up: int = 1, clock: Callable = wall_seconds
) -> dict[str, float]:
    """Median seconds of each candidate, in turn (A B C A B C ..), so that drift of the machine hits
    all alike."""
    rounds = [{n: clock(f) for n, f in candidates.items()} for _ in range(warm_up + runs)]
    return {name: statistics.median(r[name] for r in rounds[warm_up:]) for name in candidates}


def gpu_medians(candidates: dict[str, Callable], runs: int) -> dict[str, float]:
    return interleaved(candidates, runs, 3, gpu_seconds)


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
