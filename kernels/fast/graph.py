"""CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor


def capture(f: Callable, state: list[Tensor], pool=None) -> Callable:
    """`f`, whose tensors stay where they are, as a CUDA graph: one launch in place of hundreds. It
    runs once before, which compiles its kernels, and the `state` that this changes is put back.
    Graphs of one `pool` share the memory of their temporary tensors."""
    before, side = [x.clone() for x in state], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f()
    torch.cuda.current_stream().wait_stream(side)
    for x, y in zip(state, before):
        x.copy_(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        drawn = f()

    def replay():
        graph.replay()
        return drawn

    return replay
