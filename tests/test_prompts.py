"""Prompts and training texts. Each test names the bug it guards."""

from sert_min import prompts, tasks
from sert_min.answers import extract_answer
from sert_min.questions import LETTERS, Question

PLACES = ("bank", "bus", "bus stop", "the moon", "relax")
FIVE = Question("commonsense_qa", "q", "Where? Answer choices: (A) bank, ..", "C", PLACES)
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")


def test_texts_of_every_method():
    """Guards the seam: no space at the end of a prompt, exactly one before and inside the
    completion, the gold answer, the trigger sentence in the prompt of distillation only."""
    q = "Question: Would a pear sink in water?\nAnswer:"
    assert prompts.question_prompt(YES_NO) == q
    assert prompts.finetune_pair(YES_NO) == (q, " So the answer is no.")
    assert prompts.sert_pair(YES_NO, "\n It floats. ") == (q, " It floats. So the answer is no.")
    distilled = f"{q} Let's think step by step.", " It floats. So the answer is no."
    assert prompts.rd_pair(YES_NO, " It floats.\n") == distilled
    assert prompts.sert_pair(FIVE, "x.")[1] == " x. So the answer is (C)."


def test_answer_texts_are_read_back():
    """Guards `(C)`, the micro-world's own words, and training on a sentence that evaluation can't
    read; answer likelihood asks for every option."""
    assert [FIVE.write(a) for a in FIVE.answers] == ["(A)", "(B)", "(C)", "(D)", "(E)"]
    assert [YES_NO.write(a) for a in YES_NO.answers] == ["yes", "no"]
    for q in (FIVE, YES_NO, *tasks.load("micro", "test")[:50]):
        assert extract_answer(f"x. {prompts.answer_sentence(q)}", q) == q.answer
        for other in LETTERS[: len(q.choices)] or ("yes", "no"):
            assert extract_answer(prompts.answer_sentence(q, other), q) == other
