"""Stage 1a: many continuations of each question, decoded together [SERT §II-A-1].

A *block* is a fixed number of consecutive questions; all that follows happens inside one block.
    1. Prefill: each prompt runs through the model once; its keys and values are kept once.
    2. Branch: the five most probable first tokens start five branches of five rows each.
    3. Decode: up to `rows` rows at a time take one token per step; a row that ended makes room for
       the block's next one (decode.py).
    4. Judge: the host looks at the tokens and ends rows that broke a rule.
Sums in floating point change in the last bits with the number of rows, so the same block always
runs the same way, whatever ran before it: that makes a run the same bytes after any restart.
"""

import hashlib
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bf16_pieces, cpu, head_sample_and_score
from kernels.reference import best_first
from sert_min.decode import Decoder, Prompts, on_gpu, own_memory, prefill, rounded
from sert_min.gpt2 import GPT2, first_broken
from sert_min.runtime import SertError


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
        weight = F.pad(weight, (0, 0, 0, -n_vocab % 64))  # rows
    elif bf16 and kind == "cpu":
        weight = cpu.prepare(weight, shared.hidden, n_rows)
    given = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "seed": s.seed}
    given["n_vocab"] = n_vocab

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
    # Where no row waits for another one's end, all have ended after so many steps.
    most = s.max_new_tokens - 1 if len(waiting) <= live.n else sys.maxsize
    while left:
        live.shrink_to(left)
        if (steps := min(look, most - live.steps)) > 0:
            looks.append(live.look(steps))
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
