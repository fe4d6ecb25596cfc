"""What all benchmarks share: flags, timing of candidates in turn, the machine in words, one JSON."""

import argparse
import contextlib
import gc
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import distributions
from pathlib import Path

import torch

from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.models import save_model

ROOT = Path(__file__).resolve().parents[1]
TOP_K, TOP_P = 10, 0.95  # of all benchmarks of sampling
BUSY = 2_000_000  # clock ticks, about a millisecond
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks with a JSON file have."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="fewer or smaller shapes, and fewer runs")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--dtypes", default="fp32,bf16", help="default: %(default)s")
    return p


def report(args, names: Iterable[str], figures: Callable[[str], dict]) -> None:
    """Measure the figures of each name, print them and write all so far."""
    result: dict = {"machine": machine(), "settings": vars(args)}
    print(result)
    for name in names:
        result[name] = figures(name)
        print(name, *(f"{k}: {v}" for k, v in result[name].items()), sep="\n  ", flush=True)
        finish(result, args.out)


def finish(result: dict, out: str | None) -> None:
    """Write the JSON, if asked for."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def saved_model(quick: bool):
    """A folder with a GPT-2 of 124M parameters, or of fewer, with random weights."""
    layers, heads, width = (4, 6, 384) if quick else (12, 12, 768)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
    with tempfile.TemporaryDirectory() as folder:
        save_model(GPT2(config).init_weights_(0), Path(folder) / "model", ROOT, {})
        yield Path(folder) / "model"


def machine() -> dict:
    """Device, versions and commit of this run."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    cpu_name = cpu[1] if cpu else platform.processor()
    names = "torch", "triton", "transformers"
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name,
        "threads": torch.get_num_threads(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    } | {d.name: d.version for d in distributions() if d.name in names}


def clock() -> float:
    """Seconds now: CPU seconds of this process on a CPU with one thread, which other processes on the
    machine disturb little; else wall seconds of finished work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(f: Callable) -> float:
    gc.collect()
    start = clock()
    f()
    return clock() - start


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
    candidates: dict[str, Callable], runs: int, warm_up: int = 1, measure: Callable = seconds
) -> dict[str, float]:
    """Median seconds of each candidate, in turn (A B C A B C ..), so that drift of the machine hits
    all alike."""
    rounds = [{n: measure(f) for n, f in candidates.items()} for _ in range(warm_up + runs)]
    return {name: statistics.median(r[name] for r in rounds[warm_up:]) for name in candidates}


def rates(candidates: dict[str, Callable], tokens: int, runs: int) -> dict[str, dict]:
    """Tokens per second of each candidate, which all make `tokens` of them; and how many times as
    quick as each of them `ours` is."""
    times = interleaved(candidates, runs)
    return {
        "tokens_per_s": {name: round(tokens / t, 1) for name, t in times.items()},
        "ratio": {name: round(t / times["ours"], 2) for name, t in times.items()},
    }


def gpu_medians(candidates: dict[str, Callable], runs: int) -> dict[str, float]:
    return interleaved(candidates, runs, 3, gpu_seconds)


def bare_seconds(f: Callable, runs: int) -> float:
    """Median seconds of f; on a GPU as a CUDA graph, without the time of launching its kernels."""
    if DEVICE == "cpu":
        return interleaved({"f": f}, runs, 0)["f"]
    f()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        f()
    return gpu_medians({"graph": graph.replay}, runs)["graph"]
