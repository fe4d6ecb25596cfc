"""Stage 1, first half: many continuations of each question, decoded together [SERT §II-A-1].

A *block* is a fixed number of consecutive questions; everything below happens inside one block.
    1. Prefill: each prompt runs through the model once, and its keys and values are kept once.
    2. Branch: the five most probable first tokens start five branches of five paths each.
    3. Decode: up to `rows` paths at a time take one token per step. A path while it is decoded is
       called a *row*. When a row ends, the block's next path takes its place.
    4. Look: the host reads the drawn tokens and decides which rows have ended.
The last bits of a floating-point sum change with the number of rows. A block always runs the same
way, whatever ran before it, so a run gives the same bytes after any restart.
"""

import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sert_min.decode import Decoder, Prompts, find_decoder, on_gpu, prefill, rounded
from sert_min.gpt2 import GPT2
from sert_min.io.errors import SertError, need
from sert_min.kernels.reference import best_first
from sert_min.models import first_not_finite
from sert_min.patterns import pattern_break
from sert_min.prompts import question_prompt
from sert_min.questions import Question


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
    rows: int = 200  # decoded together

    def check(self) -> "SampleSettings":
        """Refuse values that have no meaning; the error names the flag."""
        for name in ("branches", "samples", "max_new_tokens", "rows"):
            need(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
        need(self.branches * self.samples <= 10_000, "more than 10,000 --branches times --samples")
        need(0 <= self.temperature <= 1e30, "--temperature must be from 0 (greedy) to 1e30")
        need(0 < self.top_p <= 1, "--top-p must be above 0 and at most 1 (1 switches it off)")
        need(0 <= self.top_k <= 2**31, "--top-k must be from 0 (off) to 2^31")
        need(0 <= self.seed < 2**63, "--seed must be from 0 to 2^63 - 1")
        return self


Progress = Callable[[int, int], None]  # hears of new tokens, and of rows that ended


def silent(tokens: int, ended: int) -> None:
    """No progress bar."""


GREEDY = SampleSettings(branches=1, samples=1, temperature=0.0, raw=True)


@dataclass
class Row:
    """One continuation. `token_ids` starts with the branch token (unless raw) and leaves out the
    closing end-of-text, but not another special token that ended it; `logprobs` are at temperature 1
    over the full vocabulary, 5 decimals."""

    question: int  # index in the block
    branch: int  # 0-based; -1 for raw samples
    sample: int
    stream: int  # random stream of `sample_and_score`
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    path_start: int = 0  # 1 behind a branch token that is end-of-text
    finish: str = ""  # eos | special | length | rejected


# --- a block of questions -------------------------------------------------------------------------


def sample_paths(
    model: GPT2,
    tokenizer,
    questions: Sequence[Question],
    s: SampleSettings,
    suffix: str = "",
    early_reject: Sequence[str] = (),
    progress: Progress = silent,
    memory: dict | None = None,
) -> list[dict]:
    """The paths of a block of questions as records, without any verdict (filters.py adds it): in
    the order (question, branch, sample). `suffix` stands behind the prompts; a row stops as soon as
    it breaks one of the pattern rules `early_reject`; `progress` and `memory` as in `sample_block`."""
    prompts = [tokenizer.encode_prompt(question_prompt(q, suffix)) for q in questions]
    names = [f"{q.task}/{q.id}" for q in questions]

    def reject(question: int, ids: list[int]) -> bool:
        text = tokenizer.decode(ids)
        return pattern_break(text, questions[question], early_reject, final=False) is not None

    told = ("branch", "sample", "token_ids", "logprobs", "path_start", "finish")
    records = []
    for row in sample_block(
        model, tokenizer, prompts, names, s, reject if early_reject else None, progress, memory
    ):
        q = questions[row.question]
        records.append({"id": q.id, "question": q.text} | {k: getattr(row, k) for k in told})
    return records


@torch.inference_mode()
def sample_block(
    model: GPT2,
    tokenizer,
    prompts: list[list[int]],
    names: list[str],
    s: SampleSettings,
    reject: Callable[[int, list[int]], bool] | None = None,
    progress: Progress = silent,
    memory: dict | None = None,
    look: int | None = None,
    ahead: int | None = None,
) -> list[Row]:
    """All continuations of a block of prompts, in the order (question, branch, sample).

    `names` are "task/id", the root of each row's random stream. `reject(question, ids)` may end a
    row early (finish "rejected"); `ids` are the row's tokens from `path_start` on, and what it
    rejects it must reject in every longer row, too. `progress` hears of new tokens and ended rows. With
    s = GREEDY there is one greedy continuation per prompt. `memory` is a dict that a run hands from
    block to block: the decoder keeps its buffers in it and, on a GPU, its CUDA graphs.

    The host looks at the tokens every `look` steps and lets the device run `ahead` looks in the
    meantime: 1 and 0 on a CPU, 8 and 1 on a GPU, so that the GPU is never idle. Tokens that a row
    drew behind its end are dropped."""
    check_lengths(prompts, names, model, s.max_new_tokens)
    memory = {} if memory is None else memory

    # 1. Prefill.
    shared = prefill(model, prompts)
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
    logits = model.logits(shared.hidden)[:, :n_vocab]  # [Q, V]

    def refuse_nan(question: int, ids: list[int]) -> None:
        memory.clear()  # a NaN in these buffers would spoil the next block
        where = first_not_finite(model, prompts[question] + ids)
        raise SertError(
            f"{names[question]}: the model's logits are NaN or infinite ({where}); check its "
            "weights, or use --dtype fp32"
        )

    for question in (~logits.logsumexp(-1).isfinite()).nonzero()[:, 0].tolist():
        refuse_nan(question, [])

    def end(row: Row, known: list[int], tokens: list[int]) -> int:
        """Set how a row's path ends, if it does, with these tokens behind the known ones; returns
        how many of them it takes."""
        rejects = reject and (lambda new: reject(row.question, known + new))
        room = s.max_new_tokens - row.path_start - len(known)
        n, row.finish = ending(tokens, room, tokenizer.ends, rejects)
        if row.finish == "nan":
            refuse_nan(row.question, row.token_ids + tokens[:n])
        return n

    def extend(row: Row, tokens: list[int], logprobs: list[float]) -> int:
        """Give drawn tokens to a row; returns how many of them were of use."""
        n = end(row, row.token_ids[row.path_start :], tokens)
        row.token_ids += tokens[:n]
        row.logprobs += logprobs[:n]
        return n + (row.finish == "eos")

    # 2. Branch.
    rows = first_rows(logits, names, s, tokenizer.eot, tokenizer.ends)
    live = find_decoder(memory, model, shared, s, tokenizer)
    if s.raw:
        for drawn in draw_first_tokens(live, shared, rows):
            extend(*drawn)
    else:  # a branch token alone may break a rule or reach the cap
        for row in rows:
            end(row, [], row.token_ids[row.path_start :])
    waiting = [i for i, row in enumerate(rows) if not row.finish]
    first = [(row.token_ids or [0])[0] for row in rows]
    live.begin(shared, [row.stream for row in rows], first, waiting)

    # 3, 4. Decode and look.
    gpu = on_gpu(shared.lengths)
    look, ahead = look or (8 if gpu else 1), int(gpu) if ahead is None else ahead
    left, looks = len(waiting), deque()
    # Where no row waits for another one's end, all rows have ended after so many steps.
    most = s.max_new_tokens - 1 if len(waiting) <= live.n else sys.maxsize
    while left:
        live.shrink_to(left)
        if (steps := min(look, most - live.steps)) > 0:
            looks.append(live.look(steps))
            if len(looks) <= ahead:
                continue
        taken, ended = 0, []
        for i, tokens, logprobs in looks.popleft()():
            if not rows[i].finish:
                taken += extend(rows[i], tokens, logprobs)
                if rows[i].finish:
                    ended.append(i)
        live.stop([i for i in ended if rows[i].finish == "rejected"])
        left -= len(ended)
        progress(taken, len(ended))
    return rows


def ending(
    tokens: list[int], room: int, ends: Mapping[int, str], reject: Callable | None = None
) -> tuple[int, str]:
    """(how many of the drawn `tokens` a row takes, how it ends there: eos, special, length, rejected,
    nan, or "" if it goes on). The row has room for `room` more tokens; `ends` says how a row ends at
    each special token; `reject(new)` says whether it breaks a rule with these new tokens, and a
    rejected row ends with the token that broke it.

    >>> ends = {9: "eos", 8: "special"}
    >>> ending([6, 9, 6], 5, ends)  # the end-of-text itself is not taken
    (1, 'eos')
    >>> ending([6, 8, 6], 5, ends)  # another special token is, as the last
    (2, 'special')
    >>> ending([6, 6, 6], 2, ends)  # the cap
    (2, 'length')
    >>> ending([6, 7, 6], 5, ends, reject=lambda new: 7 in new)
    (2, 'rejected')
    >>> ending([6, -1, 6], 5, ends)  # the kernels draw -1 from logits that are NaN
    (1, 'nan')
    """
    n = min(next((i for i, t in enumerate(tokens) if t in ends), len(tokens)), room)
    if -1 in tokens[:n]:
        return tokens.index(-1), "nan"
    if reject and n and reject(tokens[:n]):
        while n > 1 and reject(tokens[: n - 1]):
            n -= 1
        return n, "rejected"
    if n == room:
        return n, "length"
    finish = ends[tokens[n]] if n < len(tokens) else ""
    return n + (finish == "special"), finish


# --- before the first step -------------------------------------------------------------------------


def stream_of(name: str, branch: int, sample: int) -> int:
    """Random stream of a path: first 8 bytes of sha256("task/id/branch/sample"), signed."""
    digest = hashlib.sha256(f"{name}/{branch}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_lengths(prompts: list[list[int]], names: list[str], model: GPT2, new: int) -> None:
    """Every prompt with its new tokens must fit into the model's context and vocabulary."""
    context, vocab = model.config.n_positions, model.config.vocab_size
    for ids, name in zip(prompts, names):
        need(ids, f"{name} is empty; give it some text")
        need(
            max(ids) < vocab,
            f"{name} has token id {max(ids)}, the model only {vocab} ids: weights and tokenizer do "
            "not belong together; use the files of one model",
        )
        need(
            len(ids) + new <= context,
            f"{name} has {len(ids)} tokens; with --max-new-tokens {new} that exceeds the context of "
            f"{context}; "
            + ("lower --max-new-tokens" if len(ids) < context else "leave that question out"),
        )


def first_rows(
    logits: Tensor, names: list[str], s: SampleSettings, eot: int, ends: Iterable[int] = ()
) -> list[Row]:
    """All rows of a block in order, each with its first token if that is a branch [SERT §II-A-1];
    logits [Q, V] at the prompts' ends. End-of-text may be a branch, other special tokens (`ends`)
    may not."""
    if s.raw:
        which = itertools.product(enumerate(names), range(s.branches * s.samples))
        return [Row(q, -1, i, stream_of(name, -1, i)) for (q, name), i in which]
    need(s.branches <= logits.shape[1], f"--branches {s.branches} exceeds the vocabulary; lower it")
    special = torch.tensor([i for i in ends if i != eot], dtype=torch.long, device=logits.device)
    possible = logits.index_fill(1, special, float("-inf"))
    top, ids = best_first(possible, s.branches)  # [Q, K], ties by lowest id
    logprobs = top - logits.logsumexp(-1, keepdim=True)
    rows = []
    for q, name in enumerate(names):
        for b, (token, lp) in enumerate(zip(ids[q].tolist(), logprobs[q].tolist())):
            for i in range(s.samples):
                row = Row(q, b, i, stream_of(name, b, i), [token], [round(lp, 5)])
                row.path_start = int(token == eot)
                rows.append(row)
    return rows


def draw_first_tokens(
    live: Decoder, prompts: Prompts, rows: list[Row]
) -> Iterator[tuple[Row, list[int], list[float]]]:
    """The first token of plain samples, drawn at their prompt's end: (row, [token], [log-prob])."""
    for i in range(0, len(rows), live.n_slots):
        some = rows[i : i + live.n_slots]
        streams = torch.tensor([row.stream for row in some], device=prompts.lengths.device)
        hidden = prompts.hidden[[row.question for row in some]]
        tokens, logprobs = live.draw(hidden, streams, torch.zeros_like(streams))
        yield from zip(some, tokens[:, None].tolist(), rounded(logprobs)[:, None].tolist())
