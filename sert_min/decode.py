"""Decoding many rows together: what stands on the device, and what one step does to it.

A block's prompts run through the model once (`prefill`); then a `Decoder` takes one token per live
row and step. A row attends to its prompt's shared keys (25 rows read one copy) and to its own, in one
softmax. When a row ends, the next one that waits takes its place. Whether a rule ends a row early is
decided in generate.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from sert_min.gpt2 import GPT2, causal_attention
from sert_min.kernels import bf16_pieces, check, head_sample_and_score, shared_attention
from sert_min.kernels.attention import CHUNK, Keys
from sert_min.kernels.fast import cpu
from sert_min.kernels.fast.graph import capture


@dataclass
class Prompts:
    """What prefill leaves of Q prompts: keys and values [L, Q, K, P, D], shared by their rows."""

    keys: Tensor
    values: Tensor
    lengths: Tensor  # [Q]; what lies behind them is padding
    hidden: Tensor  # [Q, C] at each prompt's last token


def prefill(model: GPT2, prompts: list[list[int]]) -> Prompts:
    """Run each prompt once. Padding stands on the right, where causal attention never looks. On a
    GPU the width is a multiple of 64, so that most blocks have one shape."""
    c, device = model.config, model.wte.weight.device
    P = max(map(len, prompts))
    if device.type == "cuda":
        P = min(-(-P // 64) * 64, c.n_positions)
    ids = torch.tensor([p + [0] * (P - len(p)) for p in prompts])  # [Q, P]
    lengths = torch.tensor([len(p) for p in prompts])
    padding = (torch.arange(P) >= lengths[:, None]).to(device)[..., None, None]  # [Q, P, 1, 1]
    size = (c.n_layer, len(prompts), c.n_kv_head, P, c.head_dim)
    dtype = model.h[0].attn.c_attn.weight.dtype
    if device.type == "cpu" and not cpu.has_bf16():
        dtype = torch.float32  # bf16 numbers, kept so that nothing has to be converted
    keys = torch.empty(size, dtype=dtype, device=device)
    values = torch.empty_like(keys)

    def attend(layer, q, k, v):  # [Q, P, H, D], k and v [Q, P, K, D]
        q, k, v = (x.to(dtype) for x in (q, k, v))
        k, v = (x.masked_fill(padding, 0) for x in (k, v))  # no NaN that a weight of 0 would spread
        keys[layer], values[layer] = k.transpose(1, 2), v.transpose(1, 2)
        return causal_attention(layer, q, k, v)

    hidden = model(ids.to(device), attend=attend)  # [Q, P, C]
    last = hidden[torch.arange(len(prompts)), lengths - 1]  # [Q, C]
    return Prompts(keys, values, lengths.to(device), last)


def own_memory(prompts: Prompts, n_slots: int, cap: int) -> tuple[Tensor, Tensor]:
    """Own keys and values of n_slots rows, each [L, chunks, n_slots, K, CHUNK, D], finite; on a CPU
    the keys lie in memory as kernels/fast/cpu.py wants them."""
    L, _, K, _, D = prompts.keys.shape
    size = (L, -(-cap // CHUNK), n_slots, K)
    values = prompts.keys.new_zeros(*size, CHUNK, D)
    on_cpu = values.device.type == "cpu"
    return (values.new_zeros(*size, D, CHUNK).mT if on_cpu else torch.zeros_like(values)), values


class Decoder:
    """The live rows of a block with their own keys and values. All of it stands on the device, in
    buffers that stay where they are, so `step` needs no host and can be a CUDA graph.

    The block has R = Q J rows, J of each prompt in order; a row takes at most `cap` tokens. Slot i
    of n holds row `row[i]` (R: no row), of which t[i] tokens are known and ids[i] is the last. The
    own key of token t stands in keys[layer, t // CHUNK, slot, :, t % CHUNK] (`own_memory`). What
    lies behind a row's tokens is stale, but finite, and masked away."""

    def __init__(self, model: GPT2, prompts: Prompts, own: tuple[Tensor, Tensor], s, tokenizer):
        device, J = prompts.lengths.device, s.branches * s.samples
        self.model, self.prompts, self.J, self.cap = model, prompts, J, s.max_new_tokens
        self.ends = torch.tensor([*tokenizer.ends], dtype=torch.long, device=device)
        self.keys, self.values = own
        R, N = self.R, self.n_slots = len(prompts.lengths) * J, self.keys.shape[2]
        self.draw = make_draw(model, prompts, s, tokenizer.n_vocab, N)
        self.gpu = on_gpu(prompts.lengths)
        self.eager = not self.gpu or bool(check.problem(device))  # the definitions ask the host
        # By row of the block, and for "no row":
        self.stream, self.first = torch.zeros(2, R + 1, dtype=torch.long, device=device).unbind()
        self.stopped = torch.zeros(R + 1, dtype=torch.bool, device=device)  # ended by the host
        self.order = torch.full((R + 1,), R, device=device)  # rows that wait, in order
        # By slot:
        self.row, self.t, self.ids = torch.zeros(3, N, dtype=torch.long, device=device).unbind()
        self.ended = torch.zeros(N, dtype=torch.bool, device=device)
        self.taken = torch.zeros(1, dtype=torch.long, device=device)  # of those that wait
        self.state = [self.row, self.t, self.ids, self.ended, self.taken]
        self.graphs: dict[tuple[int, int], Callable] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.row.is_cuda else None  # of all graphs

    def begin(self, prompts: Prompts, streams: list[int], first: list[int], waiting: list[int]):
        """Begin a block: its prompts, its rows' random streams and first tokens, and the rows that
        are to be decoded, in order."""
        if prompts is not self.prompts:
            for x in ("keys", "values", "lengths"):
                getattr(self.prompts, x).copy_(getattr(prompts, x))
        self.stream[:-1] = torch.tensor(streams)
        self.first[:-1] = torch.tensor(first)
        self.order.fill_(self.R)[: len(waiting)] = torch.tensor(waiting)
        self.stopped.zero_()[-1] = True  # "no row" always looks for a row
        self.row.fill_(self.R)
        self.taken.zero_()
        self.n, self.steps = min(self.n_slots, len(waiting)), 0

    def refill(self) -> None:
        """Give the slots whose row has ended to the rows that wait; without any, to no row."""
        n = self.n
        row, t, ids, ended = self.row[:n], self.t[:n], self.ids[:n], self.ended[:n]
        free = ended | self.stopped[row]
        turn = self.taken + free.cumsum(0) - 1  # [n]: which of the waiting rows, if free
        new = self.order[turn.clamp(0, self.R)]
        row.copy_(torch.where(free, new, row))
        t.masked_fill_(free, 1)
        ids.copy_(torch.where(free, self.first[row], ids))
        self.taken.add_(free.sum()).clamp_(max=self.R)
        ended.zero_()

    def stop(self, rows: list[int]) -> None:
        """The host has ended these rows of the block."""
        if rows:
            at = torch.tensor(rows, pin_memory=self.row.is_cuda)  # so nothing waits
            self.stopped.index_fill_(0, at.to(self.row.device, non_blocking=True), True)

    def shrink_to(self, left: int) -> None:
        """Go on with fewer slots if at most `left` rows have not ended: on a CPU as many as rows, on
        a GPU, where each size is a graph, in halves. Rows of the slots behind move to the front."""
        n = min(self.n, left)
        if self.gpu:
            n = self.n
            while left <= n // 2 and n >= 128:
                n //= 2
        if n == self.n:
            return
        self.refill()
        movers = (self.row[n : self.n] != self.R).nonzero()[:, 0] + n
        holes = (self.row[:n] == self.R).nonzero()[: len(movers), 0]
        for x in (*self.keys.flatten(0, 1), *self.values.flatten(0, 1), self.row, self.t, self.ids):
            x[holes] = x[movers]
        self.n = n

    def look(self, steps: int) -> Callable[[], Iterator[tuple[int, list[int], list[float]]]]:
        """Take some steps. The function that is returned waits for them, then yields what each row
        drew: row, tokens, log-probs."""
        drawn = torch.empty(2, self.n, steps, dtype=torch.long, device=self.row.device)
        scores = torch.empty(self.n, steps, device=self.row.device)
        for i in range(steps):
            drawn[0, :, i], drawn[1, :, i], scores[:, i] = self.step()
        if self.gpu:
            drawn, scores = (x.to("cpu", non_blocking=True) for x in (drawn, scores))  # pinned
            done = torch.cuda.Event()
            done.record()

        def read():
            if self.gpu:
                done.synchronize()
            for who, tokens, logprobs in zip(*drawn.tolist(), rounded(scores).tolist()):
                for row, group in groupby(range(steps), who.__getitem__):  # a slot changes its row
                    at = list(group)
                    if row < self.R:
                        yield row, tokens[at[0] : at[-1] + 1], logprobs[at[0] : at[-1] + 1]

        return read

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Refill, feed each slot's last token and draw its next one: rows, tokens, log-probs [n]."""
        self.steps += 1
        if self.eager:
            return self.run()
        chunks = min(-(-self.steps // CHUNK), self.keys.shape[1])  # no row is older than the block
        if (self.n, chunks) not in self.graphs:
            self.graphs[self.n, chunks] = capture(lambda: self.run(chunks), self.state, self.pool)
        return self.graphs[self.n, chunks]()

    def run(self, chunks: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A step. With `chunks`, its shapes and addresses depend on n and chunks alone; without, it
        takes the questions and chunks that have live rows."""
        self.refill()
        n, J = self.n, self.J
        row, t = self.row[:n], self.t[:n]
        first, last = 0, self.R // J
        if chunks is None:
            chunks = -(-int(t.max()) // CHUNK)
            first, last = (int(x) // J for x in row.clamp(max=self.R - 1).aminmax())
            last += 1
        place = (row - first * J).clamp(max=(last - first) * J)
        lengths = self.prompts.lengths[first:last]
        positions = self.prompts.lengths[(row // J).clamp(max=self.R // J - 1)] + t - 1
        slots, chunk, at = torch.arange(n, device=t.device), (t - 1) // CHUNK, (t - 1) % CHUNK

        def attend(layer, q, k, v):  # [n, H, D], [n, K, D]
            q, k, v = (x.to(self.keys.dtype) for x in (q, k, v))
            self.keys[layer][chunk, slots, :, at] = k
            self.values[layer][chunk, slots, :, at] = v
            own_k, own_v = (x[layer, :chunks, :n] for x in (self.keys, self.values))
            shared_k, shared_v = self.prompts.keys[layer], self.prompts.values[layer]
            keys = Keys(shared_k[first:last], shared_v[first:last], lengths, own_k, own_v)
            return shared_attention(q, keys, t, place, J)

        hidden = self.model(self.ids[:n], positions, attend)  # [n, C]
        tokens, logprobs = self.draw(hidden, self.stream[row], t)
        self.ended[:n] = (tokens[:, None] == self.ends).any(1) | (t + 1 >= self.cap)
        self.ids[:n] = tokens.clamp(min=0)  # -1: the logits were NaN; the host will see it
        drawn = row.clone(), tokens, logprobs
        t += 1
        return drawn


# --- how tokens are drawn, and what goes from block to block --------------------------------------


def make_draw(model: GPT2, prompts: Prompts, s, n_vocab: int, n_rows: int) -> Callable:
    """`draw(hidden [n, C], streams [n], position [n])` -> tokens and log-probs [n]: the head and the
    draw. A model in bf16 has its head read in bf16 too, without its errors (kernels/)."""
    n_vocab = min(n_vocab, model.config.vocab_size)
    weight = model.head_weight[:n_vocab]  # fp32 [V, C]
    bf16, kind = prompts.keys.dtype is torch.bfloat16, weight.device.type
    in_pieces = bf16 and kind == "cuda"
    if in_pieces:
        weight = F.pad(bf16_pieces(weight, weight=True), (0, 0, 0, -n_vocab % 64))  # rows
    elif bf16 and kind == "cpu":
        weight = cpu.prepare(weight, prompts.hidden, n_rows)
    given = {name: getattr(s, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given["n_vocab"] = n_vocab

    def draw(hidden: Tensor, streams: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        hidden = bf16_pieces(hidden, weight=False) if in_pieces else hidden
        return head_sample_and_score(hidden, weight, streams=streams, position=position, **given)

    return draw


def find_decoder(memory: dict, model: GPT2, prompts: Prompts, s, tokenizer) -> Decoder:
    """A decoder for a block. On a GPU it is the last block's, with its graphs, if that fits; on a CPU
    a new one with the last one's memory for own keys and values, because new memory is slow."""
    L, Q, K, P, D = prompts.keys.shape
    n_slots, gpu = min(s.rows, Q * s.branches * s.samples), on_gpu(prompts.keys)
    key = (prompts.keys.dtype, L, K, D, n_slots, s.max_new_tokens)
    if gpu:  # a decoder holds its model, so that nothing else gets its id
        key += (id(model), s, Q, P)
    if key not in memory:
        memory.clear()  # before the new one is allocated
        own = own_memory(prompts, n_slots, s.max_new_tokens)
        memory[key] = Decoder(model, prompts, own, s, tokenizer) if gpu else own
    return memory[key] if gpu else Decoder(model, prompts, memory[key], s, tokenizer)


def fitting_rows(device: torch.device, model: GPT2, new: int, block: int, paths: int) -> tuple:
    """(rows, questions of a block) for half of a GPU's free memory: rows are a multiple of 25 and at
    most 2,000, for `new` tokens each; a block has at least `block` questions of `paths` paths, and
    four times as many paths as rows, so that few slots are empty at a block's end."""
    c = model.config
    own = 2 * c.n_layer * c.n_kv_head * c.head_dim * (new + 32)  # numbers of keys and values
    logits = 3 * c.vocab_size
    free = torch.cuda.mem_get_info(device)[0] - 2 * 4 * model.n_params()
    rows = min(2000, max(25, int(free / 2 / (4 * (own + logits))) // 25 * 25))  # fp32 at most
    return rows, max(block, 4 * rows // paths)


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def rounded(logprobs: Tensor) -> Tensor:
    """To the 5 decimals that records have, fp64."""
    return logprobs.cpu().double().round(decimals=5)
