"""Stage 1a: many continuations of each question, decoded together [SERT §II-A-1].

A *block* is a fixed number of consecutive questions; all that follows happens inside one block.
    1. Prefill: each prompt runs through the model once; its keys and values are kept once.
    2. Branch: the five most probable first tokens start five branches of five rows each.
    3. Decode: up to `rows` rows at a time take one token per step. A row attends to its prompt's
       shared keys (25 rows read one copy) and to its own; both meet in one softmax.
    4. Retire: a row that ended makes room for the block's next one.
Sums in floating point change in the last bits with the number of rows, so the same block always
runs the same way, whatever ran before it: that makes a run the same bytes after any restart.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import bf16_pieces, cpu, head_sample_and_score
from kernels.reference import best_first
from sert_min.gpt2 import GPT2, causal_attention, first_broken
from sert_min.runtime import SertError

CHUNK = 32  # own tokens of a row in one piece of the decoder's buffers


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


@dataclass
class Prompts:
    """What prefill leaves of Q prompts: per layer keys and values [Q, H, P, D], shared by rows."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor  # [Q]
    mask: Tensor  # [Q, P] 0 at a prompt's tokens, -inf at padding
    hidden: Tensor  # [Q, C] at each prompt's last token


def prefill(model: GPT2, prompts: list[list[int]]) -> Prompts:
    """Run each prompt once. Padding stands on the right, where causal attention never looks."""
    device = model.wte.weight.device
    P = max(map(len, prompts))
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, : len(p)] = torch.tensor(p)
    lengths = torch.tensor([len(p) for p in prompts])
    keys, values = [], []

    def attend(layer, q, k, v):  # [Q, P, H, D]
        keys.append(k.transpose(1, 2).contiguous())
        values.append(v.transpose(1, 2).contiguous())
        return causal_attention(layer, q, k, v)

    hidden = model(ids.to(device), attend=attend)  # [Q, P, C]
    last = hidden[torch.arange(len(prompts)), lengths - 1]  # [Q, C]
    mask = torch.where(torch.arange(P) < lengths[:, None], 0.0, float("-inf"))
    return Prompts(keys, values, lengths.to(device), mask.to(device), last)


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


class Decoder:
    """The live rows of a block and their own keys and values, in static buffers.

    Slots 0..n-1 are live; `rows[slot]` is the Row there. The own key of a row's token t stands in
    keys[layer, t // CHUNK, slot, :, t % CHUNK]: products of a chunk, which is contiguous, are up to
    three times as fast as those of a slice of one long buffer. `chunks` of them are in use.
    After any change of `rows`, `group` makes the index tensors that `step` needs."""

    def __init__(self, model: GPT2, prompts: Prompts, draw, n_rows: int, max_tokens: int):
        c = model.config
        self.draw, self.max_tokens = draw, max_tokens
        size = (n_rows, c.n_head, CHUNK, c.n_embd // c.n_head)
        self.model, self.prompts, self.device = model, prompts, prompts.lengths.device
        self.keys = prompts.keys[0].new_empty(c.n_layer, -(-max_tokens // CHUNK), *size)
        self.values = torch.empty_like(self.keys)
        self.chunks = 0
        self.rows: list[Row] = []

    def place(self, slot: int, row: Row) -> None:
        """Put a fresh row into a slot; stale keys behind its length are masked away."""
        self.rows[slot : slot + 1] = [row]

    def remove(self, slot: int) -> None:
        """Drop a row; the last live row moves into its slot, so that live rows stay together."""
        last = len(self.rows) - 1
        if slot != last:
            for x in (self.keys, self.values):
                x[:, : self.chunks, slot] = x[:, : self.chunks, last]
            self.rows[slot] = self.rows[last]
        self.rows.pop()

    def reach(self, tokens: int) -> None:
        """Take as many chunks into use as this number of own tokens needs."""
        while self.chunks * CHUNK < tokens:
            for x in (self.keys, self.values):
                x[:, self.chunks] = 0  # what is masked must still be a number
            self.chunks += 1

    def group(self) -> None:
        """Index tensors that bring rows of one question together for its shared prompt: rows lie
        in any order, so each question of the live window gets a table of its J slots at most."""
        of = [row.question for row in self.rows]
        self.first, G = min(of), max(of) - min(of) + 1
        tables: list[list[int]] = [[] for _ in range(G)]
        for slot, q in enumerate(of):
            tables[q - self.first].append(slot)
        J = max(map(len, tables))
        flat = [0] * len(of)
        for g, table in enumerate(tables):
            for j, slot in enumerate(table):
                flat[slot] = g * J + j
        padded = [table + [0] * (J - len(table)) for table in tables]
        self.slots = torch.tensor(padded, device=self.device)  # [G, J]
        self.flat = torch.tensor(flat, device=self.device)  # [n] -> place in G * J
        self.of = torch.tensor(of, device=self.device)  # [n]
        self.streams = torch.tensor([row.stream for row in self.rows], device=self.device)
        self.prompt_mask = self.prompts.mask[self.of][:, None]  # [n, 1, P]
        self.ids = torch.tensor([row.token_ids[-1] for row in self.rows], device=self.device)
        lengths = [len(row.token_ids) for row in self.rows]
        self.t, self.longest = torch.tensor(lengths, device=self.device), max(lengths)  # [n]

    def step(self) -> tuple[Tensor, Tensor]:
        """Feed each live row's last token and draw its next: tokens and log-probs [n]."""
        self.reach(self.longest)
        t, n, T = self.t, len(self.rows), self.chunks * CHUNK
        P = self.prompts.mask.shape[1]
        window = slice(self.first, self.first + len(self.slots))
        slots, own_slot = torch.arange(n, device=self.device), t - 1
        chunk, place = own_slot // CHUNK, own_slot % CHUNK
        own_mask = torch.where(torch.arange(T, device=self.device) < t[:, None], 0.0, float("-inf"))
        mask = torch.cat([self.prompt_mask, own_mask[:, None]], -1)  # [n, 1, P + T]

        def by_question(x):  # [n, H, X] -> [G, H, J, X]
            return x[self.slots].transpose(1, 2)

        def by_row(x):  # [G, H, J, X] -> [n, H, X]
            return x.transpose(1, 2).flatten(0, 1)[self.flat]

        def attend(layer, q, k, v):  # [n, H, D]
            self.keys[layer, chunk, slots, :, place] = k
            self.values[layer, chunk, slots, :, place] = v
            own_k, own_v = (x[layer, : self.chunks, :n] for x in (self.keys, self.values))
            shared_k = self.prompts.keys[layer][window]  # [G, H, P, D]
            shared_v = self.prompts.values[layer][window]
            scores = [by_row(by_question(q) @ shared_k.mT)]  # [n, H, P]
            scores += [(q[:, :, None] @ x.mT)[:, :, 0] for x in own_k]  # [n, H, CHUNK] each
            w = (torch.cat(scores, -1).float() + mask).softmax(-1).to(q.dtype)  # [n, H, P + T]
            out = by_row(by_question(w[..., :P]) @ shared_v)  # [n, H, D]
            for weights, x in zip(w[:, :, None, P:].split(CHUNK, -1), own_v):
                out = out + (weights @ x)[:, :, 0]
            return out

        hidden = self.model(self.ids, self.prompts.lengths[self.of] + own_slot, attend)  # [n, C]
        tokens, logprobs = self.draw(hidden, self.streams, t)
        self.ids = tokens.clamp(min=0)  # -1 says that the logits were NaN: noticed by the caller
        self.t = (t + 1).clamp(max=self.max_tokens)
        self.longest = min(self.longest + 1, self.max_tokens)
        return tokens, logprobs


def make_draw(
    model: GPT2, s: SampleSettings, shared: Prompts, n_vocab: int, n_rows: int
) -> Callable:
    """`draw(hidden [n, C], streams [n], position [n])` -> tokens and log-probs [n]: the head and the
    draw. A model in bf16 has its head read in bf16 too, without its errors (kernels/)."""
    weight = model.head_weight[:n_vocab]  # fp32 [V, C]
    bf16, kind = shared.keys[0].dtype is torch.bfloat16, weight.device.type
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


@dataclass
class Queue:
    """The rows of a block: those that wait, and those that are done; the others are live."""

    waiting: list[Row]  # the next one last
    broken: Callable[[int, list[int]], SertError]  # what to raise about a question's row
    s: SampleSettings
    eot: int
    reject: Callable[[Row], bool] | None
    done: list[Row] = field(default_factory=list)

    def take(self, row: Row, tokens: list[int], logprobs: list[float]) -> int:
        """Append drawn tokens to a row until it ends; how many of them it took."""
        for i, (token, lp) in enumerate(zip(tokens, logprobs)):
            if token < 0:
                raise self.broken(row.question, row.token_ids)
            if token == self.eot:
                row.finish = "eos"
            else:
                row.token_ids.append(token)
                row.logprobs.append(round(lp, 5))
                self.judge(row)
            if row.finish:
                return i + 1
        return len(tokens)

    def judge(self, row: Row) -> None:
        """Does a row end with the token that it has just got?"""
        if self.reject is not None and self.reject(row):
            row.finish = "rejected"
        elif len(row.token_ids) >= self.s.max_new_tokens:
            row.finish = "length"

    def admit(self) -> Row | None:
        """The next row that still has to be decoded."""
        while self.waiting:
            row = self.waiting.pop()
            if not self.s.raw:  # its branch token has not been judged
                self.judge(row)
            if not row.finish:
                return row
            self.done.append(row)
        return None


@torch.inference_mode()
def sample_block(
    model: GPT2,
    tokenizer,
    prompts: list[list[int]],
    names: list[str],
    s: SampleSettings,
    reject: Callable[[Row], bool] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    look: int | None = None,
) -> list[Row]:
    """All continuations of a block of prompts, in the order (question, branch, sample).

    `names` are "task/id", the root of each row's random stream; `reject(row)` may stop a row early
    (finish "rejected"); `progress(n)` is told of n new tokens. With s = GREEDY: one greedy
    continuation per prompt. The host looks at the tokens every `look` steps (1 on a CPU, 8 on a
    GPU, which then never waits for it in between); what a row drew behind its end is dropped."""
    check_lengths(prompts, names, model, s.max_new_tokens)
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
    shared = prefill(model, prompts)
    logits = model.logits(shared.hidden)[:, :n_vocab]  # [Q, V]

    def broken(question: int, ids: list[int]) -> SertError:
        return SertError(
            f"{names[question]}: the model's logits are NaN or infinite "
            f"({first_broken(model, prompts[question] + ids)}); check its weights, or use "
            "--dtype fp32"
        )

    for question in (~logits.logsumexp(-1).isfinite()).nonzero().flatten().tolist():
        raise broken(question, [])
    rows = first_rows(logits, names, s, tokenizer.eot)
    n_rows = min(s.rows, len(rows))
    draw = make_draw(model, s, shared, n_vocab, n_rows)
    device = shared.lengths.device
    look = look or (8 if device.type == "cuda" else 1)
    queue = Queue(rows[::-1], broken, s, tokenizer.eot, reject)

    for i in range(0, len(rows) if s.raw else 0, s.rows):  # first tokens from the prompts' ends
        some = rows[i : i + s.rows]
        streams = torch.tensor([row.stream for row in some], device=device)
        hidden = shared.hidden[[row.question for row in some]]
        drawn = draw(hidden, streams, torch.zeros_like(streams))
        for row, token, lp in zip(some, *(x.tolist() for x in drawn)):
            queue.take(row, [token], [lp])

    live = Decoder(model, shared, draw, n_rows, s.max_new_tokens)
    while len(live.rows) < n_rows and (row := queue.admit()):
        live.place(len(live.rows), row)
    while live.rows:
        live.group()
        ended: list[int] = []
        while not ended:
            drawn = [live.step() for _ in range(look)]
            tokens, logprobs = (torch.stack(x, 1).tolist() for x in zip(*drawn))  # [n][look]
            progress(sum(map(queue.take, live.rows, tokens, logprobs)))
            ended = [slot for slot, row in enumerate(live.rows) if row.finish]
        for slot in reversed(ended):
            queue.done.append(live.rows[slot])
            if row := queue.admit():
                live.place(slot, row)
            else:
                live.remove(slot)
    return sorted(queue.done, key=lambda r: (r.question, r.branch, r.sample))
