"""Teacher rationales: reading them from files, cleaning them, deciding which to keep [SERT §II-C].

A teacher's output is a reasoning text and, apart from it or at its end, an answer. The student
learns `{R} So the answer is {gold}.`, so R loses a closing answer sentence of its own and, where
the teacher was cut off, its last half sentence. By default only rationales with a right answer are
kept, as in Fine-tune-CoT (arXiv 2212.10071), which the paper follows for generation.
"""

from collections import Counter

from sert_min.answers import (
    SENTENCE_END,
    stated_answer,
    strip_answer_sentence,
    without_thinking,
)
from sert_min.io.errors import printable
from sert_min.questions import Question
from sert_min.teacher_files import Output

ANSWER_TRIGGER = " So the answer is "


# --- cleaning -------------------------------------------------------------------------------------


def teacher_answer(output: Output, q: Question) -> str | None:
    """The teacher's own answer, canonical: what its last answer statement says, or None."""
    text = without_thinking(output.rationale)
    if output.completion is not None:
        text += ANSWER_TRIGGER + without_thinking(output.completion)
    return stated_answer(text, q)


def clean(output: Output) -> tuple[str, bool, bool]:
    """(rationale as the student will read it, lost its answer sentence, lost a half sentence). It
    is one paragraph without control characters. A rationale without any full sentence stays."""
    text = without_thinking(output.rationale).strip()
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    cut = output.finish in (None, "length", "content_filter")
    halved = cut and bool(ends) and ends[-1] < len(text)
    if halved:
        text = text[: ends[-1]]
    text, had_answer = strip_answer_sentence(text)
    return " ".join(printable(text).split()), had_answer, halved


def rationale_records(
    questions: list[Question], outputs: dict[str, Output], keep: str, fits
) -> tuple[list[dict], Counter]:
    """One record per question that has an output, in question order, and the counts of what
    happened. `keep` is "right" or "all"; `fits(question, text)` tells whether it can be learnt."""
    records, counts = [], Counter()
    for q in questions:
        output = outputs.get(q.id)
        if output is None:
            counts["no output"] += 1
            continue
        answer = teacher_answer(output, q)
        text, had_answer, halved = clean(output)
        counts["answer right"] += answer == q.answer
        counts["answer wrong"] += answer is not None and answer != q.answer
        counts["answer not readable"] += answer is None
        counts["lost a closing answer sentence"] += had_answer
        counts["lost a half sentence at the end"] += halved
        if not text:
            reason = "empty"  # filtered, refused, all thinking, or nothing but an answer
        elif keep == "right" and answer is None:
            reason = "answer not readable"
        elif keep == "right" and answer != q.answer:
            reason = "answer wrong"
        elif not fits(q, text):
            reason = "too long"
        else:
            reason = "ok"
        counts[f"dropped: {reason}" if reason != "ok" else "kept"] += 1
        records.append(
            {
                "task": q.task,
                "id": q.id,
                "question": q.text,
                "rationale": text,
                "teacher_answer": answer,
                "answer": q.answer,
                "kept": reason == "ok",
                "reason": reason,
                "source": output.source,
            }
        )
    return records, counts
