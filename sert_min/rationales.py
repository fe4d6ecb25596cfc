"""Teacher rationales: reading them from files, cleaning them, deciding which to keep [SERT §II-C].

A teacher's output is a reasoning text and, apart from it or at its end, an answer. The student
learns `{R} So the answer is {gold}.`, so R loses a closing answer sentence of its own and, where
the teacher was cut off, its last half sentence. By default only rationales with a right answer are
kept, as in Fine-tune-CoT (arXiv 2212.10071), which the paper follows for generation.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sert_min.prompts import (
    SENTENCE_END,
    extract_answer,
    extract_lenient,
    strip_answer_sentence,
)
from sert_min.runtime import SertError
from sert_min.store import read_jsonl
from sert_min.tasks import Question

ANSWER_TRIGGER = " So the answer is "


class Output(NamedTuple):
    """What a teacher said about one question."""

    rationale: str
    completion: str | None  # its answer, if that came apart from the rationale
    finish: str | None  # "stop", "length", ..; None where nobody wrote it down
    source: str


# --- reading --------------------------------------------------------------------------------------


def read_teacher_file(path: Path, questions: list[Question]) -> dict[str, Output]:
    """Outputs by question id from any of the known forms, told by ending and content:

    .jsonl  our own rationales.jsonl, or rows with rationale, teacher_completion and id or index
    .log    a log of zero_shot_cot (arXiv 2205.11916)
    .json   LLM outputs of distilling-step-by-step (arXiv 2305.02301): a list, file name .._N.json,
            or a folder of them
    """
    if not path.exists():
        raise SertError(f"--teacher-file {path} does not exist; check the path")
    try:
        if path.suffix == ".log":
            found = read_log(path.read_text(encoding="utf-8"), questions, path.name)
        elif path.is_dir() or path.suffix == ".json":
            found = read_step_by_step(path, questions)
        else:
            found = read_rows(read_jsonl(path), questions, path.name)
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise SertError(
            f"--teacher-file {path} is in none of the known forms ({type(e).__name__}: "
            f"{str(e)[:80]}); see README, Teachers"
        ) from None
    if not found:
        raise SertError(f"--teacher-file {path} has no output for any question of this task")
    return found


def read_rows(rows: Iterable[dict], questions: list[Question], source: str) -> dict[str, Output]:
    """JSONL rows; joined by id, else by row number and text, else by text (the first of two)."""
    by_id = {q.id: q for q in questions}
    by_text: dict[str, Question] = {}
    for q in questions:
        by_text.setdefault(stem(q), q)
    found: dict[str, Output] = {}
    for row in rows:
        text = row["question"].strip()
        q = by_id.get(str(row.get("id", row.get("index"))))
        if q is None or text not in (stem(q), q.text):
            q = by_text.get(text)
        if q is None or q.id in found:
            continue
        completion = row.get("teacher_completion")
        if completion is None and row.get("teacher_answer") is not None:
            completion = f"{row['teacher_answer']}."
        found[q.id] = Output(row["rationale"], completion, row.get("finish"), source)
    return found


def read_log(text: str, questions: list[Question], source: str) -> dict[str, Output]:
    """A zero_shot_cot log: questions in shuffled order, each with reasoning, a second trigger
    (`Therefore, the answer (..) is`) and `pred_before`, the answer as the teacher gave it."""
    by_text: dict[str, Question] = {}
    for q in questions:
        by_text.setdefault(stem(q), q)
    found: dict[str, Output] = {}
    entry = re.compile(
        r"^Q: (?P<q>.*?)\nA: Let's think step by step\.(?P<r>.*?)"
        r"\n?Therefore, (?:the|among)[^\n]*? is\b.*?^pred_before : (?P<a>.*?)\npred_after :",
        re.DOTALL | re.MULTILINE,
    )
    for block in re.split(r"^\*{20,}$", text, flags=re.MULTILINE):
        m = entry.search(block)
        if m is None:
            continue
        asked = m["q"].split(" Answer Choices:")[0].strip()
        q = by_text.get(asked)
        if q is not None and q.id not in found:
            found[q.id] = Output(m["r"].strip(), m["a"].strip(), None, source)
    return found


def read_step_by_step(path: Path, questions: list[Question]) -> dict[str, Output]:
    """distilling-step-by-step: file N of a thousand outputs each, in the order of the train set."""
    files = sorted(path.glob("*_CoT_*.json")) if path.is_dir() else [path]
    found: dict[str, Output] = {}
    for file in files:
        number = re.search(r"_(\d+)\.json$", file.name)
        if number is None:
            raise ValueError(f"{file.name} does not end in _N.json")
        first = int(number[1]) * 1000
        outputs = json.loads(file.read_text(encoding="utf-8"))
        for q, output in zip(questions[first : first + 1000], outputs):
            said = output.split("Q:")[0].strip()
            rationale, _, completion = said.rpartition("So the answer is")
            if not rationale:
                rationale, completion = said, None
            completion = completion.strip() if completion else None
            found[q.id] = Output(rationale.strip(), completion, None, file.name)
    return found


def stem(q: Question) -> str:
    """The question without its options: teacher files carry only that."""
    return q.text.split(" Answer choices:")[0].strip()


# --- cleaning -------------------------------------------------------------------------------------


def teacher_answer(output: Output, q: Question) -> str | None:
    """The teacher's own answer, canonical: strictly, then (for a reply in one piece) leniently."""
    if output.completion is not None:
        return extract_answer(output.rationale + ANSWER_TRIGGER + output.completion, q)
    plain = re.sub(r"[*_`#]+", "", output.rationale)  # Markdown
    return extract_answer(plain, q) or extract_lenient(plain, q)


def clean(output: Output) -> tuple[str, bool, bool]:
    """(rationale as the student will read it, lost its answer sentence, lost a half sentence)."""
    text = output.rationale.strip()
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    halved = bool(ends) and ends[-1] < len(text) and output.finish in ("length", None)
    if halved:
        text = text[: ends[-1]].strip()
    text, had_answer = strip_answer_sentence(text)
    return " ".join(text.split()), had_answer, halved


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
            reason = "empty"
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
