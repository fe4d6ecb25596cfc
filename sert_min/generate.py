"""Decoding many rows together: what stands on the device, and what one step does to it.

A block's prompts run through the model once (`prefill`); then a `Decoder` takes one token per live row
and step. A row attends to its prompt's shared keys (25 rows read one copy) and to its own; both meet
in one softmax. A row that ended makes room for the next one that waits. What is drawn, and what ends
a row early, is not known here: that is generate.py.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import bf16_pieces, cpu, head_sample_and_score, shared_attention
from kernels.attention import CHUNK
from kernels.graph import capture
from kernels.reference import best_first
from sert_min.gpt2 import GPT2, causal_attention, first_broken
from sert_min.io.errors import SertError


@dataclass
class Prompts:
    """What prefill leaves of Q prompts: keys and values [L, Q, H, P, D], shared by their rows."""

    keys: Tensor
    values: Tensor
    lengths: Tensor  # [Q]; what lies behind them is padding
    hidden: Tensor  # [Q, C] at each prompt's last token


def prefill(model: GPT2, prompts: list[list[int]]) -> Prompts:
    """Run each prompt once. Padding stands on the right, where causal attention never looks; on a
    GPU to a multiple of 64, so that most blocks have one shape."""
    c, device = model.config, model.wte.weight.device
    P = max(map(len, prompts))
    if device.type == "cuda":
        P = min(-(-P // 64) * 64, c.n_positions)
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, : len(p)] = torch.tensor(p)
    lengths = torch.tensor([len(p) for p in prompts])
    padding = (torch.arange(P) >= lengths[:, None]).to(device)[..., None, None]  # [Q, P, 1, 1]
    size = (c.n_layer, len(prompts), c.n_head, P, c.n_embd // c.n_head)
    dtype = model.h[0].attn.c_attn.weight.dtype
    if device.type == "cpu" and not cpu.has_bf16():
        dtype = torch.float32  # bf16 numbers, kept so that nothing has to be converted
    keys = torch.empty(size, dtype=dtype, device=device)
    values = torch.empty_like(keys)

    def attend(layer, q, k, v):  # [Q, P, H, D]
        q, k, v = (x.to(dtype) for x in (q, k, v))
        k, v = (x.masked_fill(padding, 0) for x in (k, v))  # no NaN that a weight of 0 would spread
        keys[layer], values[layer] = k.transpose(1, 2), v.transpose(1, 2)
        return causal_attention(layer, q, k, v)

    hidden = model(ids.to(device), attend=attend)  # [Q, P, C]
    last = hidden[torch.arange(len(prompts)), lengths - 1]  # [Q, C]
    return Prompts(keys, values, lengths.to(device), last)


def own_memory(prompts: Prompts, n_slots: int, cap: int) -> tuple[Tensor, Tensor]:
    """Own keys and values of n_slots rows, each [L, chunks, n_slots, H, CHUNK, D], finite; on a CPU
    the keys lie in memory as kernels/cpu.py wants them."""
    L, _, H, _, D = prompts.keys.shape
    size = (L, -(-cap // CHUNK), n_slots, H)
    values = prompts.keys.new_zeros(*size, CHUNK, D)
    on_cpu = values.device.type == "cpu"
    return (values.new_zeros(*size, D, CHUNK).mT if on_cpu else torch.zeros_like(values)), values


class Decoder:
    """The live rows of a block with their own keys and values: all of it stands on the device, in
    buffers that stay where they are, so that `step` needs no host and can be a CUDA graph.

    The block has R = Q J rows, J of each prompt in order; a row takes at most `cap` tokens. Slot i
    of n holds row `row[i]` (R: no row), of which t[i] tokens are known and ids[i] is the last. The
    own key of token t stands in keys[layer, t // CHUNK, slot, :, t % CHUNK] (`own_memory`); what
    lies behind a row's tokens is stale, but finite, and masked away.
    `draw(hidden [n, C], streams [n], t [n])` gives tokens and log-probs [n]."""

    def __init__(
        self,
        model: GPT2,
        prompts: Prompts,
        own: tuple[Tensor, Tensor],
        draw: Callable,
        J: int,
        cap: int,
        eot: int,
    ):
        device = prompts.lengths.device
        self.model, self.prompts, self.draw = model, prompts, draw
        self.J, self.cap, self.eot = J, cap, eot
        self.keys, self.values = own
        R, N = self.R, self.n_slots = len(prompts.lengths) * J, self.keys.shape[2]
        self.gpu = on_gpu(prompts.lengths)
        # By row of the block, and for "no row":
        self.stream, self.first = (torch.zeros(2, R + 1, dtype=torch.long, device=device)).unbind()
        self.stopped = torch.zeros(R + 1, dtype=torch.bool, device=device)  # ended by the host
        self.order = torch.full((R + 1,), R, device=device)  # rows that wait, in order
        # By slot:
        self.row, self.t, self.ids = torch.zeros(3, N, dtype=torch.long, device=device).unbind()
        self.ended = torch.zeros(N, dtype=torch.bool, device=device)
        self.taken = torch.zeros(1, dtype=torch.long, device=device)  # of those that wait
        self.state = [self.row, self.t, self.ids, self.ended, self.taken]
        self.graphs: dict[tuple[int, int], Callable] = {}

    def load(
        self, prompts: Prompts, streams: list[int], first: list[int], waiting: list[int]
    ) -> None:
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
            self.stopped[torch.tensor(rows).to(self.row.device, non_blocking=True)] = True

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
        holes = (self.row[:n] == self.R).nonzero()[:, 0]
        movers = (self.row[n : self.n] != self.R).nonzero()[:, 0] + n
        holes = holes[: len(movers)]
        for x in (*self.keys.flatten(0, 1), *self.values.flatten(0, 1), self.row, self.t, self.ids):
            x[holes] = x[movers]
        self.n = n

    def look(self, steps: int) -> Callable[[], Iterator[tuple[int, list[int], list[float]]]]:
        """Go some steps. Returns a function that waits for them, and then gives what rows drew: row,
        tokens, log-probs."""
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
                start = 0
                for i in range(1, steps + 1):  # a slot may have passed to another row
                    if i == steps or who[i] != who[start]:
                        if who[start] < self.R:
                            yield who[start], tokens[start:i], logprobs[start:i]
                        start = i

        return read

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Refill, feed each slot's last token and draw its next one: rows, tokens, log-probs [n]."""
        self.steps += 1
        if not self.gpu:
            return self.run()
        chunks = min(-(-self.steps // CHUNK), self.keys.shape[1])  # no row is older than the block
        if (self.n, chunks) not in self.graphs:
            self.graphs[self.n, chunks] = capture(lambda: self.run(chunks), self.state)
        return self.graphs[self.n, chunks]()

    def run(self, chunks: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A step. With `chunks`, its shapes and addresses depend on nothing but n and chunks; without,
        it takes those questions and chunks that have live rows."""
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
        places = self.prompts.lengths[(row // J).clamp(max=self.R // J - 1)] + t - 1  # in the text
        slots, chunk, at = torch.arange(n, device=t.device), (t - 1) // CHUNK, (t - 1) % CHUNK

        def attend(layer, q, k, v):  # [n, H, D]
            q, k, v = (x.to(self.keys.dtype) for x in (q, k, v))
            self.keys[layer][chunk, slots, :, at] = k
            self.values[layer][chunk, slots, :, at] = v
            own_k, own_v = (x[layer, :chunks, :n] for x in (self.keys, self.values))
            prompt_k, prompt_v = (
                x[layer, first:last] for x in (self.prompts.keys, self.prompts.values)
            )
            keys = (prompt_k, prompt_v, lengths, own_k, own_v)
            return shared_attention(q, *keys, t, place, J)

        hidden = self.model(self.ids[:n], places, attend)  # [n, C]
        tokens, logprobs = self.draw(hidden, self.stream[row], t)
        self.ended[:n] = (tokens == self.eot) | (t + 1 >= self.cap)
        self.ids[:n] = tokens.clamp(min=0)  # -1: the logits were NaN; the host will see it
        drawn = row.clone(), tokens, logprobs
        t += 1
        return drawn


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def rounded(logprobs: Tensor) -> Tensor:
    """To the 5 decimals that records have, fp64."""
    return logprobs.cpu().double().round(decimals=5)


@dataclass(frozen=True)
class SampleSettings:
    """How paths are drawn [SERT §III-A]; the paper's values are the defaults."""

    branches: int = 5
    samples: int = 5
    top_k: int = 10
    top_p: float = 0.95
    temperature: float = 1.0
    max_new_tokens: int = 128
    raw: bool = False  # branches * samples plain samples, no branching (Fig. 1's baseline)
    seed: int = 0
    rows: int = 200  # live rows

    def check(self) -> "SampleSettings":
        """Refuse values that mean nothing, naming the flag."""
        for name in ("branches", "samples", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise SertError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 <= self.temperature <= 1e30:
            raise SertError("--temperature must be from 0 (greedy) to 1e30")
        if not 0 < self.top_p <= 1:
            raise SertError("--top-p must be above 0 and at most 1 (1 switches it off)")
        if not 0 <= self.top_k <= 2**31:
            raise SertError("--top-k must be from 0 (off) to 2^31")
        if not 0 <= self.seed < 2**63:
            raise SertError("--seed must be from 0 to 2^63 - 1")
        return self


GREEDY = SampleSettings(branches=1, samples=1, temperature=0.0, raw=True)


@dataclass
class Row:
    """One continuation. token_ids starts with the branch token (unless raw) and leaves the closing
    end-of-text out; logprobs are at temperature 1 over the full vocabulary, 5 decimals."""

    question: int  # index in the block
    branch: int  # 0-based; -1 for raw samples
    sample: int
    stream: int  # random stream of `sample_and_score`
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    path_start: int = 0  # 1 behind a branch token that is end-of-text
    finish: str = ""  # eos | length | rejected


def stream_of(name: str, branch: int, sample: int) -> int:
    """Random stream of a path: first 8 bytes of sha256("task/id/branch/sample"), signed."""
    digest = hashlib.sha256(f"{name}/{branch}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_lengths(prompts: list[list[int]], names: list[str], model: GPT2, new: int) -> None:
    """Every prompt with its new tokens must fit into the model's context and vocabulary."""
    context, vocab = model.config.n_positions, model.config.vocab_size
    for ids, name in zip(prompts, names):
        if not ids:
            raise SertError(f"{name} is empty; give it some text")
        if max(ids) >= vocab:
            raise SertError(
                f"{name} has token id {max(ids)}, the model only {vocab} ids: weights and "
                "tokenizer do not belong together; use the files of one model"
            )
        if len(ids) + new > context:
            raise SertError(
                f"{name} has {len(ids)} tokens; with --max-new-tokens {new} that exceeds the "
                f"context of {context}; lower --max-new-tokens"
            )


def first_rows(logits: Tensor, names: list[str], s: SampleSettings, eot: int) -> list[Row]:
    """All rows of a block in order, each with its first token if that is a branch [SERT §II-A-1];
    logits [Q, V] at the prompts' ends."""
    rows = []
    if s.raw:
        for q, name in enumerate(names):
            for i in range(s.branches * s.samples):
                rows.append(Row(q, -1, i, stream_of(name, -1, i)))
        return rows
    if s.branches > logits.shape[1]:
        raise SertError(f"--branches {s.branches} is more than the vocabulary holds; lower it")
    top, ids = best_first(logits, s.branches)  # [Q, K], ties by lowest id
    logprobs = top - logits.logsumexp(-1, keepdim=True)
    for q, name in enumerate(names):
        for b, (token, lp) in enumerate(zip(ids[q].tolist(), logprobs[q].tolist())):
            for i in range(s.samples):
                row = Row(q, b, i, stream_of(name, b, i), [token], [round(lp, 5)])
                row.path_start = int(token == eot)
                rows.append(row)
    return rows


def make_draw(
    model: GPT2, shared: Prompts, s: SampleSettings, n_vocab: int, n_rows: int
) -> Callable:
    """`draw(hidden [n, C], streams [n], position [n])` -> tokens and log-probs [n]: the head and the
    draw. A model in bf16 has its head read in bf16 too, without its errors (kernels/)."""
    weight = model.head_weight[:n_vocab]  # fp32 [V, C]
    bf16, kind = shared.keys.dtype is torch.bfloat16, weight.device.type
    in_pieces = bf16 and kind == "cuda"
    if in_pieces:
        weight = bf16_pieces(weight, weight=True)
    elif bf16 and kind == "cpu":
        weight = cpu.prepare(weight, shared.hidden, n_rows)
    given = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "seed": s.seed}

    def draw(hidden: Tensor, streams: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        hidden = bf16_pieces(hidden, weight=False) if in_pieces else hidden
        return head_sample_and_score(hidden, weight, streams=streams, position=position, **given)

    return draw


def find_decoder(kept: dict, model: GPT2, shared: Prompts, s: SampleSettings, tokenizer) -> Decoder:
    """A decoder for a block. On a GPU, the last block's if it fits, with its graphs; on a CPU, a new
    one with the last one's memory for own keys and values, as new memory is slow."""
    Q, J, gpu = len(shared.lengths), s.branches * s.samples, on_gpu(shared.keys)
    n_slots, n_vocab = min(s.rows, Q * J), min(tokenizer.n_vocab, model.config.vocab_size)

    def make(own: tuple[Tensor, Tensor]) -> Decoder:
        draw = make_draw(model, shared, s, n_vocab, n_slots)
        return Decoder(model, shared, own, draw, J, s.max_new_tokens, tokenizer.eot)

    L, _, H, P, D = shared.keys.shape
    key = (shared.keys.dtype, L, H, D, n_slots, s.max_new_tokens)
    if gpu:  # a decoder holds its model, so that nothing else gets its id
        key += (id(model), s, Q, P)
    if key not in kept:
        kept.clear()  # its memory first
        own = own_memory(shared, n_slots, s.max_new_tokens)
        kept[key] = make(own) if gpu else own
    return kept[key] if gpu else make(kept[key])


def draw_first_tokens(live: Decoder, shared: Prompts, rows: list[Row], ends: "Ends") -> None:
    """Plain samples begin with a draw at their prompt's end."""
    for i in range(0, len(rows), live.n_slots):
        some = rows[i : i + live.n_slots]
        streams = torch.tensor([row.stream for row in some], device=shared.lengths.device)
        hidden = shared.hidden[[row.question for row in some]]
        drawn = live.draw(hidden, streams, torch.zeros_like(streams))
        for row, token, lp in zip(some, drawn[0].tolist(), rounded(drawn[1]).tolist()):
            ends.extend(row, [token], [lp])


@dataclass
class Ends:
    """What ends a row: end-of-text, the cap, or `reject`, which stays true for all that is longer."""

    s: SampleSettings
    eot: int
    reject: Callable[[Row], bool] | None
    broken: Callable[[int, list[int]], SertError]  # what to raise about a question's row

    def extend(self, row: Row, tokens: list[int], logprobs: list[float]) -> int:
        """Append drawn tokens to a row until it ends; how many it took, with an end-of-text."""
        known = len(row.token_ids)
        n = tokens.index(self.eot) if self.eot in tokens else len(tokens)
        n = 0 if row.finish else min(n, self.s.max_new_tokens - known)
        if -1 in tokens[:n]:
            raise self.broken(row.question, row.token_ids + tokens[: tokens.index(-1)])
        if row.finish:
            return 0
        row.token_ids += tokens[:n]
        row.logprobs += logprobs[:n]
        self.judge(row, known)
        if not row.finish and n < len(tokens):
            row.finish = "eos"
            return n + 1
        return len(row.token_ids) - known

    def judge(self, row: Row, known: int = 0) -> None:
        """Has a row ended, of which the first `known` tokens were judged before? A rejected row ends
        with the token that broke it."""
        if self.reject and len(row.token_ids) > known and self.reject(row):
            row.finish = "rejected"
            while len(row.token_ids) > known + 1:
                last = row.token_ids.pop()
                if not self.reject(row):
                    row.token_ids.append(last)
                    break
            del row.logprobs[len(row.token_ids) :]
        elif len(row.token_ids) >= self.s.max_new_tokens:
            row.finish = "length"


@torch.inference_mode()
def sample_block(
    model: GPT2,
    tokenizer,
    prompts: list[list[int]],
    names: list[str],
    s: SampleSettings,
    reject: Callable[[Row], bool] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    kept: dict | None = None,
    look: int | None = None,
    ahead: int | None = None,
) -> list[Row]:
    """All continuations of a block of prompts, in the order (question, branch, sample).

    `names` are "task/id", the root of each row's random stream; `reject(row)` may stop a row early
    (finish "rejected") and must stay true for every longer row; `progress(n)` is told of n new
    tokens. With s = GREEDY: one greedy continuation per prompt. `kept` is a dict that holds memory
    (on a GPU also buffers and graphs) from one block of a run to the next.

    The host looks at the tokens every `look` steps and lets the device go on for `ahead` looks in
    the meantime: 1 and 0 on a CPU, 8 and 1 on a GPU, which so never waits. What a row drew behind
    its end is dropped."""
    check_lengths(prompts, names, model, s.max_new_tokens)
    kept = {} if kept is None else kept
    shared = prefill(model, prompts)
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
    logits = model.logits(shared.hidden)[:, :n_vocab]  # [Q, V]

    def broken(question: int, ids: list[int]) -> SertError:
        kept.clear()  # a NaN in it would spoil the next block
        return SertError(
            f"{names[question]}: the model's logits are NaN or infinite "
            f"({first_broken(model, prompts[question] + ids)}); check its weights, or use "
            "--dtype fp32"
        )

    for question in (~logits.logsumexp(-1).isfinite()).nonzero().flatten().tolist():
        raise broken(question, [])
    rows = first_rows(logits, names, s, tokenizer.eot)
    live = find_decoder(kept, model, shared, s, tokenizer)
    ends = Ends(s, tokenizer.eot, reject, broken)
    if s.raw:
        draw_first_tokens(live, shared, rows, ends)
    else:  # the branch tokens
        for row in rows:
            ends.judge(row)
    waiting = [i for i, row in enumerate(rows) if not row.finish]
    first = [(row.token_ids or [0])[0] for row in rows]
    live.load(shared, [row.stream for row in rows], first, waiting)

    gpu = on_gpu(shared.lengths)
    look, ahead = look or (8 if gpu else 1), int(gpu) if ahead is None else ahead
    left, looks = len(waiting), deque()
    while left:
        live.shrink_to(left)
        looks.append(live.look(look))
        if len(looks) <= ahead:
            continue
        taken, ended = 0, []
        for i, tokens, logprobs in looks.popleft()():
            before = rows[i].finish
            taken += ends.extend(rows[i], tokens, logprobs)
            if rows[i].finish and not before:
                ended.append(i)
        live.stop([i for i in ended if rows[i].finish == "rejected"])
        left -= len(ended)
        progress(taken)
    return rows
