"""Stage 1, second half: which sampled paths are latent reasoning [SERT §II-A-2, §III-A].

    1 pattern      not reasoning: imitates the prompt, lists the options, or only answers [Fig. 2]
    2 length       shorter than 25 tokens
    3 repetition   rep-2 above 0.2
    4 perplexity   below 5: the model's likely continuations are direct answers, not reasoning
    5 select       per question the passed path with the lowest rep-2

Each rule sees what the one before it left. The paper names the three patterns and shows an example
of each; their definitions here are ours. They look at the whole sampled text and are monotone: once
broken, no further token mends them, so a row can stop early and later get the same verdict. The
other rules look at the path, which loses a last half sentence if the cap cut it.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sert_min.answers import SENTENCE_END
from sert_min.io.errors import SertError
from sert_min.patterns import PATTERN_KINDS, break_token, characters_complete, decode
from sert_min.questions import Question

# In this order; each sees what the one before it left. A new rule goes here and into FilterSettings
# and judge_path; tasks.preset and micro.PRESET (its value); sample.py (its flag, filter_settings,
# print_run, print_funnel); a style in plots.plot_ablation; page.py and page.html (its words).
RULES = ("pattern", "length", "repetition", "perplexity")


@dataclass(frozen=True)
class FilterSettings:
    """Thresholds, the paper's by default; None switches a rule off. An empty path never passes."""

    patterns: tuple[str, ...] | None = PATTERN_KINDS
    min_tokens: int | None = 25
    max_rep2: float | None = 0.2
    min_perplexity: float | None = 5.0

    def __post_init__(self):
        unknown = set(self.patterns or ()) - set(PATTERN_KINDS)
        if unknown:
            raise SertError(
                f"--patterns knows {', '.join(PATTERN_KINDS)} and none, not {sorted(unknown)[0]!r}"
            )
        if self.min_tokens is not None and not self.min_tokens >= 0:
            raise SertError(f"--min-tokens must be 0 or more, not {self.min_tokens}")
        if self.max_rep2 is not None and not 0 <= self.max_rep2 <= 1:
            raise SertError(f"--max-rep2 must be between 0 and 1, not {self.max_rep2}")
        if self.min_perplexity is not None and not 0 <= self.min_perplexity < math.inf:
            raise SertError(f"--min-perplexity must be 0 or more, not {self.min_perplexity}")


def trim_to_sentence(token_bytes: Sequence[bytes], path_start: int) -> int:
    """`path_end` of a path that the cap cut: after the token that holds the end of the last full
    sentence, or all of it if there is none.

    >>> trim_to_sentence([b" It", b" rains", b'."', b" So", b" we"], 0)
    3
    """
    path = token_bytes[path_start:]
    ends = [m.end() for m in SENTENCE_END.finditer(decode(path))]
    if not ends:
        return len(token_bytes)
    return path_start + bisect_right(characters_complete(path), ends[-1] - 1) + 1


# --- 3 repetition, 4 perplexity --------------------------------------------------------------


def rep2(ids: Sequence) -> float:
    """1 - |distinct bigrams| / |bigrams|; 0.0 for fewer than two tokens.

    >>> rep2([7, 8, 7, 8, 7])  # 78 87 78 87: two of four are distinct
    0.5
    """
    n = len(ids) - 1
    return (n - len(set(zip(ids, ids[1:])))) / n if n > 0 else 0.0


def perplexity(logprobs: Sequence[float]) -> float | None:
    """exp(-mean log-prob); None for no tokens."""
    if not logprobs:
        return None
    mean = math.fsum(logprobs) / len(logprobs)
    return math.exp(min(-mean, 700.0))  # finite: JSON has no infinity


# --- all rules on one path, then on all ------------------------------------------------------


def judge_path(
    record: Mapping, token_bytes: Sequence[bytes], question: Question, settings: FilterSettings
) -> dict:
    """`text, path_end, perplexity, rep2, verdict` of a path from its `token_ids, logprobs,
    path_start, finish`; `token_bytes` are the bytes of each of `token_ids`. A path that passes
    every rule is `kept`. Deterministic in the stored (rounded) log-probs."""
    start, finish = record["path_start"], record["finish"]
    kinds = settings.patterns or ()
    broken = break_token(token_bytes[start:], question, kinds, final=finish != "rejected")
    if finish == "rejected" and not broken:
        raise SertError(
            "a path was stopped early by a pattern rule that is now off; give --patterns as in "
            "the sampling run, or sample again with --no-early-reject into another --out-dir"
        )
    end = trim_to_sentence(token_bytes, start) if finish == "length" else len(token_bytes)
    ids = record["token_ids"][start:end]
    # an end-of-text branch token is no part of the path (start is 1), but its log-prob counts
    found_perplexity = perplexity(record["logprobs"][:end])
    found_rep2 = rep2(ids)
    if broken:
        verdict = f"pattern:{broken[0]}"
    elif len(ids) < max(settings.min_tokens or 0, 1):
        verdict = "length"
    elif settings.max_rep2 is not None and found_rep2 > settings.max_rep2:
        verdict = "repetition"
    elif settings.min_perplexity is not None and found_perplexity < settings.min_perplexity:
        verdict = "perplexity"
    else:
        verdict = "kept"
    return {
        "text": decode(token_bytes[start:end]),
        "path_end": end,
        "perplexity": found_perplexity,
        "rep2": found_rep2,
        "verdict": verdict,
    }


def select(records: Iterable[Mapping]) -> list[dict]:
    """Copies of judged records in their order: of each question's passed paths the one with the
    lowest rep-2 (then branch, then sample) is `selected`, the others `kept` [SERT §II-A-2]."""
    records = [dict(r) for r in records]
    best: dict[tuple, dict] = {}
    for r in records:
        if r["verdict"] in ("kept", "selected"):
            r["verdict"] = "kept"
            key = r["task"], r["id"]
            rank = r["rep2"], r["branch"], r["sample"]
            held = best.get(key)
            if held is None or rank < (held["rep2"], held["branch"], held["sample"]):
                best[key] = r
    for r in best.values():
        r["verdict"] = "selected"
    return records


@dataclass
class Counts:
    """What each rule saw and dropped, for the table at the end of a run."""

    paths: int = 0
    seen: dict[str, int] = field(default_factory=dict)  # rule -> paths that reached it
    dropped: dict[str, int] = field(default_factory=dict)  # rule or `pattern:KIND` -> paths
    passed: int = 0
    selected: int = 0
    questions: int = 0
    without_path: int = 0  # questions that no path of theirs survived


def count_verdicts(records: Iterable[Mapping]) -> Counts:
    """Counters over judged (and selected) records; one pass, records may come from a generator."""
    dropped = dict.fromkeys((*RULES, *(f"pattern:{kind}" for kind in PATTERN_KINDS)), 0)
    counts = Counts(dropped=dropped)
    passed_by_question: dict[tuple, bool] = {}
    for r in records:
        verdict, key = r["verdict"], (r["task"], r["id"])
        counts.paths += 1
        passed = verdict in ("kept", "selected")
        counts.passed += passed
        counts.selected += verdict == "selected"
        passed_by_question[key] = passed_by_question.get(key, False) or passed
        if not passed:
            if verdict not in dropped:
                raise SertError(f"{r['id']}: there is no verdict {verdict!r}; sample it again")
            dropped[verdict] += 1
            if verdict.startswith("pattern:"):
                dropped["pattern"] += 1
    left = counts.paths
    for rule in RULES:
        counts.seen[rule] = left
        left -= dropped[rule]
    counts.questions = len(passed_by_question)
    counts.without_path = sum(not passed for passed in passed_by_question.values())
    return counts
