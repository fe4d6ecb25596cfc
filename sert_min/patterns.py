"""What is not reasoning: the three patterns of rule 1 [SERT §II-A-2, Fig. 2]."""

import codecs
import functools
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from sert_min.answers import HEDGES, strip_answer_sentence, words_pattern
from sert_min.io.errors import need
from sert_min.questions import LETTERS, Question

PATTERN_KINDS = ("imitative", "options", "direct")  # ties go to the first
EARLY_KINDS = PATTERN_KINDS[:2]  # nothing mends them; a direct answer may get a second sentence


def parse_patterns(kinds, flag: str = "--patterns") -> tuple[str, ...]:
    """The kinds that `--patterns` drops, comma-separated, in any order; `none` drops nothing."""
    if isinstance(kinds, str):
        kinds = {part.strip() for part in kinds.split(",")} - {""} or {"nothing"}
    known = set(kinds) == {"none"} or set(kinds) <= set(PATTERN_KINDS)
    need(known, f"{flag} takes {','.join(PATTERN_KINDS)} or none, not {','.join(sorted(kinds))!r}")
    return tuple(kind for kind in PATTERN_KINDS if kind in kinds)


# --- 1 pattern -------------------------------------------------------------------------------
#
# imitative   `Question:` or `Answer:` stands in the text, in this spelling; or a special token other
#             than end-of-text (`<|im_start|>`) ended the path (filters.verdict).
# options     Lists two or more different options back, by label: (A) and (B) with at most LABEL_WORDS
#             words, no verb of PROSE and no sentence end between them, option texts aside; or by text:
#             three option texts, or two that fill a sentence or line of their own, with only commas,
#             `or`, `and`, articles, labels or line breaks between them. So `(B) is wrong, (C) fits`
#             and `a bank or a mall has one` are prose. For a yes/no question: `yes or no`, `yes/no`.
# direct      The whole text states an answer: optional `The answer is` or `It is` and a hedge, then
#             yes or no, a label, an option's text, or label and text. Known at the end only: a
#             second sentence may still come.
#
# Where answers are free there are no options to list, and direct is a text that is nothing but an
# answer statement.

_IMITATIVE = re.compile(r"Question:|Answer:")
LABEL_WORDS = 8
LIST_REACH = 200  # characters between two labels, or the starts of two texts, of one list
PROSE = re.compile(
    r"\b(?:is|are|was|were|be|isn['’]t|aren['’]t|would|could|should|can|cannot|can['’]t|will|won['’]t"
    r"|may|might|must|has|have|had|does|do|did|doesn['’]t|don['’]t|seems?|makes?|because|since|if|than"
    r"|not|which|that|it|they|he|she|you|so|but)\b|[.!?](?=\s)",
    re.I,
)
_TAIL = re.compile(r"""["'”’)\]*_]*(?:[.!?]+["'”’)\]]*\s|[^\S\n]*\n)""")  # .. and after it
_TAIL_AT_END = re.compile(r"""["'”’)\]*_]*[.!?]*["'”’)\]]*\s*\Z""")
# The character that shows that a word is over. U+FFFD does not: it may be half a letter.
_AFTER = r"(?=(?P<after>[^\w'’\ufffd-]|\Z))"
_YES_OR_NO = re.compile(
    rf"""\b(?:yes["'”’]?\s*(?:/|,?\s?or\b)\s*["'“‘]?no|no["'”’]?\s*(?:/|,?\s?or\b)\s*["'“‘]?yes){_AFTER}""",
    re.I,
)


class _Patterns(NamedTuple):
    """Regular expressions for a question's options."""

    label: re.Pattern  # (B)
    gap: re.Pattern  # what may stand between two listed texts
    mark: re.Pattern  # (B)  B.  2)  before a listed text
    lead: re.Pattern  # what stands before a list that fills a sentence or line
    option: re.Pattern  # any option's text
    pair: re.Pattern  # two of them as in a list: a cheap first look
    each: list[re.Pattern]  # one for each different text as whole words
    direct: re.Pattern  # a direct answer


@functools.lru_cache(512)
def _patterns(choices: tuple[str, ...]) -> _Patterns:
    letters = LETTERS[: max(5, len(choices))]
    letters += letters.lower()
    mark = rf"[(\[]?[{letters}\d][).\]:]"
    # Short, so that no run of spaces is slow.
    gap = rf"""(?:[\s"'“”‘’*_,;/|.•-]|\b(?:and/or|and|or|an?|the)\b|{mark}){{1,12}}"""
    lead = rf"""(?:\A|[.!?:]|\n|\b(?:options|choices)\ are\b)
        (?:{mark}|[\s"'“”‘’)\]*_•-]|\b(?:either|an?|the)\b)*+\Z"""
    words = words_pattern(choices)
    different = sorted({" ".join(c.lower().split()) for c in choices} - {""})
    label = rf"[(\[]?[{letters}][)\]]?[.:]?"
    text = rf"yes|no|(?:(?:an?|the)\s)?(?:{words})"
    direct = (
        r"(?:(?:so|thus|therefore|hence),? )?"
        r"(?:(?:the (?:\w+ )?answer(?: is|:)|it is|it['’]s)[:,]? )?"
        rf"(?:(?:{HEDGES}) )?(?:(?:option|choice) )?"
        rf"(?:{label}(?:[ :,–-]{{0,3}}(?:{text}))?|{text})[)\].!?]*"
    )
    return _Patterns(
        re.compile(rf"\(([{letters}])\)"),
        re.compile(gap, re.I),
        re.compile(rf"(?<![^\W_]){mark}", re.I),
        re.compile(lead, re.X | re.I),
        re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.I),
        re.compile(rf"(?<!\w)(?:{words}){gap}(?:{words})", re.I),
        [re.compile(rf"(?<!\w){words_pattern([t])}{_AFTER}", re.I) for t in different],
        re.compile(direct, re.I),
    )


def pattern_break(
    text: str, question: Question, kinds: Sequence[str] = PATTERN_KINDS, final: bool = True
) -> str | None:
    """The kind of pattern that `text` breaks first, if any. With `final=False` more text may follow,
    and a kind is named only if every continuation breaks it: so rows can be ended early. (Verdicts
    are made from whole tokens, by `broken_kinds`.)"""
    return earliest(pattern_breaks(text, question, final), kinds) or None


def pattern_breaks(text: str, question: Question, final: bool = True) -> dict[str, int]:
    """For each kind that `text` breaks, the length of the shortest beginning that breaks it."""
    breaks = {}
    if m := _IMITATIVE.search(text):
        breaks["imitative"] = m.end()
    ends = [_label_list_end(text, question), _text_list_end(text, question, final)]
    ends = [end for end in ends if end is not None and not question.free]
    if ends:
        breaks["options"] = min(ends)
    if final and _is_direct(text, question):
        breaks["direct"] = len(text)
    return breaks


def broken_kinds(
    token_bytes: Sequence[bytes], question: Question, final: bool = True
) -> dict[str, int]:
    """For each kind that a path's tokens break, the index of the token that breaks it: the same as
    looking after every token."""
    breaks = pattern_breaks(decode(token_bytes), question, final)
    complete = characters_complete(token_bytes) if breaks else []
    return {kind: bisect_right(complete, end - 1) for kind, end in breaks.items()}


def earliest(breaks: dict[str, int], kinds: Sequence[str]) -> str:
    """The kind of `kinds` that is broken first, "" if none is; at one place the kinds go in the
    order of PATTERN_KINDS."""
    chosen = [kind for kind in PATTERN_KINDS if kind in kinds and kind in breaks]
    return min(chosen, key=breaks.__getitem__, default="")


def _label_list_end(text: str, question: Question) -> int | None:
    p = _patterns(question.choices)
    labels = list(p.label.finditer(text))
    for a, b in zip(labels, labels[1:]):
        between = text[a.end() : b.start()]
        if a[1].upper() == b[1].upper() or len(between) > LIST_REACH:
            continue
        rest, n_texts = p.option.subn("", between)
        rest = rest.strip(" .") if n_texts else rest
        if len(rest.split()) <= LABEL_WORDS and not PROSE.search(rest):
            return b.end()
    return None


def _text_list_end(text: str, question: Question, final: bool) -> int | None:
    if not question.choices:
        m = _YES_OR_NO.search(text)
        return m.end("after") if m and (m["after"] or final) else None
    p = _patterns(question.choices)
    if not p.pair.search(text):
        return None
    spans = sorted(
        (m.start(), m.end(), option)
        for option, pattern in enumerate(p.each)
        for m in pattern.finditer(text)
        if m["after"] or final
    )
    # Which options a list ending at each span can hold; `alone`: lists that begin a sentence or
    # line. Overlapping texts (bus, bus stop) both count: so a longer text never mends a list.
    listed, alone, ends = [], [], []
    for j, (start, end, option) in enumerate(spans):
        window = text[max(0, start - 60) : start]
        begins = p.lead.search(window if start <= 60 else "x" + window)
        listed.append({option})
        alone.append({option} if begins else set())
        marked = False
        for i in range(j - 1, -1, -1):
            if start - spans[i][0] > LIST_REACH:
                break
            gap = text[spans[i][1] : start]
            if not gap or not p.gap.fullmatch(gap):
                continue
            listed[j] |= listed[i]
            if alone[i]:
                alone[j] |= alone[i] | {option}
            marked |= spans[i][2] != option and bool(p.mark.search(gap))
        if len(listed[j]) >= 3 or marked:
            ends.append(min(end + 1, len(text)))
        if len(alone[j]) >= 2:
            if tail := _TAIL.match(text, end):
                ends.append(tail.end())
            elif final and _TAIL_AT_END.match(text, end):
                ends.append(len(text))
    return min(ends, default=None)


def _is_direct(text: str, question: Question) -> bool:
    if question.free:
        return strip_answer_sentence(text) == ("", True)
    plain = " ".join(re.sub(r"""["“”‘*_`]""", "", text).split()).strip("' ")
    return len(plain) < 500 and bool(_patterns(question.choices).direct.fullmatch(plain))


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
