"""Every string that goes into a model, in one place (answers.py reads what comes out).

    prompt      Question: {q}\\nAnswer:                                   sampling, SERT, Finetune
    prompt      Question: {q}\\nAnswer: Let's think step by step.         teacher, RD, SERT+RD
    completion   {reasoning} So the answer is {a}.                        what the student learns

A prompt has no trailing space and a completion starts with one: the two are tokenised apart, in
sampling and in training alike, so the ids at the seam are the same.
"""

from sert_min.questions import Question

COT_SUFFIX = " Let's think step by step."  # zero-shot CoT, arXiv 2205.11916; [SERT §II-C]


def question_prompt(question: Question, suffix: str = "") -> str:
    """`Question: {q}\\nAnswer:` [SERT Fig. 2], plus `suffix` (`COT_SUFFIX` or nothing)."""
    return f"Question: {question.text}\nAnswer:{suffix}"


def answer_sentence(question: Question, answer: str | None = None) -> str:
    """`So the answer is {a}.` [SERT §II-B]"""
    return f"So the answer is {question.write(answer)}."


def answer_trigger(question: Question) -> str:
    """The second request of zero-shot CoT [arXiv 2205.11916, Table 10], by the kind of the answer."""
    if question.choices:
        return f"Therefore, among A through {question.answers[-1]}, the answer is"
    return f"Therefore, the answer{'' if question.free else ' (Yes or No)'} is"


def finetune_pair(question: Question) -> tuple[str, str]:
    """(prompt, completion) of the label-only baseline: no reasoning between the two."""
    return question_prompt(question), f" {answer_sentence(question)}"


def sert_pair(question: Question, path: str) -> tuple[str, str]:
    """(prompt, completion) of self-training on the student's own path [SERT §II-B]. The caller
    has taken the path's own closing answer off (`strip_answer_sentence`) and counted it."""
    return question_prompt(question), f" {path.strip()} {answer_sentence(question)}"


def rd_pair(question: Question, rationale: str) -> tuple[str, str]:
    """(prompt, completion) of reasoning distillation from a teacher's rationale [SERT §II-C]."""
    return (
        question_prompt(question, COT_SUFFIX),
        f" {rationale.strip()} {answer_sentence(question)}",
    )
