"""A question: its text as it stands in the prompt, its possible answers, and the right one.

What a task adds (how its files are read, which student it takes) stands in tasks.py.
"""

import hashlib
import json
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

LETTERS = string.ascii_uppercase
CHOICES = " Answer choices: "  # between a question and its options, in the prompt


@dataclass(frozen=True)
class Question:
    """One question of a task; `answer` is canonical: a letter, yes or no, or a free text."""

    task: str
    id: str
    text: str  # options included: "... Answer choices: (A) .., (B) .."
    answer: str
    choices: tuple[str, ...] = ()  # option texts in order A, B, ..; empty without options
    written: tuple[str, ...] = ()  # how each of `answers` is written; empty: `(C)`, `yes`
    free: bool = False  # the answer is a number or a text of its own (own.py)
    where: str = field(default="", compare=False)  # its file and line, for messages

    @property
    def answers(self) -> tuple[str, ...]:
        """The canonical answers that are possible: A, B, .. or yes, no; none are listed for a free
        answer."""
        if self.free:
            return ()
        return tuple(LETTERS[: len(self.choices)]) if self.choices else ("yes", "no")

    @property
    def name(self) -> str:
        """How messages call the question."""
        return f"question {self.id}" + (f" ({self.where})" if self.where else "")

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
    """The options in a text of `with_choices`; () if it shows none.

    >>> choices_of("Where? Answer choices: (A) bank, (B) shop, mall")
    ('bank', 'shop, mall')
    """
    _, found, rest = text.partition(CHOICES + "(A) ")
    choices = []
    for letter in LETTERS[1:]:
        choice, more, rest = rest.partition(f", ({letter}) ")
        choices.append(choice)
        if not more:
            break
    return tuple(choices + [rest] * bool(more)) if found else ()


def question_in(record: Mapping) -> Question:
    """The question of a record of paths.jsonl (task, id, question, answer)."""
    about = record["task"], record["id"], record["question"], record["answer"]
    choices = choices_of(record["question"])
    return Question(*about, choices, free=not choices and record["answer"] not in ("yes", "no"))


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
