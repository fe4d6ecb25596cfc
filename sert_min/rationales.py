"""Teacher rationales: how they are cleaned, and which of them are kept [SERT §II-C].

A teacher's output is a reasoning text and an answer, which stands at its end or came apart from it.
The student learns `{R} So the answer is {gold}.`, so R loses a closing answer sentence of its own
and, if the teacher was cut off, its last half sentence. By default only rationales with a right
answer are kept, as in Fine-tune-CoT (arXiv 2212.10071), which the paper follows for generation.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from sert_min.answers import SENTENCE_END, stated_answer, strip_answer_sentence, without_thinking
from sert_min.io.endpoint import WHOLE
from sert_min.io.errors import printable
from sert_min.patterns import pattern_break
from sert_min.questions import Question


class Output(NamedTuple):
    """What a teacher said about one question."""

    rationale: str
    completion: str | None  # its answer, if that came apart from the rationale
    finish: str | None  # "stop", "length", ..; None if nobody recorded it
    source: str


def teacher_answer(output: Output, q: Question) -> str | None:
    """The teacher's own answer in canonical form: what its last answer statement says, or None."""
    text = without_thinking(output.rationale)
    if output.completion is not None:
        text += f" So the answer is {without_thinking(output.completion)}"
    return stated_answer(text, q)


def clean(output: Output) -> tuple[str, bool, bool]:
    """(the rationale as the student will read it, did it lose its answer sentence?, did it lose a
    half sentence?). The result is one paragraph. One without a full sentence stays as it is."""
    text = without_thinking(output.rationale).strip()
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    cut = output.finish not in WHOLE
    halved = cut and bool(ends) and ends[-1] < len(text)
    if halved:
        text = text[: ends[-1]]
    text, had_answer = strip_answer_sentence(text)
    return " ".join(printable(text).split()), had_answer, halved


def rationale_records(
    questions: list[Question],
    outputs: dict[str, list[Output]],
    keep: str,
    fits: Callable[[Question, str], bool] | None = None,
    per_question: int | None = None,
) -> tuple[list[dict], Counter]:
    """(a record per output, in question order; the counts of what happened). `keep` is "right" or
    "all"; `fits(question, text)`: can the student's context hold it? Of the outputs for one
    question at most `per_question` are kept."""
    records, counts, kept = [], Counter(), Counter()
    several = [(q, i, one) for q in questions for i, one in enumerate(outputs.get(q.id, ()))]
    if without := sum(not outputs.get(q.id) for q in questions):
        counts["no output"] = without
    for q, i, output in several:
        answer = teacher_answer(output, q)
        text, had_answer, halved = clean(output)
        counts["answer right"] += answer == q.answer
        counts["answer wrong"] += answer is not None and answer != q.answer
        counts["answer not readable"] += answer is None
        counts["lost a closing answer sentence"] += had_answer
        counts["lost a half sentence at the end"] += halved
        if not text:
            reason = "empty"  # it was filtered, refused, all thinking, or only an answer
        elif pattern_break(text, q, ("direct",)):
            reason = "bare answer"
        elif keep == "right" and answer != q.answer:
            reason = "answer not readable" if answer is None else "answer wrong"
        elif fits and not fits(q, text):
            reason = "too long"
        elif per_question and kept[q.id] == per_question:
            reason = "enough of this question"
        else:
            reason = "ok"
        kept[q.id] += reason == "ok"
        counts[f"dropped: {reason}" if reason != "ok" else "kept"] += 1
        which = {"sample": i} if len(outputs[q.id]) > 1 else {}
        records.append({
            "task": q.task, "id": q.id, **which, "question": q.text, "rationale": text,
            "teacher_answer": answer, "answer": q.answer, "kept": reason == "ok", "reason": reason,
            "source": output.source,
        })  # fmt: skip
    return records, counts
