"""The filter rules: labelled strings, hand-computed numbers, and the properties that early
rejection stands on. Each test names the bug it guards."""

import doctest
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sert_min import answers, filters, patterns
from sert_min.filters import FilterSettings, judge_path
from sert_min.io.errors import SertError
from sert_min.patterns import break_token, pattern_break
from sert_min.questions import Question

CHOICES = ("bank", "library", "department store", "mall", "new york")
FIVE = Question("commonsense_qa", "q", "Where is a revolving door of use?", "A", CHOICES)
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")

# (question, a sampled text, the verdict on it as a finished path)
LABELLED = [
    # Figure 2 of the paper, in wording of our own: imitative, options, direct, reasoning
    (FIVE, " The bank.\n\nQuestion: Where do people keep money?\nAnswer: In a bank.", "imitative"),
    (FIVE, " (A) bank, (B) library, (C) department store, (D) mall, (E) new york", "options"),
    (FIVE, " The answer is a library.", "direct"),
    (FIVE, " People carry money in and out, and the guards watch the door. So a bank.", None),
    # imitative
    (FIVE, "Question: What?", "imitative"),
    (FIVE, " Because it is safe.\nAnswer: bank", "imitative"),
    (YES_NO, " No.\n\nQuestion: Would a stone sink?", "imitative"),
    (YES_NO, " My Answer: no, since it floats.", "imitative"),
    (YES_NO, " The question is how dense it is. The answer depends on water.", None),
    (YES_NO, " The question: is it dense? Its density is below one, so it floats.", None),
    (FIVE, " Questions: none. It keeps the heat in, which a bank wants.", None),
    # options by label
    (FIVE, " (A) bank (B) library", "options"),
    (FIVE, " (B) or (C)", "options"),
    (FIVE, " (a) bank\n(b) library\n", "options"),
    (FIVE, " (A) a school, (B) a church, (C) a park. I would choose the church.", "options"),
    (FIVE, " (A) bank. (B) library. (C) mall. All of them have doors.", "options"),
    (FIVE, " (A) a busy bank. (B) a quiet library. I know both.", "options"),
    (FIVE, " A. bank\nB. library\nC. mall", "options"),
    (FIVE, " A) bank B) library", "options"),
    (FIVE, " 1. bank 2. library", "options"),
    (YES_NO, " (A) yes (B) no", "options"),
    (YES_NO, " (A) sinks, (B) floats", "options"),
    (FIVE, " (B) is wrong because libraries are quiet, and so (A) is the one that fits.", None),
    (FIVE, " I think (A) fits, as it keeps money safe and the guards can watch people.", None),
    (FIVE, " (B) library (B) library (B) library", None),
    (FIVE, " (A) at the corner of the old street near the river, (B) by the park", None),
    (FIVE, " A bank (A) has guards. They would not like two open doors. Thus (A).", None),
    (FIVE, " (A) is safe. People bring money there every day of the week. (B) is not.", None),
    # options by text
    (FIVE, " bank, library, department store, mall, new york", "options"),
    (FIVE, " bank library mall", "options"),
    (FIVE, " Bank, library, or mall, they all have doors.", "options"),
    (FIVE, " It could be a bank, a library or a mall, and we must choose.", "options"),
    (FIVE, " bank, library", "options"),
    (FIVE, " A bank or a library.", "options"),
    (FIVE, " bank\nlibrary\nmall\nnew york\n", "options"),
    (FIVE, " - bank\n- library\n", "options"),
    (FIVE, " The options are bank and library. The first fits.", "options"),
    (FIVE, " I think so: bank, library.", "options"),
    (FIVE, ' "bank", "library", "mall"', "options"),
    (FIVE, " Department  Store / New York / Mall", "options"),
    (FIVE, " Bank. Library. Mall. New York.", "options"),
    (FIVE, " There is a door in every bank or library where people come and go.", None),
    (FIVE, " It has more use in the city, so a bank is more likely than a library.", None),
    (FIVE, " Unlike a library, a bank needs guards who can see everybody come in.", None),
    (FIVE, " A library is quiet. A bank is not. A mall is too large for such a door.", None),
    (FIVE, " Banks and libraries and malls have doors, and only one keeps money.", None),
    (FIVE, " The bank, the bank, the bank.", None),
    (FIVE, " They like the bank. Library. Library.", None),
    (FIVE, " A riverbank, library or mallard.", None),
    (YES_NO, " Yes or no", "options"),
    (YES_NO, " Yes/No. It floats.", "options"),
    (YES_NO, ' It is a simple "yes" or "no" thing.', "options"),
    (YES_NO, " Yes, no doubt, since it is light and a light thing floats.", None),
    # direct
    (YES_NO, " No", "direct"),
    (YES_NO, " Yes!\n", "direct"),
    (YES_NO, " The answer is no.", "direct"),
    (YES_NO, ' So the answer is probably "no".', "direct"),
    (FIVE, " (B)", "direct"),
    (FIVE, " B.", "direct"),
    (FIVE, " (D) mall.", "direct"),
    (FIVE, " D: mall", "direct"),
    (FIVE, " New York", "direct"),
    (FIVE, " It is a bank.", "direct"),
    (FIVE, " The best answer is option C.", "direct"),
    (FIVE, " Yes.", "direct"),
    (YES_NO, " No. It is less dense than water.", None),
    (YES_NO, " No, it floats.", None),
    (FIVE, " A bank is a place where people keep money", None),
    (FIVE, " The answer is (B) because it is quiet there.", None),
    (FIVE, " museum", None),
    (YES_NO, " North", None),
    (FIVE, "", None),
    # several kinds: the earliest decides
    (FIVE, " bank, library, mall\nQuestion: What?", "options"),
    (FIVE, " Question: bank, library, mall", "imitative"),
]


@pytest.mark.parametrize(("question", "text", "kind"), LABELLED)
def test_labelled_strings(question, text, kind):
    """Guards the definitions: prose that names options must stay, lists must go."""
    found = pattern_break(text, question)
    assert (found and found[0]) == kind


def test_a_kind_can_be_switched_off():
    """Guards: a kind that is off still hides another behind it."""
    text = " Question: bank, library, mall"
    assert pattern_break(text, FIVE, ("options", "direct"))[0] == "options"
    assert pattern_break(text, FIVE, ("direct",)) is None
    assert pattern_break(text, FIVE, ()) is None


def test_a_text_at_the_end_is_not_yet_a_word():
    """Guards early rejection of `mallard` at `mall`: only an ended text confirms the last word."""
    text = " bank, library, mall"
    assert pattern_break(text, FIVE, final=False) is None
    assert pattern_break(text, FIVE, final=True) == ("options", len(text))
    assert pattern_break(text + " x", FIVE, final=False) == ("options", len(text) + 1)
    assert pattern_break(text + "ard", FIVE, final=True) is None
    assert pattern_break(" No.", YES_NO, final=False) is None  # a second sentence may come


def test_ties_in_one_token_go_by_kind():
    """Guards a verdict that depends on characters inside a token, which a sampler never sees."""
    tokens = [b" bank,", b" library,", b" mall Question:"]
    assert break_token(tokens, FIVE) == ("imitative", 2)
    assert pattern_break(patterns.decode(tokens), FIVE)[0] == "options"
    assert break_token([b" bank, library, mall ", b"Question:"], FIVE) == ("options", 0)


def test_half_a_letter_does_not_end_a_word():
    """Guards U+FFFD at a cut inside a letter being taken for the end of `mall`."""
    tokens = [b" bank, library, mall", "é".encode()[:1], "é".encode()[1:]]
    assert break_token(tokens[:2], FIVE, final=False) is None
    assert break_token(tokens, FIVE) is None  # "mallé" is another word
    dash = [b" bank, library, mall", "—".encode()[:2], "—".encode()[2:], b" x"]
    assert break_token(dash, FIVE) == ("options", 2)


PIECES = st.sampled_from(
    ["bank", "library", "department store", "department", " store", "mall", "new york", "yes", "no"]
    + ["(A)", "(b)", "(C", ")", "A.", "B)", "Question", ":", "Answer:", "Question:", "the", " a "]
    + [
        " ",
        "\n",
        ", ",
        ". ",
        ".",
        "!",
        " or ",
        " and ",
        "/",
        "-",
        '"',
        "’",
        "is",
        "é",
        "—",
        "s",
        "1.",
    ]
    + ["The answer is ", "options are "]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=60)
OTHER = ("bus stop", "bus", "library", "stop", "yes (A)")
QUESTIONS = st.sampled_from(
    [
        FIVE,
        YES_NO,
        Question("commonsense_qa", "r", "", "A", OTHER),
        Question("x", "s", "", "A", ("",) * 5),
    ]
)


@settings(max_examples=600, deadline=None)
@given(TEXTS, TEXTS, QUESTIONS)
def test_a_break_is_never_mended(text, more, question):
    """Guards early rejection: a row that was stopped must be one that the full text drops too,
    with the same kind and position. 600 mixtures of the rules' own words."""
    found = pattern_break(text, question, final=False)
    if found:
        assert pattern_break(text + more, question, final=False) == found
        assert pattern_break(text + more, question, final=True) == found


@settings(max_examples=400, deadline=None)
@given(TEXTS, QUESTIONS)
def test_a_break_comes_as_early_as_possible(text, question):
    """Guards a position that lies behind the character that made the break certain."""
    found = pattern_break(text, question, final=False)
    if found:
        end = found[1]
        assert pattern_break(text[:end], question, final=False) == found
        assert pattern_break(text[: end - 1], question, final=False) is None


@settings(max_examples=400, deadline=None)
@given(TEXTS, QUESTIONS, st.lists(st.integers(1, 6), max_size=60))
def test_break_token_equals_looking_after_every_token(text, question, sizes):
    """Guards the map from characters to tokens, with letters split over tokens."""
    data, tokens = text.encode("utf-8", "surrogatepass"), []
    for size in sizes + [len(data)]:
        if data:
            tokens.append(data[:size])
            data = data[size:]
    first = None
    for n in range(1, len(tokens) + 1):
        breaks = patterns.pattern_breaks(patterns.decode(tokens[:n]), question, final=False)
        if breaks:
            first = (min(breaks, key=patterns.PATTERN_KINDS.index), n - 1)
            break
    found = break_token(tokens, question, final=False)
    assert found == first
    if first:
        assert break_token(tokens, question, final=True) == first
        assert break_token(tokens[: first[1] + 1], question, final=False) == first


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=4), max_size=20), st.integers(0, 1))
def test_trimming_arbitrary_bytes(tokens, start):
    """Guards crashes on bytes that are no text, and a cut in front of the path or behind it."""
    start = min(start, len(tokens))
    end = filters.trim_to_sentence(tokens, start)
    assert start <= end <= len(tokens)
    assert patterns.characters_complete(tokens)[-1:] in ([], [len(patterns.decode(tokens))])


def test_slow_texts():
    """Guards regexes that need minutes on a run of one character (the model does write them)."""
    for unit in (
        '"',
        "\n",
        " ",
        "bank ",
        "bank,",
        "(A) ",
        "a ",
        "the ",
        ". ",
        "A.",
        "yes or ",
        "*",
        "-",
    ):
        for question in (FIVE, YES_NO):
            text = "bank" + unit * 600
            pattern_break(text, question)
            answers.extract_answer("the answer is " + text, question)
            answers.extract_lenient(text, question)
            answers.strip_answer_sentence("the answer " + text)


# --- trimming, numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        ([" It", " rains", ".", " So", " we"], 3),
        ([" It", " rains", ".", " So", "."], 5),
        ([" He", " said", ' "', "no", '."', " Then"], 5),  # the closing quote belongs to it
        ([" It", " costs", " 3", ".", "5", " now"], 6),  # no white space after the full stop
        ([" no", " sentence"], 2),  # none: stays whole
        ([" Why", "?", "!", "\n", "\n", "Be"], 3),
        ([" Yes", ".)", " and"], 2),
        ([" One", ". Two", ". Thr"], 3),  # the token that holds the end is kept whole
        ([], 0),
    ],
)
def test_trim_to_sentence(tokens, end):
    """Guards cutting one token short or long."""
    assert filters.trim_to_sentence([t.encode() for t in tokens], 0) == end
    # a branch token in front of the path is never a sentence of it
    assert filters.trim_to_sentence([b"."] + [t.encode() for t in tokens], 1) == end + 1


def test_the_worked_examples_of_the_docstrings():
    """Guards examples that have gone stale."""
    found = doctest.testmod(filters)
    assert found.attempted >= 2 and not found.failed


def test_rep2_by_hand():
    """Guards counting tokens for bigrams, and the empty path."""
    assert filters.rep2([]) == filters.rep2([5]) == 0.0
    assert filters.rep2([1, 2, 3]) == 0.0
    assert filters.rep2([1, 1, 1, 1]) == pytest.approx(2 / 3)  # 11 11 11
    assert filters.rep2([1, 2, 1, 2, 3]) == 0.25  # 12 21 12 23
    assert filters.rep2([1, 2, 1, 2, 3, 4]) == 0.2  # not above 0.2, though 1 - 4/5 rounds below


def test_perplexity_by_hand():
    """Guards the sign, log base and overflow."""
    assert filters.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert filters.perplexity([]) is None
    assert math.isfinite(filters.perplexity([-1e6]))


# --- one path --------------------------------------------------------------------------------

OPEN = FilterSettings(patterns=None, min_tokens=None, max_rep2=None, min_perplexity=None)


def judged(words, settings=OPEN, finish="eos", start=0, logprobs=None, question=FIVE):
    tokens = [w.encode() for w in words]
    ids = [hash(w) % 1000 for w in words]
    record = {
        "token_ids": ids,
        "logprobs": logprobs or [-2.0] * len(ids),
        "path_start": start,
        "finish": finish,
    }
    return judge_path(record, tokens, question, settings)


def test_rules_go_in_order():
    """Guards the funnel's counts: the first rule that fails names the verdict."""
    bad = [" Question:"] + [" x"] * 5
    strict = FilterSettings(min_tokens=25, max_rep2=0.2, min_perplexity=50.0)
    assert judged(bad, strict)["verdict"] == "pattern:imitative"
    no_patterns = FilterSettings(None, 25, 0.2, 50.0)
    assert judged(bad, no_patterns)["verdict"] == "length"
    assert judged(bad, FilterSettings((), None, 0.2, 50.0))["verdict"] == "repetition"
    assert judged(bad, FilterSettings((), None, None, 50.0))["verdict"] == "perplexity"
    assert judged(bad)["verdict"] == "kept"


def test_thresholds_are_inclusive():
    """Guards `drop above` and `drop below` turning into `at`."""
    words = [" a", " b", " a", " b", " c", " d"]  # rep-2 exactly 0.2
    logprobs = [math.log(0.25)] * 6
    assert judged(words, FilterSettings((), 6, 0.2, 3.999), logprobs=logprobs)["verdict"] == "kept"
    assert judged(words, FilterSettings((), 7, 0.2, 3.0), logprobs=logprobs)["verdict"] == "length"
    got = judged(words, FilterSettings((), 6, 0.19, 3.0), logprobs=logprobs)
    assert got["verdict"] == "repetition" and got["rep2"] == 0.2
    got = judged(words, FilterSettings((), 6, 0.2, 4.001), logprobs=logprobs)
    assert got["verdict"] == "perplexity" and got["perplexity"] == pytest.approx(4.0)


def test_a_perplexity_of_just_the_threshold_stays():
    """Guards `<=`: only below is dropped."""
    at = FilterSettings((), None, None, math.e)
    assert judged([" a", " b"], at, logprobs=[-1.0, -1.0])["verdict"] == "kept"


def test_end_of_text_branch_counts_in_perplexity_only():
    """Guards an end-of-text branch token in text, length or rep-2, or missing in perplexity."""
    got = judged(["<|endoftext|>", " a", " b"], start=1, logprobs=[-6.0, -1.0, -2.0])
    assert got["text"] == " a b" and got["path_end"] == 3
    assert got["perplexity"] == pytest.approx(math.exp(3.0))
    assert (
        judged(["<|endoftext|>", " a"], FilterSettings((), 2, None, None), start=1)["verdict"]
        == "length"
    )


def test_a_cut_path_is_trimmed_but_patterns_see_all_of_it():
    """Guards early rejection and filtering giving two verdicts, and statistics of dropped tokens."""
    words = [" It", " is", ".", " Question:"]
    got = judged(words, finish="length", logprobs=[-1.0, -1.0, -1.0, -9.0])
    assert got["path_end"] == 3 and got["text"] == " It is."
    assert got["perplexity"] == pytest.approx(math.e)
    assert judged(words, finish="eos")["path_end"] == 4
    settings_ = FilterSettings(min_tokens=1, min_perplexity=0.0)
    assert judged(words, settings_, finish="length")["verdict"] == "pattern:imitative"


def test_rejected_paths():
    """Guards `direct` or an end-of-text boundary on a path that was stopped, and a refilter with
    looser patterns that would pass half a path."""
    words = [" bank,", " library,", " mall", " x"]
    settings_ = FilterSettings(("options", "direct"))
    assert judged(words, settings_, "rejected")["verdict"] == "pattern:options"
    with pytest.raises(SertError, match="--no-early-reject"):
        judged(words, FilterSettings(("imitative",)), "rejected")
    with pytest.raises(SertError):
        judged([" No."], settings_, "rejected", question=YES_NO)
    assert judged([" No."], settings_, "eos", question=YES_NO)["verdict"] == "pattern:direct"


def test_an_empty_path_never_passes():
    """Guards exp of nothing, and selecting nothing with all rules off."""
    got = judged([])
    assert got == {"text": "", "path_end": 0, "perplexity": None, "rep2": 0.0, "verdict": "length"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"patterns": ("option",)},
        {"min_tokens": -1},
        {"max_rep2": 1.5},
        {"max_rep2": float("nan")},
        {"min_perplexity": -1.0},
        {"min_perplexity": float("nan")},
    ],
)
def test_settings_are_checked(wrong):
    """Guards a threshold that silently passes everything (NaN compares false)."""
    with pytest.raises(SertError, match="--"):
        FilterSettings(**wrong)


def test_parse_patterns():
    """Guards a misspelt kind that switches a rule off."""
    assert patterns.parse_patterns("none") == ()
    assert patterns.parse_patterns("direct, imitative") == ("imitative", "direct")
    for wrong in ("", "none,direct", "Direct", "all"):
        with pytest.raises(SertError):
            patterns.parse_patterns(wrong)


# --- selection and counts --------------------------------------------------------------------


def record(id, branch, sample, rep2, verdict="kept"):
    return {
        "task": "t",
        "id": id,
        "branch": branch,
        "sample": sample,
        "rep2": rep2,
        "verdict": verdict,
    }


def test_select():
    """Guards ties, dropped paths being chosen, and a second run over selected records."""
    records = [
        record("1", 2, 0, 0.1),
        record("1", 0, 3, 0.1),
        record("1", 0, 1, 0.1),
        record("1", 0, 0, 0.0, "length"),
        record("2", 0, 0, 0.3),
        record("2", 4, 4, 0.2),
        record("3", 0, 0, 0.0, "pattern:direct"),
    ]
    got = filters.select(records)
    assert [r["verdict"] for r in got] == [
        "kept", "kept", "selected", "length", "kept", "selected", "pattern:direct",
    ]  # fmt: skip
    assert records[2]["verdict"] == "kept"  # the input is left alone
    assert filters.select(got) == got
    tie = filters.select([record("1", 1, 0, 0.1), record("1", 0, 3, 0.1)])
    assert [r["verdict"] for r in tie] == ["kept", "selected"]  # the branch goes first


def test_counts():
    """Guards a funnel whose steps do not add up."""
    verdicts = ["selected", "kept", "pattern:options", "pattern:direct", "length", "repetition"]
    records = [record(str(i // 2), 0, i, 0.0, v) for i, v in enumerate(verdicts)]
    records.append(record("2", 1, 0, 0.0, "perplexity"))
    counts = filters.count_verdicts(r for r in records)
    assert counts.paths == 7 and counts.passed == 2 and counts.selected == 1
    assert counts.seen == {"pattern": 7, "length": 5, "repetition": 4, "perplexity": 3}
    assert counts.dropped["pattern"] == 2 and counts.dropped["pattern:options"] == 1
    assert counts.seen["perplexity"] - counts.dropped["perplexity"] == counts.passed
    assert counts.questions == 3 and counts.without_path == 2
