"""Stage 1, second half: which sampled paths are latent reasoning [SERT §II-A-2, §III-A].

    1 pattern      drops what is not reasoning: imitates the prompt, lists the options, only answers
    2 length       drops paths shorter than 25 tokens
    3 repetition   drops paths with rep-2 above 0.2
    4 perplexity   drops paths below 5: what GPT-2 finds likely are its direct answers, and latent
                   reasoning is the unlikely rest (SmolLM2 differs: docs/results.md)
    5 answer       off, as in the paper; can drop paths that contradict the gold answer
    6 select       keeps, per question, the passed path with the lowest rep-2

Each rule sees what the one before it left. The pattern rule looks at the whole sampled text
(patterns.py), the others at the path, which loses its last half sentence if the cap cut it.

Flags, funnel, page and figures are made from RULES, so a new rule is a new entry, at the place where
it shall act, and its test; docs/example.py then writes its page anew. A rule that looks at a text
alone also joins FORM.
"""

import math
import operator
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from sert_min import patterns
from sert_min.answers import SENTENCE_END, leading_answer, stated_answer, strip_answer_sentence
from sert_min.io.errors import need
from sert_min.patterns import PATTERN_KINDS, decode
from sert_min.questions import Question


class Path(NamedTuple):
    """A sampled path as the rules see it."""

    ids: list[int]  # its tokens
    logprobs: list[float]  # of these and, before them, of an end-of-text branch token
    text: str
    breaks: dict[str, int]  # pattern kind that it breaks -> token with which it does
    question: Question


class Rule(NamedTuple):
    """One rule: paths whose `measure` breaks the `limit` are dropped."""

    name: str  # the verdict of the paths that it drops
    flag: str  # --min-tokens is min_tokens
    limit: object  # where neither a flag nor a preset gives one; the paper's for its rules
    parse: Callable[[object, str], object]  # (a flag's value, the flag) -> the limit, or an error
    measure: Callable[[Path], object]
    breaks: Callable[[object, object], object]  # (measure, limit); a string names the kind of break
    words: str  # how the limit reads in the funnel
    help: str
    paper: bool = False  # whether Fig. 4 has a curve for it even where it drops nothing


def rep2(ids: Sequence) -> float:
    """1 - |distinct bigrams| / |bigrams|; 0.0 for fewer than two tokens.

    >>> rep2([7, 8, 7, 8, 7])  # 78 87 78 87: two of four are distinct
    0.5
    """
    n = len(ids) - 1
    return (n - len(set(zip(ids, ids[1:])))) / n if n > 0 else 0.0


def perplexity(logprobs: Sequence[float]) -> float | None:
    """exp(-mean log-prob); None for no tokens."""
    mean = math.fsum(logprobs) / max(len(logprobs), 1)
    return math.exp(min(-mean, 700.0)) if logprobs else None  # finite: JSON has no infinity


def answers_stated(text: str, question: Question) -> str:
    """What a path states of the answer at its beginning or in its last answer statement: `right`,
    `wrong` (also if these two differ) or `none`."""
    said = {f(text, question) for f in (leading_answer, stated_answer)} - {None}
    return "none" if not said else "right" if said == {question.answer} else "wrong"


DROPPED = {"any": (), "consistent": ("wrong",), "right": ("wrong", "none")}  # by --answer


def number(low: float, high: float = math.inf) -> Callable:
    """A parser of limits from `low` to `high`."""

    def parse(limit, flag: str):
        to = f"to {high}" if high < math.inf else "up"
        inside = low <= limit <= high and limit < math.inf
        need(inside, f"{flag} must be from {low} {to}, not {limit}")
        return limit

    return parse


def parse_answer(limit, flag: str) -> str:
    need(limit in DROPPED, f"{flag} takes {', '.join(DROPPED)}, not {limit!r}")
    return limit


RULES = (
    Rule(
        "pattern", "patterns", PATTERN_KINDS, patterns.parse_patterns, lambda path: path.breaks,
        patterns.earliest,
        "drop {}", "kinds to drop, by comma: imitative,options,direct; or none", paper=True,
    ),
    Rule(
        "length", "min_tokens", 25, number(0), lambda path: len(path.ids),
        lambda n, least: n < max(least, 1),  # an empty path never passes
        "at least {} tokens", "paper: 25; 0: off", paper=True,
    ),
    Rule(
        "repetition", "max_rep2", 0.2, number(0, 1), lambda path: rep2(path.ids), operator.gt,
        "rep-2 at most {}", "share of repeated bigrams, paper: 0.2; 1: off", paper=True,
    ),
    Rule(
        "perplexity", "min_perplexity", 5.0, number(0), lambda path: perplexity(path.logprobs),
        operator.lt, "perplexity at least {}", "paper: 5; 0: off", paper=True,
    ),
    Rule(
        "answer", "answer", "any", parse_answer,
        lambda path: answers_stated(path.text, path.question),
        lambda stated, limit: stated in DROPPED[limit], "{} answer",
        "any: off (paper); consistent: drop paths that state a wrong answer; right: also those that "
        "state none, as STaR does",
    ),
)  # fmt: skip
FORM = [rule for rule in RULES if rule.name in ("pattern", "length", "repetition")]  # need no model


def add_flags(group) -> None:
    """A flag per rule."""
    for rule in RULES:
        kind = type(rule.limit) if type(rule.limit) in (int, float) else str
        group.add_argument(f"--{rule.flag.replace('_', '-')}", type=kind, help=rule.help)


def limits(preset: Mapping, flags: Mapping | None = None) -> dict:
    """The limit of every rule, by flag name: what `flags` say, else the task's preset, else the
    paper's value. A limit that has no meaning is an error."""
    chosen = {}
    for rule in RULES:
        limit = (flags or {}).get(rule.flag)
        limit = preset.get(rule.flag, rule.limit) if limit is None else limit
        chosen[rule.flag] = rule.parse(limit, f"--{rule.flag.replace('_', '-')}")
    return chosen


def words(rule: Rule, limit) -> str:
    """How a limit reads: `at least 25 tokens`."""
    listed = isinstance(limit, tuple | list)
    return rule.words.format(", ".join(limit) or "no pattern" if listed else limit)


# --- one path -------------------------------------------------------------------------------------


def trim_to_sentence(token_bytes: Sequence[bytes], path_start: int) -> int:
    """`path_end` of a path that the cap cut: behind the last full sentence, if there is one.

    >>> trim_to_sentence([b" It", b" rains", b'."', b" So", b" we"], 0)
    3
    """
    path = token_bytes[path_start:]
    ends = [m.end() for m in SENTENCE_END.finditer(decode(path))]
    last = bisect_right(patterns.characters_complete(path), ends[-1] - 1) + 1 if ends else len(path)
    return path_start + last


def first_broken(path: Path, limits: Mapping, rules: Sequence[Rule]) -> str | None:
    """The verdict by the first of `rules` that a path breaks."""
    for rule in rules:
        if broken := rule.breaks(rule.measure(path), limits.get(rule.flag, rule.limit)):
            return f"{rule.name}:{broken}" if isinstance(broken, str) else rule.name
    return None


def path_breaks(
    record: Mapping, token_bytes: Sequence[bytes], question: Question
) -> dict[str, int]:
    """For each pattern kind that a sampled record breaks, the index in its path of the token that
    breaks it. A special token that ended the path, such as `<|im_start|>`, is imitative."""
    special, final = record["finish"] == "special", record["finish"] != "rejected"
    drawn = token_bytes[record["path_start"] : len(token_bytes) - special]
    breaks = patterns.broken_kinds(drawn, question, final)
    return {"imitative": len(drawn), **breaks} if special else breaks


def verdict(record: Mapping, token_bytes: list[bytes], question: Question, limits: Mapping) -> dict:
    """What follows from a sampled record (`token_ids, logprobs, path_start, finish`): its `text,
    path_end, perplexity, rep2, verdict` (`kept` for a path that passes every rule). `token_bytes`
    are the bytes of each of its `token_ids`."""
    start, finish = record["path_start"], record["finish"]
    breaks = path_breaks(record, token_bytes, question)
    end = len(token_bytes) - (finish == "special")  # the token that ended it stands behind the path
    end = trim_to_sentence(token_bytes, start) if finish == "length" else end
    ids, logprobs = record["token_ids"][start:end], record["logprobs"][:end]
    path = Path(ids, logprobs, decode(token_bytes[start:end]), breaks, question)
    found = first_broken(path, limits, RULES) or "kept"
    whole = finish != "rejected" or found.startswith("pattern:")
    need(
        whole, "these --patterns pass a path that was stopped early; sample with --no-early-reject"
    )
    measured = {"perplexity": perplexity(logprobs), "rep2": rep2(ids)}
    return {"text": path.text, "path_end": end, **measured, "verdict": found}


def reasons(question: Question, text: str, tokenizer, limits: Mapping) -> bool:
    """Does an output, less its closing answer sentence, pass the rules that look at its form?"""
    text = strip_answer_sentence(text)[0]
    breaks = patterns.pattern_breaks(text, question)
    path = Path(tokenizer.encode(text), [], text, breaks, question)
    return not first_broken(path, limits, FORM)


SAMPLED = {  # what a sampled record holds (generate.sample_paths); all else follows from it
    "id": str, "question": str, "branch": int, "sample": int, "token_ids": list, "logprobs": list,
    "path_start": int, "finish": str,
}  # fmt: skip
RECORD = (  # the keys of a record of paths.jsonl, in order
    "task", "id", "question", "answer", "branch", "sample", "text", "token_ids", "logprobs",
    "path_start", "path_end", "finish", "perplexity", "rep2", "verdict",
)  # fmt: skip


def path_records(
    sampled: list, questions: list[Question], tokenizer, limits: Mapping
) -> list[dict]:
    """The records of paths.jsonl from those of `generate.sample_paths`, for all paths of `questions`:
    with verdicts, and one path selected per question."""
    by_id, records = {q.id: q for q in questions}, []
    for r in sampled:
        q = by_id[r["id"]]
        token_bytes = [tokenizer.to_bytes.get(i, b"") for i in r["token_ids"]]
        whole = {"task": q.task, "question": q.text, "answer": q.answer, **r}
        whole |= verdict(r, token_bytes, q, limits)
        records.append({key: whole[key] for key in RECORD})
    return select(records)


def select(records: Iterable[Mapping]) -> list[dict]:
    """Copies of records: of each question's passed paths the one with the lowest rep-2 (then branch,
    then sample) is `selected`, the others are `kept` [SERT §II-A-2]."""
    records, passed = [dict(r) for r in records], defaultdict(list)
    for r in records:
        if r["verdict"] in ("kept", "selected"):
            r["verdict"] = "kept"
            passed[r["task"], r["id"]].append(r)
    for some in passed.values():
        best = min(some, key=lambda r: (r["rep2"], r["branch"], r["sample"]))
        best["verdict"] = "selected"
    return records


class Funnel:
    """What each rule saw and dropped, counted record by record."""

    def __init__(self, records: Iterable[Mapping] = ()):
        self.verdicts: Counter = Counter()
        self.passed: Counter = Counter()  # question -> how many of its paths passed
        for r in records:
            self.add(r)

    def add(self, r: Mapping) -> Mapping:
        """Count a record with its verdict; returns the record."""
        self.verdicts[r["verdict"]] += 1
        self.passed[r["task"], r["id"]] += r["verdict"] in ("kept", "selected")
        return r

    def counts(self) -> dict:
        """All counts as JSON has them; `seen` are the paths that reached each rule."""
        n, left, seen = self.verdicts, self.verdicts.total(), {}
        dropped = {rule.name: n[rule.name] for rule in RULES}
        dropped |= {f"pattern:{kind}": n[f"pattern:{kind}"] for kind in PATTERN_KINDS}
        dropped["pattern"] = sum(v for k, v in n.items() if k.startswith("pattern:"))
        unknown = set(n) - {*dropped, "kept", "selected"}
        need(not unknown, f"there is no verdict {', '.join(map(repr, unknown))}; sample again")
        for rule in RULES:
            seen[rule.name] = left
            left -= dropped[rule.name]
        return {
            "paths": n.total(),
            "seen": seen,
            "dropped": dropped,
            "passed": left,
            "selected": n["selected"],
            "questions": len(self.passed),
            "without_path": sum(not passed for passed in self.passed.values()),
        }
