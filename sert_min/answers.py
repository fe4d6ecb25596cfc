"""How an answer is read out of a text, and how closing answer statements are taken off it."""

import functools
import re
import unicodedata
from fractions import Fraction

from sert_min.questions import LETTERS, Question

# `.`, `!` or `?` with closing quotes or brackets, before white space or the end of the text
SENTENCE_END = re.compile(r"""[.!?]["'”’»)\]}]*(?=\s|\Z)""")
_SENTENCE_START = re.compile(r"""(?:(?<!\b[A-Z])[.!?]["'”’»)\]}]*\s+|\n\s*)(?=\W{0,9}\w)""")

# --- strict, the headline: what stands right after the LAST `the answer is` -------------------
#
#   yes. / **NO** / most likely (C)         yes, no, C   a hedge of the closed list HEDGES
#   (c) mall / [C] / option C / C, as ..    C   a letter in brackets, or before punctuation, the end
#                                               or `as`; B-E before any word: A may be an article
#   the mall / Mall. / to relax             C   an option's text in whole words, longest first
#   (C) mall or (B) library                 C   the one that stands right after the words
#   the text of two options / yes or no     -   two answers are none
#   no one / no longer / not (C) / unknown  -   never guessed

_THE_ANSWER_IS = re.compile(r"\bthe\s+answer\s+is\b", re.I)
HEDGES = (
    "probably|most probably|likely|most likely|very likely|more likely|almost certainly|certainly"
    "|definitely|surely|clearly|obviously|simply|actually|usually|generally|typically|technically"
    "|also|still|then|therefore|thus|indeed|in fact|of course|i think|a resounding|a definite"
)
_SKIP = re.compile(  # one step over what may stand between `the answer is` and the answer
    r"""[\s:;,…"'“”‘’«`*_#>=$(\[{–—-]|\.\.+|(?:the\s+)?(?:correct\s+)?(?:option|choice|letter)\b"""
    rf"|(?:{HEDGES})\b".replace(" ", r"\s+"),
    re.I,
)
_END_OF_WORD = r"(?!\w)(?!['’-]\w)"
_YES_NO = re.compile(  # not `no longer`, and not `yes or no`
    rf"(yes|no){_END_OF_WORD}"
    r"(?!\s+(?:one|longer|more|less|fewer|doubt|matter|way|single|different|idea)\b)"
    r"(?!\s*(?:/|and\b|or\b)\s*(?:yes|no)\b)",
    re.I,
)


def extract_answer(text: str, question: Question) -> str | None:
    """The canonical answer that `text` states last, by the strict rules above, or None."""
    stated = stated_answers(text, question)
    return stated[-1] if stated else None


def stated_answers(text: str, question: Question) -> list[str | None]:
    """What each `the answer is` of `text` states, read strictly; None where it states nothing."""
    return [_answer_right_after(text, m.end(), question) for m in _THE_ANSWER_IS.finditer(text)]


def _answer_right_after(text: str, at: int, question: Question) -> str | None:
    if question.free:
        return free_answer(text[at : at + 1000 + 2 * len(question.answer)], question.answer)
    found = _answer_at(text, at, question)
    while found is None and (skip := _SKIP.match(text, at)):
        at = skip.end()
        found = _answer_at(text, at, question)
    return found or None


def _answer_at(text: str, at: int, question: Question) -> str | None:
    """The answer that stands exactly at `at`; "" for the text of two options; None for nothing."""
    if not question.choices:
        m = _YES_NO.match(text, at)
        return m and m[1].lower()
    bracketed, option, bare, letter_of = _option_rules(question.choices)
    if m := bracketed.match(text, at):
        return m[1].upper()
    if m := option.match(text, at):
        return letter_of.get(_normal(m[1]), "")
    m = bare.match(text, at)
    return m and m[0].upper()


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def words_pattern(texts) -> str:
    """A regex for any of `texts` (longest first, any white space between words); never empty."""
    texts = sorted({_normal(t) for t in texts} - {""}, key=lambda t: (-len(t), t))
    return "|".join(r"\s+".join(map(re.escape, t.split())) for t in texts) or r"(?!)"


@functools.lru_cache(512)
def _option_rules(choices: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern, re.Pattern, dict]:
    """(`(C)`, the text of an option, `C.`, normalised text -> letter or "" where two share it)."""
    letters, words = LETTERS[: len(choices)], words_pattern(choices)
    any_case = letters + letters.lower()
    letter_of: dict[str, str] = {}
    for letter, text in zip(letters, map(_normal, choices)):
        letter_of[text] = "" if text in letter_of else letter
    stop = r"""[)\]}:]|[.,;!?"'”’*]+(?!\w)|\s*\Z|[^\S\n]*\n|\s+[(=–—-]"""
    reason = r"(?<![Ii])\s+(?i:because|since|as|for|which|that|or|and|is)\b"
    bare = rf"[{any_case}](?={stop}|{reason})"
    if safe := letters[1:].replace("I", ""):  # before a word, A and I may be English words
        bare += rf"|[{safe}](?![\w.'’-])"
    bracketed = rf"[(\[{{]\s*([{any_case}])\s*[)\]}}]"
    option = re.compile(rf"(?:(?:an?|the|to)\s+)?({words}){_END_OF_WORD}", re.I)
    return re.compile(bracketed), option, re.compile(bare), letter_of


# --- free answers: a number or a text, to the end of the sentence -----------------------------------
#
#   gold 30: 30 / $30.00. / 5 x 6 = 30 / 30 apples    right, by value; 1,000 = 1000, 0.5 = 1/2
#   gold 30: 2 or 30 / not 30 / 30-40 / 3:30          -   two numbers, or none
#   gold Eiffel Tower: the "Eiffel tower".            right, as SQuAD compares: without case, articles
#                                                     and punctuation

_STATEMENT_END = re.compile(
    rf"{SENTENCE_END.pattern}|\n|[,;]?\s+\(?(?:because|since|as|which)\b|\}}", re.I
)
_NUMBER = re.compile(r"(?<![\w-])[-+]?\.?\d(?:[\d.,:/^-]*\d)?(?:e[-+]?\d{1,2}\b)?", re.I)
_VALUE = re.compile(
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[-+]?\d+)?|\d+/0*[1-9]\d*)", re.I
)
_DASHES = str.maketrans("−–⁄", "--/")


def number_in(text: str, alone: bool = False) -> Fraction | None:
    """The value of the only number in a text; None if there is none or several. With `alone` nothing
    but a currency sign or `%` may stand beside it."""
    text = unicodedata.normalize("NFKC", text[:500]).translate(_DASHES).rpartition("=")[2]
    found = [m[0] for m in _NUMBER.finditer(text)]
    if (
        len(found) != 1
        or not _VALUE.fullmatch(found[0])
        or re.search(r"\bnot\b|n['’]t\b", text, re.I)
    ):
        return None
    beside = text.replace(found[0], "", 1).strip(" $€£%")
    return None if alone and beside else Fraction(found[0].replace(",", ""))


def plain_answer(text: str) -> str:
    """A free answer as answers are compared: SQuAD's normal form (arXiv 1606.05250)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    bare = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)|_", "", text)  # 3:30 keeps its colon
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split()) or " ".join(text.split())


def free_answer(text: str, gold: str) -> str | None:
    """What `text`, which stands behind `the answer is`, states: `gold` if it is that value or text,
    else what stands there; None for nothing, and for no number where `gold` is one."""
    text, value = text.lstrip(" \t:*_`\"'“"), number_in(gold, alone=True)
    ends = [m.start() for m in _STATEMENT_END.finditer(text)] + [len(text)]
    said = text[: ends[0]].strip()
    if value is not None:
        found = number_in(said)
        return gold if found == value else None if found is None else str(found)
    for end in ends[: 1 + len(_STATEMENT_END.findall(gold))]:  # `St. Louis` holds an end
        if plain_answer(text[:end]) == plain_answer(gold):
            return gold
    return plain_answer(said) or None


# --- answer statements: read from a teacher, by the lenient metric, and stripped ---------------
#
# The answer stands right behind what one of FORMS matches and is read by the strict rules, through
# Markdown, LaTeX and full-width letters. The LAST statement of a text counts:
#
#   (A) has none. The correct choice would be **C**.       C   a first mention never counts
#   So the answer is not (B) but (C).                      C   a correction; without `but`: -
#   (C) fits. / It must be (C). / I would say no.          -   discussions say so of any option
#   The answer can't be (A). / is unclear. / is (A)?       -   a statement of nothing
#   Some say the answer is no. / If so, it would be no.    -   doubted or hypothetical
#   The answer is yes. Wait, dogs can't fly.               -   taken back; or it asks a new question

_GOOD = r"(?:(?:final|correct|right|best|closest|short|true|logical|likely|most \w+) )"
_NOUN = rf"(?:{_GOOD}*answer(?: choice| option)?|{_GOOD}+(?:choice|option))"
# A clause begins here. A line does, too, also below one without a full stop.
_OPENS = r"(?:(?<![^\W_])(?<!\w[^\S\n])|(?<=\bso\s)|(?<=\b(?:thus|then|that)\s)|(?<=fore\s))"
_NAME = rf"(?:(?:the|my|your|our|its) |{_OPENS}){_NOUN}(?: ?\([^)\n]{{0,40}}\))?"
_ABOUT = (  # the answer `to your question` is; the answer`, then,` is
    r"(?: (?:to|of|for|from|among|in|here|that|i|you)\b(?:(?!\b(?:depends|if|whether|that question)\b)"
    r"[^.!?\n]|\?[\"'”’]){0,160}?|, \w+,)?"
)
_IS = r"(?:['’]s\b| (?:is|was|would be|will be)\b| (?:is|was|can|could|must)(?= ?(?:not|n?['’]t)))"
_TEXT = r"(?:(?!\b(?:but|and|or|so|as|since|because|that|than|not|has)\b|n['’]t)[^.!?;\n()]){0,40}?"
_LABEL = rf"\([a-z]\){_TEXT}|(?:(?<=\boption\s)|{_OPENS})(?:[A-Z]|yes|no)\b\W{{0,3}}?"
FORMS = {  # the words that introduce an answer; a space may also be Markdown
    "So the most likely answer is (C)": _NAME + _ABOUT + _IS,
    "**Final answer (A to E):** C": rf"(?<!/){_NAME}[\s*_`\"']{{0,4}}(?:[:：=]|-?>)",
    "### Answer\n\n**C**": rf"^[#*_]{{0,6}}\x20?{_NOUN}[#*_]{{0,6}}(?=\r?\n)",
    r"$\boxed{\text{C}}$": r"\\f?boxed\s?\{",
    "So, to answer your question, (C).": r"(?:to|in) answer (?:to )?(?:the|this|your|our) question"
    r"[,:]? (?=\W{0,3}(?:yes|no)\b|\()",
    "(C) mall is the right answer": rf"(?=(?:{_LABEL}) (?:is|would be)(?: (?!not|never)\w+)? the "
    rf"(?:{_GOOD}*answer|{_GOOD}+(?:choice|option))\b)",  # nothing: the answer itself comes first
}
_STARTS = r"(?<![^\W_])(?=\w|\([a-z]\)|\\|^[#*_])"  # so most places are passed quickly
_ANY_FORM = re.compile(
    rf"{_STARTS}(?:{'|'.join(FORMS.values())})".replace(" ", r"(?:[\s*_`#]{1,8})"), re.I | re.M
)
_PLAIN = {i: chr(i - 0xFEE0) for i in range(0xFF01, 0xFF5F)}  # full-width letters
_PLAIN |= str.maketrans("。【】", ".[]", "*_`#~\u200b")
_LATEX = re.compile(r"\\(?:text|math)[a-z]*|\\[()\[\]]")
_NOT_BUT = re.compile(r"\A\W*not (?!only)[^.;!?\n]{1,80}?,? but(?: rather)?\b", re.I)
_DOUBT = re.compile(  # in `words before \0 the form \0 rest of the sentence`
    r"""(?:\b(?:if|whether|unless|suppose|assum\w+|imagine|may|might|could|doubt|neither|nor|otherwise
            |(?:which|that)\ case|says|said|thought|guess|initially|at\ first|wrong\ to|tempt\w+
            |mistake)\b
        |(?:\bnot|n['’]t)\ (?:\w+\ )?(?:mean|think|say|imply|sure|clear|certain|true)\b
        |\b(?:some|others|people|many|one)\ (?:\w+\ )?(?:say|think|argue|believe)\b)
        (?:(?!\b(?:so|thus|hence|therefore|then|but|because|since|and)\b)[^,;:\0])*\0
    |\bif\b[^\0]*(?:\bthen\ \0|\0[^\0]*would\ be\0)|would\ be\0.*\bif\b|\?\Z
    |\0[^\0]*\0[^,;:–—-]*\b(?:if|unless)\b
    |\0[^\0]*\0\W*[a-z]\)?(?:\s+(?!as|since|because)\w+){0,3}?
        \s+is(?:n['’]t|\ not|\ wrong|\ incorrect)""",
    re.I | re.X,
)
_TAKEN_BACK = re.compile(  # behind the end of a sentence or a dash
    r"[.!?\n(…–—-]\s{0,8}(?:but |or )?(?:wait|hmm|actually|correction|sorry|rather|on second)\b",
    re.I,
)
_NEXT_QUESTION = re.compile(r"^\W{0,4}(?:Q|Question)(?: \d+)?\W{0,3}[:：]", re.I | re.M)


def stated_answer(text: str, question: Question) -> str | None:
    """The canonical answer that `text` states last, or None."""
    found = list(_ANY_FORM.finditer(text))
    if not found or _TAKEN_BACK.search(text, found[-1].end()):
        return None
    again = _NEXT_QUESTION.search(text, found[0].end(), found[-1].start())
    return None if again else _said(text, found[-1], question)


def _said(text: str, form: re.Match, question: Question) -> str | None:
    before = re.split(r"[.!?\n]", text[max(0, form.start() - 120) : form.start()])[-1]
    after = _LATEX.sub("", text[form.end() : form.end() + 500].translate(_PLAIN)).lstrip()
    rest = re.match(r"[^.!?\n]{0,120}[.!?]?", after)[0]
    if _DOUBT.search(f"{before}\0{form[0]}\0{rest}"):
        return None
    return _answer_right_after(_NOT_BUT.sub("", after), 0, question)


def leading_answer(text: str, question: Question) -> str | None:
    """The canonical answer with which `text` begins (`No, ..`, `(C) ..`, an option's text), or None;
    always None where answers are free."""
    return None if question.free else _answer_right_after(text, 0, question)


SHORT = 25  # words; a longer output discusses the options before it answers
_NO = re.compile(r"\b(?:yes\b|no\b(?=\s*(?:[^\w\s]|\Z)))", re.I)  # `no dog` is a determiner


def extract_lenient(text: str, question: Question) -> str | None:
    """The strict answer; else the last statement of any form; else, only in an output of at most
    SHORT words without a statement, the first mention of an answer."""
    if (answer := extract_answer(text, question)) or _ANY_FORM.search(text):
        return answer or stated_answer(text, question)
    if len(text.split()) > SHORT:
        return None
    if question.free:
        return _answer_right_after(text, 0, question)
    words = (_NO if not question.choices else re.compile(r"(?<![\w'’])[\w(\[]")).finditer(text)
    return next(filter(None, (_answer_at(text, m.start(), question) for m in words)), None)


_CLAUSE = re.compile(  # "10 kg is less, so the answer is no" keeps its reasoning
    r"(?<=[\w.)\]\"'”’*%])(?:;|[,;:]?\s+(?:[-–—]\s+)?"
    r"(?:(?:and\s+)?(?:so|thus|hence|therefore)|and|which\s+means),?)[\s*_`\"“]+(?:that\s+)?\Z",
    re.I,
)
_TO_ANSWER = re.compile(rf"(?:{_SKIP.pattern})*", re.I)


def strip_answer_sentence(text: str) -> tuple[str, bool]:
    """(text without the answer statements that close it, whether there was one).

    Only the end is touched: an `the answer is` with reasoning after it stays. A sentence goes
    whole, a clause without the reasoning in front of it: `10 kg is less, so the answer is no.` ->
    `10 kg is less.`
    """
    text, clause = text.strip(), None
    end = len(text)
    found = [(m.start(), _TO_ANSWER.match(text, m.end()).end()) for m in _ANY_FORM.finditer(text)]
    starts = [0, *(m.end() for m in _SENTENCE_START.finditer(text))]
    while found and starts and found[-1][1] >= starts[-1]:
        first, _ = found.pop()
        if first >= end:  # it went with another one
            continue
        while starts[-1] > first:
            starts.pop()
        near = max(starts[-1], first - 40)
        clause = _CLAUSE.search(text[near:first])
        end = near + clause.start() if clause else starts.pop()
    rest = text[:end].rstrip()
    return rest + ("." if clause and rest[-1] not in ".!?" else ""), end < len(text)


# How models mark their thinking: <think>, [THINK], <|START_THINKING|>, the channels of Harmony (its
# special tokens dropped: `analysis..assistantfinal..`). A group matches where the thinking is over.
_THINKING = re.compile(
    r"""[<\[◁]\|?(/|END_)?(?:START_|seed:)?(?:think(?:ing)?|thoughts?)\|?[>\]▷]
    |<\|channel\|>\s*(final)\b[^\n]{0,40}?<\|message\|>|(assistantfinal)
    |<\|(?:start|channel|end|return)\|>|\A\s*analysis(?=[A-Za-z])""",
    re.I | re.X,
)


def without_thinking(text: str) -> str:
    """What a reasoning model says behind its thinking. Thinking that was cut off leaves nothing."""
    start, stop = 0, None
    for m in _THINKING.finditer(text):
        if m.lastindex:
            start, stop = m.end(), None
        elif stop is None:
            stop = m.start()
    return text[start:stop]
