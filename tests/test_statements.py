"""What counts as an answer statement, read and stripped by one definition; thinking cut off."""

import re

import pytest

from sert_min import answers
from sert_min.answers import (
    extract_lenient,
    stated_answer,
    strip_answer_sentence,
    without_thinking,
)
from sert_min.questions import Question


def statements(text, question):
    """(where it starts, where its answer starts, the answer or None) of each statement."""
    found = answers._ANY_FORM.finditer(text)
    return [(m.start(), m.end(), answers._said(text, m, question)) for m in found]


MALL = Question(
    "commonsense_qa", "q", "Where? Answer choices: (A) home, ..", "B",
    ("home", "mall", "bus stop", "the sky", "relax"),
)  # fmt: skip
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")
DISCUSSION = (
    "Let's look at the options. (A) home: homes have no shops. (B) mall: it has many. (C) bus stop: "
    "no shops. (D) the sky: absurd. (E) relax: not a place.\n\n"
)

READ = [  # (what the model says, what it states last; None where that can't be read)
    # every form
    ("Therefore, the correct answer is **(C) bus stop**.", "C"),
    ("So the final answer is: B", "B"),
    ("My answer is (B).", "B"),
    ("Your answer is mall.", "B"),
    ("The right option is B, since it has shops.", "B"),
    ("The correct answer choice is (B).", "B"),
    ("Therefore, among A through E, the answer is D", "D"),
    ('The answer to "Where would one shop?" is (B).', "B"),
    ("The answer, therefore, is (B).", "B"),
    ("The answer's (B).", "B"),
    ("The correct choice would be D because birds fly there.", "D"),
    ("The best choice among the options is (C).", "C"),
    ("Correct answer is B.", "B"),
    ("So answer is B.", "B"),
    ("Answer: B) mall", "B"),
    ("ANSWER: (b)", "B"),
    ("**Answer**: C", "C"),
    ("__Answer:__ A", "A"),
    ("Correct option: (C)", "C"),
    ("So, the answer: (B)", "B"),
    ("<answer>B</answer>", "B"),
    ('{"reasoning": "It has shops.", "answer": "B"}', "B"),
    ("## Final Answer\n(B) mall", "B"),
    ("\\[\n\\boxed{\\text{C}}\n\\]", "C"),
    ("The answer is $\\boxed{\\textbf{(C) bus stop}}$.", "C"),
    ("The answer is \\(B\\).", "B"),
    ("Therefore, C is the correct answer.", "C"),
    ("So option C is the best choice.", "C"),
    ("**(C) bus stop** is the most plausible answer.", "C"),
    ("Of the above choices, the closest answer is mall.", "B"),
    # marks
    ("The **final answer** is *(B)*", "B"),
    ("the answer is “mall”.", "B"),
    ("the answer is 'B'", "B"),
    ("The answer is `B`.", "B"),
    ("The answer is — (B)", "B"),
    ("The answer is – mall – of course.", "B"),
    ("Answer：（Ｂ）", "B"),
    ("The answer is A。", "A"),
    ("The answer is 【B】", "B"),
    ("The answer\u00a0is\u00a0(B).", "B"),
    ("> **Answer:** B", "B"),
    # the last one counts, wherever it stands
    ("The answer is (A).\n\nAnswer: (B)", "B"),
    ("Answer: (B)\n\nExplanation: a home has no shops, (C) has none, (D) is absurd.", "B"),
    ("The answer is (A). Wait, it has no shops. The answer is (B).", "B"),
    ("Question: Where?\nAnswer: It has shops. So the answer is (B).", "B"),
    ("The answer is (B). To answer the question, one looks at shops.", "B"),
    ("The answer is (B). (A) is not the best choice.", "B"),
    # negation and correction
    ("So the answer is not (B) but (C).", "C"),
    ("The answer is (C), not (B).", "C"),
    ("(A) is not the answer. The answer is (B).", "B"),
    ("So the answer is not (B).", None),
    ("The answer is not only (B) but also (C).", None),
    ("The answer is (A). No: the answer can't be (A).", None),
    ("The answer is (A). The answer cannot be (A).", None),
    ("The answer is (A). The answer isn't (A).", None),
    ("The answer is (A). Wait, homes have no shops.", None),
    ("The answer is (A). Hmm, (B) has more.", None),
    ("The answer is (A) — or rather (B).", None),
    ("The answer is (A)?", None),
    ("Some people would say that the answer is (A).", None),
    ("One could argue (A) is the correct answer.", None),
    ("I don't think the answer is (A).", None),
    ("This does not mean that the answer is (A).", None),
    ("If it had shops, the answer would be (A).", None),
    ("The answer would be (A) if it had shops.", None),
    ("If the answer is (A), homes have shops.", None),
    ("I wonder whether the answer is (A).", None),
    ("It may be that the answer is (A).", None),
    ("It may rain so the answer is (B).", "B"),
    ("It could rain and the answer is (B).", "B"),
    ("I thought the answer was (A).", None),
    ("Initially the answer was (A).", None),
    ("I can't say the answer is (A).", None),
    ("It would be wrong to say that the answer is (A).", None),
    ("It is tempting to say the answer is (A).", None),
    ("Alice says the answer is (A).", None),
    ("I'd say the answer is (B).", "B"),
    ("The answer is (A) if you shop online. Otherwise it is (B).", None),
    ("Answer: (A) home is wrong, (B) is right.", None),
    ("The answer is B because A isn't one.", "B"),
    ("The answer is\u200b (B)", "B"),
    ("The wrong answer is (A).", None),
    ("Another possible answer is (A).", None),
    # no statement, or one of nothing: never a first mention
    ("", None),
    ("(B) fits best.", None),
    ("(C) is correct.", None),
    ("It must be (B).", None),
    ("The answer must be a place with shops. Of the above choices, only mall has some.", None),
    ("The answer is a place.", None),
    ("The answer is either (A) or (B).", None),
    ("The answer is none of the above.", None),
    ("Answer: (F)", None),
    ("The first option is (A), the second one (B).", None),
    ("A place is the answer.", None),
    ("Vitamin C is the best choice.", None),
    ("(A) has no shops, a mall is the best choice.", None),
    ("The answer is (B).\n\nQuestion: Where else?\nAnswer: (C)", None),
    ("What is the answer?", None),
]
READ_YES_NO = [
    ("At first sight one may say yes, as pears are heavy.\n\n**Answer:** No", "no"),
    ("Is it yes or no? The answer is no, pears float.", "no"),
    ("So, to answer your question, yes, it would.", "yes"),
    ("In answer to your question: no.", "no"),
    ("Therefore, the answer (Yes or No) is:\n\nYes, it does.", "yes"),
    ("Final answer: \\boxed{\\text{No}}", "no"),
    ("**Answer: Yes!**", "yes"),
    ("The short answer is no.", "no"),
    ("Yes is the answer.", "yes"),
    ("The answer is not yes but no.", "no"),
    ("The answer is yes. Correction: it floats.", None),
    ("I would say no, because pears float.", None),
    ("No. Pears float.", None),
    ("The answer is yes and no.", None),
    ("The answer is no longer known.", None),
    ("The answer to it depends on the water: that is no lake.", None),
    ("The answer to that question is yes.", None),
    ("It is no, unless it is wet, in which case the answer is yes.", None),
    ("If crocodiles swim, then the answer is yes.", None),
    ("If we look at it, the answer is yes.", "yes"),
    ("It isn't clear that the answer is yes.", None),
]


@pytest.mark.parametrize(("text", "answer"), READ)
def test_options(text, answer):
    """Guards the reading of A out of every text that discusses (A) to (E), and of `not (B)` as B."""
    assert stated_answer(text, MALL) == answer
    assert stated_answer(DISCUSSION + text, MALL) == answer


@pytest.mark.parametrize(("text", "answer"), READ_YES_NO)
def test_yes_no(text, answer):
    """Guards `yes` in "one may say yes", and `no` as a determiner."""
    assert stated_answer(text, YES_NO) == answer
    assert stated_answer("Some say yes, others no.\n\n" + text, YES_NO) == answer


def test_every_form_reads_its_example():
    """Guards a form that nothing reaches, and the places that statements gives."""
    for example in answers.FORMS:
        assert stated_answer(f"It has shops.\n{example}", MALL) == "C", example
    text = "The best answer is (A). Final answer: C"
    found = [(text[a:b], said) for a, b, said in statements(text, MALL)]
    assert found == [("The best answer is", "A"), ("Final answer:", "C")]


# --- stripping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, rest", [
    # every form goes, with its sentence
    ("It floats. The best choice would be (B), as it has shops.", "It floats."),
    ("It floats.\n\n### Answer\n\n**No**, it does not.", "It floats."),
    ("It floats.\n\n$$\\boxed{no}$$", "It floats."),
    ("It floats. The answer is $\\boxed{B}$. Final answer: B", "It floats."),
    ("It floats. <answer>no</answer>", "It floats."),
    ("It floats. The best answer is therefore\n(B).", "It floats."),
    # a clause goes alone
    ("10 kg is less, so **the answer is no**.", "10 kg is less."),
    ("10 kg is less; the answer is no.", "10 kg is less."),
    ("10 kg is less, and the best choice is (B).", "10 kg is less."),
    ("10 kg is less, which means that the answer is no.", "10 kg is less."),
    ("10 kg is less - thus the answer is no, and my answer is no.", "10 kg is less."),
    ("Homes have none, so (B) mall is the best choice.", "Homes have none."),
    ("Since 10 kg is less, the answer is no.", ""),
    # what is no statement stays, and what has reasoning after it
    ("Answer: No. It floats.", None),
    ("(B) mall is the right answer. It has shops.", None),
    ("### Answer\n\nPears float. They are light.", None),
    ("The answer must be a shop. Only choice is bad.", None),
    ("There is no definitive answer to this question.", None),
    ("The answer to it depends on whether it is fresh.", None),
    ("Yes.", None),
])  # fmt: skip
def test_stripping(text, rest):
    """Guards a closing statement that is read but not stripped: the student would learn two."""
    want = (text, False) if rest is None else (rest, True)
    assert strip_answer_sentence(text) == want
    assert strip_answer_sentence(want[0]) == (want[0], False)


@pytest.mark.parametrize(
    ("question", "text"),
    [(q, t) for q, cases in ((MALL, READ), (YES_NO, READ_YES_NO)) for t, answer in cases if answer],
)
def test_what_is_read_is_stripped(question, text):
    """Guards two definitions: a text that ends in a statement of any form loses it."""
    start, at, _ = statements(text, question)[-1]
    rest, had_one = strip_answer_sentence("It has shops.\n" + text)
    more_comes_after_it = re.search(r"\w.*([.!?]\s+|\n\s*)\W{0,3}\w", text[at:])
    assert had_one == (not more_comes_after_it)
    if had_one:
        assert rest.startswith("It has shops.") and len(rest) <= 14 + start


# --- lenient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("question, text, answer", [
    (MALL, DISCUSSION + "**Answer:** C", "C"),  # a statement of any form
    (MALL, "(B) mall, as it has shops.", "B"),  # a short output: its first mention
    (MALL, "Mall.", "B"),
    (YES_NO, "No. Pears float.", "no"),
    (MALL, DISCUSSION, None),  # a long one: never
    (YES_NO, "No, it floats. " + "Pears are light and water is dense. " * 4, None),
    (MALL, "(A) fits, but the answer is not (A).", None),  # what denies states nothing
])  # fmt: skip
def test_lenient_takes_a_first_mention_of_short_outputs_only(question, text, answer):
    """Guards a lenient accuracy that is mostly the first option that a discussion names."""
    assert extract_lenient(text, question) == answer


# --- thinking -------------------------------------------------------------------------------------

HARMONY = "<|channel|>analysis<|message|>Is it (A)?<|end|><|start|>assistant<|channel|>final"


@pytest.mark.parametrize("text, said", [
    ("It is wet.", "It is wet."),
    ("Analysis of the water shows that it is wet.", "Analysis of the water shows that it is wet."),
    ("He thinks [a thought] of <b>water</b>.", "He thinks [a thought] of <b>water</b>."),
    *(
        (f"{start}\nSay (A)?{end}It is wet.", "It is wet.")
        for start, end in (
            ("<think>", "</think>"),
            ("", "</think>"),  # some chat templates open it
            ("<THINK>", "</THINK>"),
            ("<thinking>", "</thinking>"),
            ("<thought>", "</thought>"),
            ("<thoughts>", "</thoughts>"),
            ("[THINK]", "[/THINK]"),
            ("<seed:think>", "</seed:think>"),
            ("◁think▷", "◁/think▷"),
            ("<|START_THINKING|>", "<|END_THINKING|>"),
            ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("analysis", "assistantfinal"),
        )
    ),
    (HARMONY + "<|message|>It is wet.<|return|>", "It is wet."),
    (HARMONY + " <|constrain|>json<|message|>{}", "{}"),
    ("<think> a </think> b <think> c </think> It is wet.", "It is wet."),
    ("<think> a <think> b </think> c </think> It is wet.", "It is wet."),
    # cut off: nothing is left
    ("<think> Say (A)", ""),
    ("  <think>", ""),
    ("<|channel|>analysis<|message|>Say (A)", ""),
    ("<|start|>assistant<|channel|>analysis<|message|>Say (A)", ""),
    ("analysisThe user asks (A). assistantcommentaryHm.", ""),
    ("<think> a </think> <think> b", ""),
    ("It is wet. <think> Or is it?", "It is wet."),
])  # fmt: skip
def test_without_thinking(text, said):
    """Guards drafts and doubts in a student's text, and an answer that was only thought."""
    assert without_thinking(text).strip() == said
