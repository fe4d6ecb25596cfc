"""Decoder and training on a GPU, if there is one, against the CPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_finetune import random_examples, random_model
from test_generate import PAPER, Words, blocks_of, count_flips, logprob_error, loud_model, no_sums

from sert_min import finetune
from sert_min.generate import GREEDY, sample_block
from sert_min.io.errors import SertError
from sert_min.kernels.fast import graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("raw", [False, True], ids=["branched", "raw"])
def test_two_blocks_equal_the_cpu(raw, dtype):
    """Guards graphs that are captured once and replayed with other prompts and slots."""
    s, reject = replace(PAPER, rows=150, raw=raw, max_new_tokens=40), no_sums(53)
    exact = dtype is torch.float32  # in bf16 draws may differ
    model, on_gpu = loud_model().cast_(dtype), loud_model().cast_(dtype).cuda()
    memory, flips = {}, 0
    for block in blocks_of(2):
        wanted = sample_block(model, Words(), *block, s, reject)
        rows = sample_block(on_gpu, Words(), *block, s, reject, memory=memory)
        assert [row.stream for row in rows] == [row.stream for row in wanted]
        flips += count_flips(wanted, rows)
        error = logprob_error(model, block[0], rows).abs()
        print(f"\n{dtype}, raw={raw}: {flips} flips, error {error.median():.1e}, {error.max():.1e}")
        most = 1e-4 if exact else 0.1
        assert error.max() < most and error.median() < 0.01  # H100, bf16: 0.027, 0.0035
        assert {row.finish for row in rows} == {"eos", "length", "rejected"} or not exact
    if exact:
        (decoder,) = memory.values()
        assert flips <= 2 and {(150, 1), (150, 2), (75, 2)} == set(decoder.graphs)  # H100: 0


@pytest.mark.parametrize("s, n, flips", [
    (replace(GREEDY, max_new_tokens=32), 40, 1),  # a greedy row for each prompt
    (replace(PAPER, rows=1), 1, 1),  # one slot
    (replace(PAPER, rows=150, top_k=0, max_new_tokens=12), 10, 2),  # the kernel without candidates
])  # fmt: skip
def test_settings_and_sizes(s, n, flips):
    model, on_gpu, (block,) = loud_model(), loud_model().cuda(), blocks_of(1, n)
    wanted = sample_block(model, Words(), *block, s)
    rows = sample_block(on_gpu, Words(), *block, s)
    assert count_flips(wanted, rows) <= flips
    assert logprob_error(model, block[0], rows).abs().max() < 1e-4


def test_runs_are_the_same_bytes():
    """Guards a race or memory that nobody wrote, in a decoder with graphs and in a new one."""
    s, on_gpu, memory = replace(PAPER, rows=150), loud_model().cuda(), {}
    (block,) = blocks_of(1)
    first = sample_block(on_gpu, Words(), *block, s, memory=memory)
    for again in (memory, None):
        assert sample_block(on_gpu, Words(), *block, s, memory=again) == first


@pytest.mark.parametrize("bf16, accumulate", [(False, 1), (False, 2), (True, 1)])
def test_training_steps_equal_the_cpu(bf16, accumulate, monkeypatch):
    """Guards graphs that keep a gradient or a number from a step before, or give padding a loss."""
    batches = [random_examples(), random_examples(((9, 4), (40, 30)), 1), random_examples(seed=2)]
    losses = []
    for device, most in (("cpu", 0), ("cuda", 0), ("cuda", graph.MOST)):
        monkeypatch.setattr(graph, "MOST", most)
        model = random_model().to(device)
        step = partial(finetune.train_step, model, finetune.make_optimizer(model, 1e-3))
        losses.append([step(batches[i % 3], i, accumulate, bf16) for i in range(15)])
    cpu, plain, graphs = losses
    n, error = len(graph.KNOWN[model][1]), max(abs(a - b) for a, b in zip(cpu, graphs))
    same = sum(a == b for a, b in zip(plain, graphs))
    print(f"\nbf16={bf16}: loss {cpu[0]:.3f} .. {cpu[-1]:.3f}, {n} graphs, {same} of 15 losses are "
          f"those without graphs, largest difference from the CPU {error:.1e}")  # fmt: skip
    assert error < (5e-2 if bf16 else 1e-4) and graphs[-1] < graphs[0]
    assert max(abs(a - b) for a, b in zip(plain, graphs)) < 1e-5 and 2 <= n <= 4
    model.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(SertError, match="loss nan"):
        step(batches[0], 15, accumulate, bf16)
