"""How an answer is read out of a text. Each test names the bug it guards."""

import json

import pytest
from conftest import shared

from sert_min import answers, tasks
from sert_min.answers import extract_answer, extract_lenient, strip_answer_sentence
from sert_min.questions import Question

FIVE = Question(
    "commonsense_qa", "q", "Where? Answer choices: (A) bank, ..", "C",
    ("bank", "bus", "bus stop", "the moon", "relax"),
)  # fmt: skip
DOUBLE = Question("commonsense_qa", "d", "Where?", "E", ("bank", "mall", "Bank", "park", "zoo"))
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")


# --- closing answer sentences ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("It floats. So the answer is no.", "It floats."),
        ("It floats.\n\nTherefore, the answer to your question is no, it would not.", "It floats."),
        ("10 kg is less than 12 kg, so the answer is no, it holds.", "10 kg is less than 12 kg."),
        ("It has guards. Of the above choices, the closest answer is bank.", "It has guards."),
        ("A. So the answer is (B). So the answer is (C).", "A."),
        ("It was G. W. Bush. So, the answer is no, G. W. Bush did.", "It was G. W. Bush."),
        ("It is vitamin C. So the answer is yes.", "It is vitamin C."),
        ("If it is wet, then the answer is yes.", ""),  # no half condition is left over
        ("So the answer is (B).", ""),
        ("The answer is no. Energy cannot be made, so it cannot be kept.", None),  # not the end
        ("The answer must be a place. A bank is one.", None),
        ("", None),
    ],
)
def test_strip_answer_sentence(text, rest):
    """Guards two answers in one training text, and reasoning lost with the answer."""
    want = (text, False) if rest is None else (rest, True)
    assert strip_answer_sentence(text) == want
    assert strip_answer_sentence(want[0]) == (want[0], False)


# --- reading an answer -----------------------------------------------------------------------

STRICT = {
    YES_NO: {
        "yes": ["So the answer is yes.", "The answer is: Yes!", "the answer is definitely yes - it does",
                "the answer is yes, and yes again", "the answer  is\nyes"],
        "no": ["So the answer is no", "THE ANSWER IS **NO**", "the answer is:\n\nNo, it floats.",
               'the answer is most likely "No."', "the answer is (no)",
               "The answer is yes. Wait, so the answer is no."],  # the last one counts
        None: ["the answer is probably not", "The answer is yes. So the answer is unclear.",
               "The answer is yes. So the answer is", "the answer is no one",
               "the answer is no longer known", "the answer is no-one", "the answer is not yes",
               "the answer is nothing", "the answer is unknown", "the answer is yes and no",
               "the answer is both yes and no", "the answer is yes/no", "the answer isn't yes", "",
               "Yes."],  # no statement
    },
    FIVE: {
        "A": ["the answer is bank.", "the answer is a bank, of course", "the answer is A",
              "the answer is a.", "the answer is a", "the answer is (A) or (B)",
              "the answer is (A) bank or (B) bus.", "the answer is (A), (B)", "the answer is bank and bus",
              "the answer is (A) bank, not (B).", "the answer is (A) bank. And bus drivers wait."],
        "B": ["the answer is **B**: bus", "the answer is the bus", "the answer is most likely (B).",
              "the answer is (B) bank"],  # the letter goes before the text
        "C": ["So the answer is (C).", "So the answer is (c) bus stop.", "the answer is C.",
              "the answer is c", "the answer is C because it is dry",
              "Because it is dry, the answer is C", "the answer is the bus stop",  # not `bus`
              "the answer is Bus  Stop", "the answer is (C) or (c) bus stop"],
        "D": ["the answer is [D]", "the answer is the moon"],
        "E": ["the answer is option E", "the answer is to relax"],
        None: ["the answer is a place", "the answer is A place", "the answer is relaxing",
               "the answer is banker", "the answer is either (A) bank or (B) bus.",
               "the answer is not (B)", "the answer is (F)", "the answer is E.T.",
               "the answer is a b c", "the answer is none of these"],
    },
    DOUBLE: {  # two options have one text
        None: ["the answer is bank"], "C": ["the answer is (C) bank"], "E": ["the answer is zoo"],
    },
}  # fmt: skip
CASES = [(q, text, a) for q, by in STRICT.items() for a, texts in by.items() for text in texts]


@pytest.mark.parametrize(("question", "text", "answer"), CASES)
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
        (YES_NO, "No. So the answer is unknown.", None),  # a statement bars the first mention
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


# --- against somebody else's parse of real teacher outputs -----------------------------------


def teacher_rows(name) -> list[dict]:
    file = shared("data", "teacher", name)
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def test_calibration_on_davinci():
    """Guards drift of the rules: 1,603 real outputs. All disagreements are listed, ours right."""
    differ, found = {}, []
    for row in teacher_rows("strategy_qa.train.text-davinci-002.jsonl"):
        q = Question("strategy_qa", str(row["index"]), row["question"], row["answer"])
        text = f"{row['rationale']} So the answer is {row['teacher_completion']}"
        ours = extract_answer(text, q)
        found.append("right" if ours == q.answer else ours)
        if (ours or "") != row["teacher_answer"]:
            differ[row["teacher_completion"][:30]] = (ours, row["teacher_answer"])
    assert (found.count("right"), found.count(None)) == (874, 236)
    assert differ == {
        "YES!": ("yes", ""),
        "both Yes and No.": (None, "yes"),
        # neither stands right after `the answer is`: lenient reads them
        "3. Yes, eliminating competitio": (None, "yes"),
        "Santa Claus hypothetically giv": (None, "yes"),
    }


@pytest.mark.parametrize(
    "step, right, empty", [(10, 714, 19), pytest.param(1, 7377, 182, marks=pytest.mark.slow)]
)
def test_calibration_on_palm(step, right, empty):
    """Guards drift of the rules for options: 9,741 real outputs (each tenth), read as their own
    parser read them; 105 of them name two options (`(a) safe or (b) vault.`: the first counts)."""
    questions = {q.id: q for q in tasks.load("commonsense_qa", "train", shared("data"))}
    found = []
    for row in teacher_rows("commonsense_qa.train.palm-540b.jsonl")[::step]:
        q = questions[row["id"]]
        ours = extract_answer(f"So the answer is {row['teacher_completion']}", q)
        found.append("right" if ours == q.answer else ours)
        assert (ours or "") == row["teacher_answer"]
    assert (found.count("right"), found.count(None)) == (right, empty)


def test_answer_sentences_of_real_rationales():
    """Guards the counts of closing answer sentences, and that none of them eats a rationale."""
    for name, want in (
        ("strategy_qa.train.text-davinci-002.jsonl", 160),
        ("commonsense_qa.train.palm-540b.jsonl", 235),
    ):
        stripped = [strip_answer_sentence(row["rationale"]) for row in teacher_rows(name)]
        assert sum(had_one for _, had_one in stripped) == want
        assert all(rest for rest, had_one in stripped if had_one)
