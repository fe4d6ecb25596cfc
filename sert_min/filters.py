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

import codecs
import functools
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from sert_min.prompts import HEDGES, SENTENCE_END, words_pattern
from sert_min.runtime import SertError
from sert_min.tasks import LETTERS, Question

PATTERN_KINDS = ("imitative", "options", "direct")  # ties go to the first
EARLY_KINDS = PATTERN_KINDS[:2]  # nothing mends them; a direct answer may get a second sentence
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


def parse_patterns(text: str) -> tuple[str, ...]:
    """`--patterns`: kinds to drop, comma-separated, in any order; `none` drops nothing."""
    kinds = {part.strip() for part in text.split(",")} - {""}
    if kinds == {"none"}:
        return ()
    if not kinds or kinds - set(PATTERN_KINDS):
        raise SertError(f"--patterns takes {','.join(PATTERN_KINDS)} or none, not {text!r}")
    return tuple(kind for kind in PATTERN_KINDS if kind in kinds)


# --- 1 pattern -------------------------------------------------------------------------------
#
# imitative   `Question:` or `Answer:` stands in the text, in this spelling.
# options     Lists two or more different options back:
#             by label: (A) and (B) with at most LABEL_WORDS words, no verb of PROSE and no sentence
#             end between them (option texts aside: `(A) bank. (B) mall` is a list; `(B) is wrong,
#             (C) fits` is prose), or `A. bank B. mall`; or
#             by text: three option texts, or two that fill a sentence or line of their own, with
#             only commas, `or`, `and`, articles, labels or line breaks between them (`a bank is
#             likelier than a library`, `a bank or a mall has one` are prose).
#             A yes/no question has options too: labels as above, and `yes or no`, `yes/no`.
# direct      The whole text states an answer: optional `The answer is` or `It is` and a hedge, then
#             yes or no, a label, an option's text, or label and text. Known at the end only: a
#             second sentence may still come.

_IMITATIVE = re.compile(r"Question:|Answer:")
LABEL_WORDS = 8
LIST_REACH = 200  # characters between the starts of two neighbours of a list of texts
PROSE = re.compile(
    r"\b(?:is|are|was|were|be|isn['’]t|aren['’]t|would|could|should|can|cannot|can['’]t|will|won['’]t"
    r"|may|might|must|has|have|had|does|do|did|doesn['’]t|don['’]t|seems?|makes?|because|since|if|than"
    r"|not|which|that|it|they|he|she|you|so|but)\b|[.!?](?=\s)",
    re.IGNORECASE,
)
_LABEL = re.compile(rf"\(([{LETTERS}{LETTERS.lower()}])\)")
_MARK = rf"[(\[]?[{LETTERS}{LETTERS.lower()}\d][).\]:]"  # (B)  B.  2)  before a listed text
_GAP = (  # what may stand between two listed texts; short, so that no run of spaces is slow
    rf"""(?:[\s"'“”‘’*_,;/|.•-]|\b(?:and/or|and|or|an?|the)\b|{_MARK}){{1,12}}"""
)
_LEAD = re.compile(  # what stands before a list that fills a sentence or line
    rf"""(?:\A|[.!?:]|\n|\b(?:options|choices)\ are\b)
    (?:[\s"'“”‘’)\]*_•-]|\b(?:either|an?|the)\b|{_MARK})*\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_TAIL = re.compile(r"""["'”’)\]*_]*(?:[.!?]+["'”’)\]]*\s|[^\S\n]*\n)""")  # .. and after it
_TAIL_AT_END = re.compile(r"""["'”’)\]*_]*[.!?]*["'”’)\]]*\s*\Z""")
# The character that shows that a word is over. U+FFFD does not: it may be half a letter.
_AFTER = r"(?=(?P<after>[^\w'’\ufffd-]|\Z))"
_YES_OR_NO = re.compile(
    rf"""\b(?:yes["'”’]?\s*(?:/|,?\s?or\b)\s*["'“‘]?no|no["'”’]?\s*(?:/|,?\s?or\b)\s*["'“‘]?yes){_AFTER}""",
    re.IGNORECASE,
)


class _ChoicePatterns(NamedTuple):
    words: re.Pattern  # any option's text
    pair: re.Pattern  # two option texts as in a list: a cheap first look
    each: tuple[re.Pattern, ...]  # one per different text, as whole words
    direct: re.Pattern


@functools.lru_cache(512)
def _choice_patterns(choices: tuple[str, ...]) -> _ChoicePatterns:
    words = words_pattern(choices)
    different = sorted({" ".join(c.lower().split()) for c in choices} - {""})
    label = rf"[(\[]?[{LETTERS}{LETTERS.lower()}][)\]]?[.:]?"
    text = rf"yes|no|(?:(?:an?|the)\s)?(?:{words})"
    direct = (
        r"(?:(?:so|thus|therefore|hence),? )?"
        r"(?:(?:the (?:\w+ )?answer(?: is|:)|it is|it['’]s)[:,]? )?"
        rf"(?:(?:{HEDGES}) )?(?:(?:option|choice) )?"
        rf"(?:{label}(?:[ :,–-]{{0,3}}(?:{text}))?|{text})[)\].!?]*"
    )
    return _ChoicePatterns(
        re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE),
        re.compile(rf"(?<!\w)(?:{words}){_GAP}(?:{words})", re.IGNORECASE),
        tuple(
            re.compile(rf"(?<!\w){words_pattern([t])}{_AFTER}", re.IGNORECASE) for t in different
        ),
        re.compile(direct, re.IGNORECASE),
    )


_GAP_ONLY = re.compile(_GAP, re.IGNORECASE)
_HAS_MARK = re.compile(rf"(?<![^\W_]){_MARK}", re.IGNORECASE)


def pattern_break(
    text: str, question: Question, kinds: Sequence[str] = PATTERN_KINDS, final: bool = True
) -> tuple[str, int] | None:
    """(kind, length of the shortest beginning of `text` that breaks it) of the first break, if
    any. With `final=False` more text may follow: what is found then, every continuation breaks.
    This ends rows early; verdicts are `break_token`'s, which looks at whole tokens."""
    breaks = pattern_breaks(text, question, kinds, final)
    order = sorted(breaks, key=lambda kind: (breaks[kind], PATTERN_KINDS.index(kind)))
    return (order[0], breaks[order[0]]) if order else None


def pattern_breaks(
    text: str, question: Question, kinds: Sequence[str] = PATTERN_KINDS, final: bool = True
) -> dict[str, int]:
    """For each broken kind the length of the shortest beginning of `text` that breaks it."""
    breaks = {}
    if "imitative" in kinds and (m := _IMITATIVE.search(text)):
        breaks["imitative"] = m.end()
    if "options" in kinds:
        ends = [_label_list_end(text, question), _text_list_end(text, question, final)]
        if ends := [end for end in ends if end is not None]:
            breaks["options"] = min(ends)
    if "direct" in kinds and final and _is_direct(text, question):
        breaks["direct"] = len(text)
    return breaks


def break_token(
    token_bytes: Sequence[bytes],
    question: Question,
    kinds: Sequence[str] = PATTERN_KINDS,
    final: bool = True,
) -> tuple[str, int] | None:
    """(kind, index of the token that breaks it) of the earliest break in a path's tokens; in one
    token the kinds go in the order of PATTERN_KINDS. The same as looking after every token."""
    breaks = pattern_breaks(decode(token_bytes), question, kinds, final)
    if not breaks:
        return None
    complete = characters_complete(token_bytes)
    tokens = {kind: bisect_right(complete, end - 1) for kind, end in breaks.items()}
    kind = min(tokens, key=lambda kind: (tokens[kind], PATTERN_KINDS.index(kind)))
    return kind, tokens[kind]


def _label_list_end(text: str, question: Question) -> int | None:
    labels = list(_LABEL.finditer(text))
    for a, b in zip(labels, labels[1:]):
        between = text[a.end() : b.start()]
        if a[1].upper() == b[1].upper() or len(between) > 200:
            continue
        rest, n_texts = _choice_patterns(question.choices).words.subn("", between)
        rest = rest.strip(" .") if n_texts else rest
        if len(rest.split()) <= LABEL_WORDS and not PROSE.search(rest):
            return b.end()
    return None


def _text_list_end(text: str, question: Question, final: bool) -> int | None:
    if not question.choices:
        m = _YES_OR_NO.search(text)
        return m.end("after") if m and (m["after"] or final) else None
    patterns = _choice_patterns(question.choices)
    if not patterns.pair.search(text):
        return None
    spans = sorted(
        (m.start(), m.end(), option)
        for option, pattern in enumerate(patterns.each)
        for m in pattern.finditer(text)
        if m["after"] or final
    )
    # Which options a list ending at each span can hold; `alone`: lists that begin a sentence or
    # line. Overlapping texts (bus, bus stop) both count: so a longer text never mends a list.
    listed: list[set[int]] = []
    alone: list[set[int]] = []
    ends = []
    for j, (start, end, option) in enumerate(spans):
        window = text[max(0, start - 60) : start]
        begins = _LEAD.search(window if start <= 60 else "x" + window)
        listed.append({option})
        alone.append({option} if begins else set())
        marked = False
        for i in range(j - 1, -1, -1):
            if start - spans[i][0] > LIST_REACH:
                break
            gap = text[spans[i][1] : start]
            if not gap or not _GAP_ONLY.fullmatch(gap):
                continue
            listed[j] |= listed[i]
            if alone[i]:
                alone[j] |= alone[i] | {option}
            marked |= spans[i][2] != option and bool(_HAS_MARK.search(gap))
        if len(listed[j]) >= 3 or marked:
            ends.append(min(end + 1, len(text)))
        if len(alone[j]) >= 2:
            if tail := _TAIL.match(text, end):
                ends.append(tail.end())
            elif final and _TAIL_AT_END.match(text, end):
                ends.append(len(text))
    return min(ends, default=None)


def _is_direct(text: str, question: Question) -> bool:
    plain = " ".join(re.sub(r"""["“”‘*_`]""", "", text).split()).strip("' ")
    return len(plain) < 500 and bool(_choice_patterns(question.choices).direct.fullmatch(plain))


# --- tokens and characters -------------------------------------------------------------------


def decode(token_bytes: Sequence[bytes]) -> str:
    """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(token_bytes).decode("utf-8", "replace")


def characters_complete(token_bytes: Sequence[bytes]) -> list[int]:
    """After each token, how many characters of the whole text are complete. A character that is
    split over tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(token_bytes) - 1
    return list(accumulate(len(decoder.decode(b, i == last)) for i, b in enumerate(token_bytes)))


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
