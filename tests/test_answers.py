"""How an answer is read out of a text and stripped off it, strictly or leniently; thinking is cut.
The tables hold {question: {what is read, None where nothing is: texts}}."""

import re
from dataclasses import replace

import pytest
from conftest import read_from, shared

from sert_min import answers, tasks
from sert_min.answers import extract_answer, stated_answer, strip_answer_sentence
from sert_min.io.files import read_jsonl
from sert_min.questions import Question
from sert_min.rationales import Output, teacher_answer

BUS = ("bank", "bus", "bus stop", "the moon", "relax")
FIVE = Question("commonsense_qa", "q", "Where? Answer choices: (A) bank, ..", "C", BUS)
MALL = replace(FIVE, answer="B", choices=("home", "mall", "bus stop", "the sky", "relax"))
DOUBLE = replace(FIVE, answer="E", choices=("bank", "mall", "Bank", "park", "zoo"))
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")


STRICT = {  # right behind `the answer is`
    YES_NO: {
        "yes": ["So the answer is yes.", "The answer is: Yes!", "the answer  is\nyes",
                "the answer is definitely yes - it does"],
        "no": ["THE ANSWER IS **NO**", "the answer is:\n\nNo, it floats.",
               'the answer is most likely "No."', "the answer is (no)",
               "The answer is yes. Wait, so the answer is no."],  # the last one counts
        None: ["the answer is probably not", "The answer is yes. So the answer is",
               "the answer is no one", "the answer is no longer known", "the answer is no-one",
               "the answer is not yes", "the answer is yes and no", "the answer is yes/no",
               "", "Yes."],  # no statement
    },
    FIVE: {
        "A": ["the answer is bank.", "the answer is a bank, of course", "the answer is A",
              "the answer is a.", "the answer is a", "the answer is (A) or (B)",
              "the answer is (A) bank or (B) bus.", "the answer is bank and bus",
              "the answer is (A) bank, not (B)."],
        "B": ["the answer is **B**: bus", "the answer is the bus", "the answer is most likely (B).",
              "the answer is (B) bank"],  # the letter goes before the text
        "C": ["So the answer is (C).", "the answer is c", "the answer is C because it is dry",
              "Because it is dry, the answer is C", "the answer is Bus  Stop",
              "the answer is the bus stop"],  # not `bus`
        "D": ["the answer is [D]", "the answer is the moon"],
        "E": ["the answer is option E", "the answer is to relax"],
        None: ["the answer is a place", "the answer is A place", "the answer is relaxing",
               "the answer is banker", "the answer is either (A) bank or (B) bus.",
               "the answer is E.T.", "the answer is a b c"],
    },
    DOUBLE: {  # two options have one text
        None: ["the answer is bank"], "C": ["the answer is (C) bank"], "E": ["the answer is zoo"],
    },
}  # fmt: skip


@read_from(STRICT)
def test_strict(question, text, answer):
    """Guards guessing (a wrong answer read out of none) and blindness (`Yes!` read as nothing)."""
    assert extract_answer(text, question) == answer


def test_stated_answers():
    """Guards `exactly one answer` in the format score: it needs every statement."""
    text = "The answer is no. Hence the answer is unclear. So the answer is yes."
    assert answers.stated_answers(text, YES_NO) == ["no", None, "yes"]


def statements(text, question):
    """(where it starts, where its answer starts, the answer or None) of each statement."""
    found = answers._ANY_FORM.finditer(text)
    return [(m.start(), m.end(), answers._said(text, m, question)) for m in found]


STATED = {  # in any form
    MALL: {
        "A": ["__Answer:__ A", "The answer is A。"],
        "B": ["So the final answer is: B", "My answer is (B).", "Your answer is mall.",
              "The right option is B, since it has shops.", "The correct answer choice is (B).",
              'The answer to "Where would one shop?" is (B).', "The answer, therefore, is (B).",
              "The answer's (B).", "So answer is B.", "Answer: B) mall", "ANSWER: (b)",
              "<answer>B</answer>", "The answer is \\(B\\).",
              '{"reasoning": "It has shops.", "answer": "B"}', "## Final Answer\n(B) mall",
              "Of the above choices, the closest answer is mall.",
              # marks
              "The **final answer** is *(B)*", "the answer is “mall”.", "the answer is 'B'",
              "The answer is `B`.", "The answer is — (B)", "The answer is – mall – of course.",
              "Answer：（Ｂ）", "The answer is 【B】", "The answer\u00a0is\u00a0(B).", "> **Answer:** B",
              "The answer is\u200b (B)",
              # the last one counts, wherever it stands
              "The answer is (A).\n\nAnswer: (B)", "(A) is not the answer. The answer is (B).",
              "Answer: (B)\n\nExplanation: a home has no shops, (C) has none, (D) is absurd.",
              "The answer is (A). Wait, it has no shops. The answer is (B).",
              "Question: Where?\nAnswer: It has shops. So the answer is (B).",
              "The answer is (B). To answer the question, one looks at shops.",
              "The answer is (B). (A) is not the best choice.",
              # no doubt about it
              "It may rain so the answer is (B).", "It could rain and the answer is (B).",
              "I'd say the answer is (B).", "The answer is B because A isn't one."],
        "C": ["Therefore, the correct answer is **(C) bus stop**.", "**Answer**: C",
              "The best choice among the options is (C).", "Correct option: (C)",
              "\\[\n\\boxed{\\text{C}}\n\\]", "The answer is $\\boxed{\\textbf{(C) bus stop}}$.",
              "Therefore, C is the correct answer.", "So option C is the best choice.",
              "**(C) bus stop** is the most plausible answer.",
              "So the answer is not (B) but (C).", "The answer is (C), not (B)."],
        "D": ["Therefore, among A through E, the answer is D",
              "The correct choice would be D because birds fly there."],
        None: ["So the answer is not (B).", "The answer is not only (B) but also (C).",
               # denied or taken back
               "The answer is (A). No: the answer can't be (A).",
               "The answer is (A). The answer isn't (A).", "The answer is (A). Hmm, (B) has more.",
               "The answer is (A) — or rather (B).",
               "Answer: (A) home is wrong, (B) is right.",
               "The answer is (A) if you shop online. Otherwise it is (B).",
               # doubted, or said by others
               "The answer is (A)?", "Some people would say that the answer is (A).",
               "One could argue (A) is the correct answer.", "I don't think the answer is (A).",
               "This does not mean that the answer is (A).", "I wonder whether the answer is (A).",
               "If it had shops, the answer would be (A).", "If the answer is (A), homes have shops.",
               "It may be that the answer is (A).",
               "I thought the answer was (A).", "Initially the answer was (A).",
               "I can't say the answer is (A).", "It would be wrong to say that the answer is (A).",
               "It is tempting to say the answer is (A).", "Alice says the answer is (A).",
               "The wrong answer is (A).", "Another possible answer is (A).",
               # no statement, or one of nothing: never a first mention
               "", "(B) fits best.", "It must be (B).", "The answer is a place.",
               "The answer is either (A) or (B).", "The answer is none of the above.", "Answer: (F)",
               "The first option is (A), the second one (B).", "A place is the answer.",
               "Vitamin C is the best choice.", "(A) has no shops, a mall is the best choice.",
               "The answer is (B).\n\nQuestion: Where else?\nAnswer: (C)", "What is the answer?"],
    },
    YES_NO: {
        "yes": ["So, to answer your question, yes, it would.", "**Answer: Yes!**", "Yes is the answer.",
                "Therefore, the answer (Yes or No) is:\n\nYes, it does.",
                "If we look at it, the answer is yes."],
        "no": ["At first sight one may say yes, as pears are heavy.\n\n**Answer:** No",
               "Is it yes or no? The answer is no, pears float.", "In answer to your question: no.",
               "Final answer: \\boxed{\\text{No}}", "The short answer is no.",
               "The answer is not yes but no.", "Pears float\nFinal answer: no",
               "Pears float.\r\n\r\n### Answer\r\n\r\n**No**"],
        None: ["The answer is yes. Correction: it floats.", "I would say no, because pears float.",
               "No. Pears float.", "The answer is yes and no.", "The answer is no longer known.",
               "The answer to it depends on the water: that is no lake.",
               "The answer to that question is yes.", "It isn't clear that the answer is yes.",
               "It is no, unless it is wet, in which case the answer is yes.",
               "If crocodiles swim, then the answer is yes."],
    },
}  # fmt: skip
BEFORE = {  # A discussion in front of a statement does not change its reading.
    MALL: "Let's look at the options. (A) home: homes have no shops. (B) mall: it has many. (C) bus "
          "stop: no shops. (D) the sky: absurd. (E) relax: not a place.\n\n",
    YES_NO: "Some say yes, others no.\n\n",
}  # fmt: skip


@read_from(STATED)
def test_what_is_stated(question, text, answer):
    """Guards the reading of A out of all that discusses (A) to (E), of `not (B)` as B, of `no` as a
    determiner. And two definitions: a text that ends in a statement of any form loses it."""
    assert stated_answer(text, question) == answer
    assert stated_answer(BEFORE[question] + text, question) == answer
    if answer:
        start, at, _ = statements(text, question)[-1]
        rest, had_one = strip_answer_sentence("It has shops.\n" + text)
        more_comes_after_it = re.search(r"\w.*([.!?]\s+|\n\s*)\W{0,3}\w", text[at:])
        assert had_one == (not more_comes_after_it)
        if had_one:
            assert rest.startswith("It has shops.") and len(rest) <= 14 + start


def test_every_form_reads_its_example():
    """Guards a form that nothing reaches, and the places that statements gives."""
    for example in answers.FORMS:
        assert stated_answer(f"It has shops.\n{example}", MALL) == "C", example
    text = "The best answer is (A). Final answer: C"
    found = [(text[a:b], said) for a, b, said in statements(text, MALL)]
    assert found == [("The best answer is", "A"), ("Final answer:", "C")]


STRIPPED = {  # Each text on the right is stripped to the key.
    "It floats.": [  # every form goes, with its sentence
        "It floats. So the answer is no.", "It floats. <answer>no</answer>",
        "It floats.\n\nTherefore, the answer to your question is no, it would not.",
        "It floats. The best choice would be (B), as it has shops.", "It floats.\n\n$$\\boxed{no}$$",
        "It floats.\n\n### Answer\n\n**No**, it does not.",
        "It floats. Of the above choices, the closest answer is bank.",
        "It floats. The answer is $\\boxed{B}$. Final answer: B",
        "It floats. The best answer is therefore\n(B)."],
    "10 kg is less.": [  # a clause goes alone
        "10 kg is less, so **the answer is no**.", "10 kg is less; the answer is no.",
        "10 kg is less, so the answer is no, it holds.", "10 kg is less, and the best choice is (B).",
        "10 kg is less, which means that the answer is no.",
        "10 kg is less - thus the answer is no, and my answer is no."],
    "5 x 6 = 30": ["5 x 6 = 30\nFinal answer: 31"],
    "Homes have none.": ["Homes have none, so (B) mall is the best choice."],
    "It was G. W. Bush.": ["It was G. W. Bush. So, the answer is no, G. W. Bush did."],
    "A.": ["A. So the answer is (B). So the answer is (C)."],
    "It is vitamin C.": ["It is vitamin C. So the answer is yes."],
    "": ["So the answer is (B).", "Since 10 kg is less, the answer is no.",
         "If it is wet, then the answer is yes."],  # no half condition is left over
    None: [  # These stay whole: they state nothing, or reasoning follows the statement.
        "The answer is no. Energy cannot be made, so it cannot be kept.", "Answer: No. It floats.",
        "(B) mall is the right answer. It has shops.", "### Answer\n\nPears float. They are light.",
        "The answer must be a place. A bank is one.", "Yes.", "",
        "There is no definitive answer to this question.",
        "The answer to it depends on whether it is fresh."],
}  # fmt: skip


@pytest.mark.parametrize("text, rest", [(t, r) for r, texts in STRIPPED.items() for t in texts])
def test_stripping(text, rest):
    """Guards two answers in one training text, and reasoning lost with the answer."""
    want = (text, False) if rest is None else (rest, True)
    assert strip_answer_sentence(text) == want
    assert strip_answer_sentence(want[0]) == (want[0], False)


LENIENT = {  # in any form, or first in a short text
    YES_NO: {
        "yes": ["Yes, because.", "There is no evidence, yes.",  # a determiner is no answer
                "No. So the answer is yes."],  # strict goes first
        "no": ["No.", "No. Pears float."],
        None: ["There is no evidence.", "I know. Nobody noticed.",
               "No. So the answer is unknown.",  # a statement bars the first mention
               "No, it floats. " + "Pears are light and water is dense. " * 4],  # too long
    },
    FIVE: {
        "A": ["A bank has guards."], "B": ["It could be (b) or (c)."], "D": ["I pick option d"],
        "C": ["C", "c. It rains", "People wait at the bus stop there."], None: ["A dog.", ""],
    },
    DOUBLE: {"D": ["The bank is near the park."]},  # the double text says nothing
    MALL: {
        "B": ["(B) mall, as it has shops.", "Mall."],
        "C": [BEFORE[MALL] + "**Answer:** C"],  # a statement of any form
        None: [BEFORE[MALL], "(A) fits, but the answer is not (A)."],
    },
}  # fmt: skip


@read_from(LENIENT)
def test_lenient(question, text, answer):
    """Guards a lenient accuracy that is mostly the first option that a discussion names."""
    assert answers.extract_lenient(text, question) == answer


HARMONY = "<|channel|>analysis<|message|>Is it (A)?<|end|><|start|>assistant<|channel|>final"
MARKS = (
    ("", "</think>"),  # some chat templates open it
    ("<think>", "</think>"), ("<THINK>", "</THINK>"), ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"), ("<thoughts>", "</thoughts>"), ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"), ("analysis", "assistantfinal"),
    ("<|START_THINKING|>", "<|END_THINKING|>"))  # fmt: skip
THOUGHT = {  # Each text on the right says the key once its thinking is dropped.
    "It is wet.": [
        "It is wet.", "It is wet. <think> Or is it?", HARMONY + "<|message|>It is wet.<|return|>",
        *(f"{start}\nSay (A)?{end}It is wet." for start, end in MARKS),
        "<think> a </think> b <think> c </think> It is wet.",
        "<think> a <think> b </think> c </think> It is wet."],
    "Analysis of water.": ["Analysis of water."],
    "He thinks [a thought] of <b>water</b>.": ["He thinks [a thought] of <b>water</b>."],
    "{}": [HARMONY + " <|constrain|>json<|message|>{}"],
    "": [  # cut off: nothing is left
        "<think> Say (A)", "  <think>", "<|channel|>analysis<|message|>Say (A)",
        "<|start|>assistant<|channel|>analysis<|message|>Say (A)", "<think> a </think> <think> b",
        "analysisThe user asks (A). assistantcommentaryHm."],
}  # fmt: skip


@pytest.mark.parametrize("text, said", [(t, s) for s, texts in THOUGHT.items() for t in texts])
def test_without_thinking(text, said):
    """Guards drafts and doubts in a student's text, and an answer that was only thought."""
    assert answers.without_thinking(text).strip() == said


@pytest.mark.parametrize("step, right, empty, stripped", [
    (10, 714, 19, 27), pytest.param(1, 7377, 182, 235, marks=pytest.mark.slow),
])  # fmt: skip
def test_calibration_on_palm(step, right, empty, stripped):
    """Guards drift of the rules: 9,741 real outputs (each tenth), read as their own parser did; 105
    name two options (the first counts). test_rationales.py has the 1,603 outputs with yes and no."""
    questions = {q.id: q for q in tasks.load("commonsense_qa", "train", shared("data"))}
    found, closed = [], 0
    file = shared("data", "teacher", "commonsense_qa.train.palm-540b.jsonl")
    for row in list(read_jsonl(file))[::step]:
        q = questions[row["id"]]
        ours = extract_answer(f"So the answer is {row['teacher_completion']}", q)
        found.append("right" if ours == q.answer else ours)
        assert (ours or "") == row["teacher_answer"]
        said = Output(row["rationale"], row["teacher_completion"], "stop", "palm")
        assert teacher_answer(said, q) == ours  # the reading that distill.py goes by
        rest, had_one = strip_answer_sentence(row["rationale"])
        closed += had_one
        assert rest
    assert (found.count("right"), found.count(None), closed) == (right, empty, stripped)
