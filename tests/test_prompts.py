"""Prompts, training texts and the reading of answers. Each test names the bug it guards."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sert_min import answers, prompts, tasks
from sert_min.answers import extract_answer, extract_lenient, strip_answer_sentence
from sert_min.questions import LETTERS, Question

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real files in ../shared/data")

FIVE = Question(
    "commonsense_qa", "q", "Where? Answer choices: (A) bank, ..", "C",
    ("bank", "bus", "bus stop", "the moon", "relax"),
)  # fmt: skip
DOUBLE = Question("commonsense_qa", "d", "Where?", "E", ("bank", "mall", "Bank", "park", "zoo"))
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")


# --- prompts and training texts --------------------------------------------------------------


def test_texts_of_every_method():
    """Guards the seam: no space at the end of a prompt, exactly one before and inside the
    completion, the gold answer, the trigger sentence in the prompt of distillation only."""
    q = "Question: Would a pear sink in water?\nAnswer:"
    assert prompts.question_prompt(YES_NO) == q
    assert prompts.finetune_pair(YES_NO) == (q, " So the answer is no.")
    assert prompts.sert_pair(YES_NO, "\n It floats. ") == (q, " It floats. So the answer is no.")
    assert prompts.rd_pair(YES_NO, " It floats.\n") == (
        q + " Let's think step by step.",
        " It floats. So the answer is no.",
    )
    assert prompts.sert_pair(FIVE, "x.")[1] == " x. So the answer is (C)."


def test_answer_texts():
    """Guards `(C)`, and the micro-world's own words; answer likelihood asks for every option."""
    assert [FIVE.write(a) for a in FIVE.answers] == ["(A)", "(B)", "(C)", "(D)", "(E)"]
    assert [YES_NO.write(a) for a in YES_NO.answers] == ["yes", "no"]
    for q in tasks.load("micro", "test")[:50]:
        assert extract_answer(f"x. {prompts.answer_sentence(q)}", q) == q.answer
        for other in LETTERS[: len(q.choices)]:
            assert extract_answer(prompts.answer_sentence(q, other), q) == other


def test_our_own_answer_sentence_is_read_back():
    """Guards training on a sentence that evaluation can't read."""
    for q, some in ((FIVE, "ABCDE"), (DOUBLE, "ABCDE"), (YES_NO, ("yes", "no"))):
        for answer in some:
            assert extract_answer(" x. " + prompts.answer_sentence(q, answer), q) == answer


# --- closing answer sentences ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("It floats. So the answer is no.", "It floats."),
        ("It floats.\n\nTherefore, the answer to your question is no, it would not.", "It floats."),
        ("10 kg is less than 12 kg, so the answer is no, it holds.", "10 kg is less than 12 kg."),
        ("It has guards. Of the above choices, the closest answer is bank.", "It has guards."),
        ("A. So the answer is (B). So the answer is (C).", "A."),
        (
            "It was George W. Bush. So, the answer is no, George W. Bush did.",
            "It was George W. Bush.",
        ),
        ("It is vitamin C. So the answer is yes.", "It is vitamin C."),
        ("If it is wet, then the answer is yes.", ""),  # no half condition is left over
        ("So the answer is (B).", ""),
        ("The answer is no. Energy cannot be made, so it cannot be kept.", None),  # not the end
        ("The answer must be a place. A bank is one.", None),
        ("To answer this, look at the water.", None),
        ("", None),
    ],
)
def test_strip_answer_sentence(text, rest):
    """Guards two answers in one training text, and reasoning lost with the answer."""
    want = (text, False) if rest is None else (rest, True)
    assert strip_answer_sentence(text) == want
    assert strip_answer_sentence(want[0]) == (want[0], False)


# --- reading an answer -----------------------------------------------------------------------

STRICT = [
    # yes or no
    (YES_NO, "So the answer is yes.", "yes"),
    (YES_NO, "So the answer is no", "no"),
    (YES_NO, "THE ANSWER IS **NO**", "no"),
    (YES_NO, "The answer is: Yes!", "yes"),
    (YES_NO, "the answer is:\n\nNo, it floats.", "no"),
    (YES_NO, 'the answer is most likely "No."', "no"),
    (YES_NO, "the answer is probably not", None),
    (YES_NO, "the answer is definitely yes - it does", "yes"),
    (YES_NO, "the answer is (no)", "no"),
    (YES_NO, "The answer is yes. Wait, so the answer is no.", "no"),  # the last one counts
    (YES_NO, "The answer is yes. So the answer is unclear.", None),
    (YES_NO, "The answer is yes. So the answer is", None),
    (YES_NO, "the answer is no one", None),
    (YES_NO, "the answer is no longer known", None),
    (YES_NO, "the answer is no-one", None),
    (YES_NO, "the answer is not yes", None),
    (YES_NO, "the answer is nothing", None),
    (YES_NO, "the answer is unknown", None),
    (YES_NO, "the answer is yes and no", None),
    (YES_NO, "the answer is both yes and no", None),
    (YES_NO, "the answer is yes/no", None),
    (YES_NO, "the answer is yes, and yes again", "yes"),
    (YES_NO, "Yes.", None),  # no statement
    (YES_NO, "the answer isn't yes", None),
    (YES_NO, "the answer  is\nyes", "yes"),
    (YES_NO, "", None),
    # an option
    (FIVE, "So the answer is (C).", "C"),
    (FIVE, "So the answer is (c) bus stop.", "C"),
    (FIVE, "the answer is C.", "C"),
    (FIVE, "the answer is c", "C"),
    (FIVE, "the answer is C because it is dry", "C"),
    (FIVE, "Because it is dry, the answer is C", "C"),
    (FIVE, "the answer is option E", "E"),
    (FIVE, "the answer is **B**: bus", "B"),
    (FIVE, "the answer is [D]", "D"),
    (FIVE, "the answer is bank.", "A"),
    (FIVE, "the answer is a bank, of course", "A"),
    (FIVE, "the answer is A", "A"),
    (FIVE, "the answer is a.", "A"),
    (FIVE, "the answer is a place", None),
    (FIVE, "the answer is A place", None),
    (FIVE, "the answer is a", "A"),
    (FIVE, "the answer is the bus stop", "C"),  # not `bus`
    (FIVE, "the answer is Bus  Stop", "C"),
    (FIVE, "the answer is the bus", "B"),
    (FIVE, "the answer is the moon", "D"),
    (FIVE, "the answer is to relax", "E"),
    (FIVE, "the answer is relaxing", None),
    (FIVE, "the answer is banker", None),
    (FIVE, "the answer is most likely (B).", "B"),
    (FIVE, "the answer is (A) or (B)", "A"),
    (FIVE, "the answer is either (A) bank or (B) bus.", None),
    (FIVE, "the answer is (A) bank or (B) bus.", "A"),
    (FIVE, "the answer is (A), (B)", "A"),
    (FIVE, "the answer is bank and bus", "A"),
    (FIVE, "the answer is (A) bank, not (B).", "A"),
    (FIVE, "the answer is (A) bank. And bus drivers wait.", "A"),
    (FIVE, "the answer is (C) or (c) bus stop", "C"),
    (FIVE, "the answer is not (B)", None),
    (FIVE, "the answer is (F)", None),
    (FIVE, "the answer is (B) bank", "B"),  # the letter goes before the text
    (FIVE, "the answer is E.T.", None),
    (FIVE, "the answer is a b c", None),
    (FIVE, "the answer is none of these", None),
    (DOUBLE, "the answer is bank", None),  # two options have this text
    (DOUBLE, "the answer is (C) bank", "C"),
    (DOUBLE, "the answer is zoo", "E"),
]


@pytest.mark.parametrize(("question", "text", "answer"), STRICT)
def test_strict(question, text, answer):
    """Guards guessing (a wrong answer read out of none) and blindness (`Yes!` read as nothing)."""
    assert extract_answer(text, question) == answer


@pytest.mark.parametrize(
    ("question", "text", "answer"),
    [
        (YES_NO, "Yes, because.", "yes"),
        (YES_NO, "There is no evidence, yes.", "yes"),  # a determiner is no answer
        (YES_NO, "There is no evidence.", None),
        (YES_NO, "No.", "no"),
        (YES_NO, "I know. Nobody noticed.", None),
        (YES_NO, "No. So the answer is yes.", "yes"),  # strict goes first
        (YES_NO, "No. So the answer is hard, but yes.", "yes"),  # then what follows the statement
        (YES_NO, "No. So the answer is unknown.", "no"),
        (FIVE, "A bank has guards.", "A"),
        (FIVE, "C", "C"),
        (FIVE, "c. It rains", "C"),
        (FIVE, "It could be (b) or (c).", "B"),
        (FIVE, "I pick option d", "D"),
        (FIVE, "People wait at the bus stop there.", "C"),
        (FIVE, "A dog.", None),
        (FIVE, "", None),
        (DOUBLE, "The bank is near the park.", "D"),  # the double text says nothing
    ],
)
def test_lenient(question, text, answer):
    """Guards the rules for texts without a statement."""
    assert extract_lenient(text, question) == answer


def test_stated_answers():
    """Guards `exactly one answer` in the format score: it needs every statement."""
    text = "The answer is no. Hence the answer is unclear. So the answer is yes."
    assert answers.stated_answers(text, YES_NO) == ["no", None, "yes"]


PIECES = st.sampled_from(
    ["the answer is ", "The Answer  is", " (", "A", "c", ")", "bank", "bus", " stop", "yes", "no"]
    + [
        " or ",
        " and ",
        ", ",
        ".",
        ":",
        "\n",
        "most likely ",
        "probably",
        "a ",
        "the ",
        "so ",
        "İ",
        "ſ",
        "*",
    ]
)
QUESTIONS = st.sampled_from(
    [FIVE, YES_NO, DOUBLE, Question("c", "x", "", "A", ("", " ", "(", "İ", "s"))]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=80), QUESTIONS)
def test_reading_never_raises(text, question):
    """Guards a crash after hours of generation; answers are canonical; lenient covers strict."""
    strict, lenient = extract_answer(text, question), extract_lenient(text, question)
    allowed = set(LETTERS[: len(question.choices)]) if question.choices else {"yes", "no"}
    assert {strict, lenient} - {None} <= allowed
    assert strict is None or lenient == strict
    rest, had_one = strip_answer_sentence(text)
    assert strip_answer_sentence(rest) == (rest, False)
    assert had_one or rest == text.strip()


# --- against somebody else's parse of real teacher outputs -----------------------------------


def teacher_rows(name):
    return [json.loads(line) for line in (DATA / "teacher" / name).open(encoding="utf-8")]


@needs_data
def test_calibration_on_davinci():
    """Guards drift of the rules: 1,603 real outputs. All disagreements are listed, ours right."""
    differ, right, empty = {}, 0, 0
    for row in teacher_rows("strategy_qa.train.text-davinci-002.jsonl"):
        q = Question("strategy_qa", str(row["index"]), row["question"], row["answer"])
        text = f"{row['rationale']} So the answer is {row['teacher_completion']}"
        found = extract_answer(text, q)
        right += found == row["answer"]
        empty += found is None
        if (found or "") != row["teacher_answer"]:
            differ[row["teacher_completion"][:30]] = (found, row["teacher_answer"])
    assert (right, empty) == (874, 236)
    assert differ == {
        "YES!": ("yes", ""),
        "both Yes and No.": (None, "yes"),
        # neither stands right after `the answer is`: lenient reads them
        "3. Yes, eliminating competitio": (None, "yes"),
        "Santa Claus hypothetically giv": (None, "yes"),
    }


@needs_data
def test_calibration_on_palm():
    """Guards drift of the rules for options: 9,741 real outputs, read as their own parser read
    them, 105 of which name two options (`(a) safe or (b) vault.`: the first counts)."""
    questions = {q.id: q for q in tasks.load("commonsense_qa", "train", DATA)}
    right = empty = 0
    for row in teacher_rows("commonsense_qa.train.palm-540b.jsonl"):
        q = questions[row["id"]]
        text = f"{row['rationale']} So the answer is {row['teacher_completion']}"
        found = extract_answer(text, q)
        right += found == q.answer
        empty += found is None
        assert (found or "") == row["teacher_answer"]
    assert (right, empty) == (7377, 182)


@needs_data
def test_answer_sentences_of_real_rationales():
    """Guards the counts of closing answer sentences, and that none of them eats a rationale."""
    for name, want in (
        ("strategy_qa.train.text-davinci-002.jsonl", 132),
        ("commonsense_qa.train.palm-540b.jsonl", 235),
    ):
        stripped = [strip_answer_sentence(row["rationale"]) for row in teacher_rows(name)]
        assert sum(had_one for _, had_one in stripped) == want
        assert all(rest for rest, had_one in stripped if had_one)
