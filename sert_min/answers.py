"""How an answer is read out of a text, and how a closing answer sentence is taken off it."""

import functools
import re
from typing import NamedTuple

from sert_min.questions import LETTERS, Question

# --- sentences -------------------------------------------------------------------------------

# `.`, `!` or `?` with closing quotes or brackets, before white space or the end of the text
SENTENCE_END = re.compile(r"""[.!?]["'”’»)\]}]*(?=\s|\Z)""")

_ANSWER_IS = re.compile(
    r"""\b(?:the|your|my|our|its)\ (?:\w+\ ){0,2}answer     # the (most likely) answer
        (?:\ (?:to|of|for|here)\b[^.!?\n]{0,160}?)?          # .. to your question
        \ (?:is|was|would\ be|will\ be)\b""",
    re.IGNORECASE | re.VERBOSE,
)
# ", so the answer is no, he could not" goes alone; the reasoning before it stays
_CLAUSE = re.compile(r"[,;:]?\s+(?:[-–—]\s+)?(?:and\s+)?(?:so|thus|hence|therefore),?\s+\Z", re.I)
_SENTENCE_START = re.compile(r"""(?<!\b[A-Z])[.!?]["'”’»)\]}]*\s+|\n\s*""")


def strip_answer_sentence(text: str) -> tuple[str, bool]:
    """(text without the answer sentences that close it, whether there was one).

    Only the end is touched: an `the answer is` with reasoning after it stays. A clause goes
    without the reasoning in front of it: `10 kg is less, so the answer is no.` -> `10 kg is less.`
    """
    text, had_one = text.strip(), False
    starts = [0, *(m.end() for m in _SENTENCE_START.finditer(text))]
    while text:
        while starts[-1] >= len(text):  # of what is gone
            starts.pop()
        start = starts[-1]
        statement = _ANSWER_IS.search(text, start)
        if not statement:
            break
        had_one = True
        before = text[start : statement.start()]
        clause = _CLAUSE.search(before)
        if clause and before[: clause.start()].strip():
            text = text[: start + clause.start()].rstrip()
            text += "" if text[-1] in ".!?" else "."
        else:
            text = text[:start].rstrip()
    return text, had_one


# --- reading an answer -----------------------------------------------------------------------
#
# Strict, the headline: what stands right after the LAST `the answer is`.
#
#   text after `the answer is`            reads as   because
#   yes. / Yes, it is / **NO** / ":\n\nNo" yes, no   case and punctuation do not matter
#   probably yes / most likely (C)        yes, C     a hedge of the closed list HEDGES
#   (C) / (c) mall / [C] / {C}            C          a letter in brackets, any case
#   C. / c / C because / C is right       C          a letter before punctuation, the end or a
#                                                    word of AFTER_LETTER, any case
#   C mall / option C                     C          B-E in upper case before any word
#   the mall / Mall. / to relax           C          an option's text as whole words, longest first
#   (B) library, though that is (C)'s     B          a letter in brackets goes before a text
#   a / A place / a place                 -          `a` before another word is an article
#   the text of two options               -          not unique
#   no one / no longer / no doubt         -          a word, not an answer (NOT_NO)
#   (A) mall or (B) library / (A), (B)    A          the one that stands right after the words
#   yes and no / yes or no / yes/no       -          two answers are none
#   either (A) or (B)                     -          nothing stands right after
#   not (C) / unknown / nothing at all    -          never guessed
#
# Lenient, shown beside it: strict where that reads something; else the first answer word after
# the last `the answer is`; else the first one anywhere. Answer words are `yes` anywhere, `no`
# before punctuation or the end (before a word it is a determiner: `no dog`), `(C)`, `option C`,
# `C.`, the text of one option, and a bare letter that opens the text.

_THE_ANSWER_IS = re.compile(r"\bthe\s+answer\s+is\b", re.IGNORECASE)
HEDGES = (
    "probably|most probably|likely|most likely|very likely|more likely|almost certainly|certainly"
    "|definitely|surely|clearly|obviously|simply|actually|usually|generally|typically|technically"
    "|also|still|then|therefore|thus|indeed|in fact|of course|i think|a resounding|a definite"
)
NOT_NO = "one|longer|more|less|fewer|doubt|matter|way|single|different|idea"
AFTER_LETTER = "because|since|as|for|which|that|or|and|is"
_HEDGE = HEDGES.replace(" ", r"\s+")
_SKIP = re.compile(  # one step over what may stand between `the answer is` and the answer
    r"""[\s:;,…"'“”‘’«`*_#>=$(\[{–—-]|\.\.+|(?:the\s+)?(?:correct\s+)?(?:option|choice|letter)\b"""
    rf"|(?:{_HEDGE})\b",
    re.IGNORECASE,
)
_END_OF_WORD = r"(?!\w)(?!['’-]\w)"
_YES_NO = re.compile(
    rf"(yes|no){_END_OF_WORD}(?!\s+(?:{NOT_NO})\b)(?!\s*(?:/|and\b|or\b)\s*(?:yes|no)\b)",
    re.IGNORECASE,
)
_SPACE = re.compile(r"""[\s:.,)*"'–-]{0,5}""")
_LENIENT_YES_NO = re.compile(r"\b(?:(yes)\b|(no)\b(?=[\s]*(?:[^\w\s]|\Z|\n)))", re.IGNORECASE)


def extract_answer(text: str, question: Question) -> str | None:
    """The canonical answer that `text` states last, by the strict rules above, or None."""
    stated = stated_answers(text, question)
    return stated[-1] if stated else None


def stated_answers(text: str, question: Question) -> list[str | None]:
    """What each `the answer is` of `text` states, read strictly; None where it states nothing."""
    return [_answer_right_after(text, m.end(), question) for m in _THE_ANSWER_IS.finditer(text)]


def extract_lenient(text: str, question: Question) -> str | None:
    """The canonical answer by the lenient rules above, or None."""
    starts = [m.end() for m in _THE_ANSWER_IS.finditer(text)]
    return (
        extract_answer(text, question)
        or (_first_answer(text[starts[-1] :], question) if starts else None)
        or _first_answer(text, question)
    )


def _answer_right_after(text: str, at: int, question: Question) -> str | None:
    found = _answer_at(text, at, question)
    while not found and (skip := _SKIP.match(text, at)):
        at = skip.end()
        found = _answer_at(text, at, question)
    return found[0] if found else None


def _answer_at(text: str, at: int, question: Question) -> tuple[str | None, int] | None:
    """(answer, where it ends) if one stands exactly at `at`; the answer None if ambiguous."""
    if not question.choices:
        m = _YES_NO.match(text, at)
        return (m[1].lower(), m.end()) if m else None
    rules = _option_rules(question.choices)
    if m := rules.bracketed.match(text, at):
        return m[1].upper(), _after_own_text(text, m.end(), m[1].upper(), rules)
    if m := rules.text.match(text, at):
        return rules.letter_of.get(_normal(m[1])), m.end()
    if m := rules.bare.match(text, at):
        return m[0].upper(), _after_own_text(text, m.end(), m[0].upper(), rules)
    return None


def _after_own_text(text: str, at: int, letter: str, rules: "_OptionRules") -> int:
    """Where `(C) mall` ends: what follows a letter and is its option's text belongs to it."""
    m = rules.text.match(text, _SPACE.match(text, at).end())
    return m.end() if m and rules.letter_of.get(_normal(m[1]), letter) in (letter, None) else at


def _first_answer(text: str, question: Question) -> str | None:
    if not question.choices:
        m = _LENIENT_YES_NO.search(text)
        return m[0].lower() if m else None
    rules = _option_rules(question.choices)
    opening = rules.bare.match(text.lstrip())
    if opening:
        return opening[0][0].upper()
    for m in rules.anywhere.finditer(text):
        *letters, words = m.groups()
        letter = next(filter(None, letters), None) or rules.letter_of.get(_normal(words))
        if letter:
            return letter.upper()
    return None


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def words_pattern(texts) -> str:
    """A regex for any of `texts` (longest first, any white space between words); never empty."""
    texts = sorted({_normal(t) for t in texts} - {""}, key=lambda t: (-len(t), t))
    return "|".join(r"\s+".join(map(re.escape, t.split())) for t in texts) or r"(?!)"


class _OptionRules(NamedTuple):
    bracketed: re.Pattern  # (C)
    text: re.Pattern  # the text of an option, an article allowed
    bare: re.Pattern  # C.
    anywhere: re.Pattern  # lenient: any of them, wherever
    letter_of: dict[str, str | None]  # normalised text -> letter, None where two options share it


@functools.lru_cache(512)
def _option_rules(choices: tuple[str, ...]) -> _OptionRules:
    letters, words = LETTERS[: len(choices)], words_pattern(choices)
    any_case = letters + letters.lower()
    letter_of: dict[str, str | None] = {}
    for letter, choice in zip(letters, choices):
        letter_of[_normal(choice)] = None if _normal(choice) in letter_of else letter
    bracketed = rf"[(\[{{]\s*([{any_case}])\s*[)\]}}]"
    stop = r"""[)\]}:]|[.,;!?"'”’*]+(?!\w)|\s*\Z|[^\S\n]*\n|\s+[(=–—-]"""
    bare = rf"[{any_case}](?={stop}|\s+(?i:{AFTER_LETTER})\b)"
    if letters[1:]:  # an upper-case A before a word may be an article, B to E may not
        bare += rf"|[{letters[1:]}](?![\w.'’-])"
    anywhere = (
        rf"{bracketed}|\b(?i:option|choice)\s+([{any_case}])\b|\b([{letters}])[.):](?!\w)"
        rf"|\b((?i:{words})){_END_OF_WORD}"
    )
    return _OptionRules(
        re.compile(bracketed),
        re.compile(rf"(?:(?:an?|the|to)\s+)?({words}){_END_OF_WORD}", re.IGNORECASE),
        re.compile(bare),
        re.compile(anywhere),
        letter_of,
    )
