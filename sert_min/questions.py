"""A question: its text as it stands in the prompt, its possible answers, and the right one.

What a task adds (how its files are read, which student it takes) stands in tasks.py.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass

LETTERS = "ABCDE"
CHOICES = " Answer choices: "  # between a question and its options, in the prompt


@dataclass(frozen=True)
class Question:
    """One question of a task; `answer` is canonical: A..E, yes or no."""

    task: str
    id: str
    text: str  # options included: "... Answer choices: (A) .., (B) .."
    answer: str
    choices: tuple[str, ...] = ()  # option texts in order A, B, ..; empty for yes/no questions
    written: tuple[str, ...] = ()  # how each of `answers` is written; empty: `(C)`, `yes`

    @property
    def answers(self) -> tuple[str, ...]:
        """The canonical answers that are possible: A, B, .. or yes, no."""
        return tuple(LETTERS[: len(self.choices)]) if self.choices else ("yes", "no")

    def write(self, answer: str | None = None) -> str:
        """How an answer (default: the gold one) stands in a text.

        >>> Question("commonsense_qa", "1", "..", "C", ("a", "b", "c")).write()
        '(C)'
        """
        answer = self.answer if answer is None else answer
        if self.written:
            return self.written[self.answers.index(answer)]
        return f"({answer})" if self.choices else answer


def with_choices(stem: str, choices) -> str:
    """A question with its options, as it stands in the prompt."""
    return stem + CHOICES + ", ".join(f"({a}) {c}" for a, c in zip(LETTERS, choices))


def choices_of(text: str) -> tuple[str, ...]:
    """The options in a text of `with_choices`; () for a yes/no question.

    >>> choices_of("Where? Answer choices: (A) bank, (B) shop, mall")
    ('bank', 'shop, mall')
    """
    _, found, listed = text.partition(CHOICES + "(A) ")
    return tuple(re.split(rf", \([{LETTERS[1:]}]\) ", listed)) if found else ()


def stem(text: str) -> str:
    """A question's text without its options: files of other people carry only that."""
    return text.partition(CHOICES.rstrip())[0].strip()


def data_hash(questions: list[Question]) -> str:
    """SHA-256 of the questions' content, independent of where they came from."""
    rows = [[q.task, q.id, q.text, q.answer, list(q.choices)] for q in questions]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def majority(questions: list[Question]) -> tuple[str, float]:
    """(most frequent answer, its share): the accuracy of always giving this answer."""
    counts = Counter(q.answer for q in questions)
    answer = min(counts, key=lambda a: (-counts[a], a))
    return answer, counts[answer] / len(questions)


def describe(questions: list[Question], split: str) -> str:
    """One line for every run: size, content hash, majority class."""
    answer, share = majority(questions)
    return (
        f"{questions[0].task} {split}: {len(questions):,} questions, "
        f"data {data_hash(questions)[:12]}, majority {answer} {100 * share:.2f} %"
    )
