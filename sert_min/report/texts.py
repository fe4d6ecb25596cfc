"""Texts that exist already: which question they belong to."""

import re

from sert_min.questions import CHOICES, LETTERS, Question, stem

# --- texts from elsewhere -------------------------------------------------------------------------


def question_of(row: dict, task: str, by_key: dict) -> Question:
    """The question of a record: from its own text if that shows the options, else from `by_key`
    (questions by id and by text without options). Letters alone do where nothing is known."""
    answer, text = row.get("answer"), row.get("question")
    if answer not in (*LETTERS, "yes", "no"):
        raise ValueError(f"answer {answer!r} is not one of A to E, yes, no")
    task, text = str(row.get("task", task)), text if isinstance(text, str) else ""
    name = str(row.get("id", row.get("index", "")))
    if answer in ("yes", "no"):
        return Question(task, name, text, answer)
    _, _, listed = text.partition(CHOICES)
    if listed:
        options = tuple(re.split(r"(?:^|, )\([A-E]\) ", listed)[1:])
    else:
        known = by_key.get(name) or by_key.get(stem(text))
        if known and known.answer != answer:
            raise ValueError(f"the answer of question {name} is {known.answer} in the dataset")
        if text and not known:
            raise ValueError("its question shows no options and is not in the dataset; --task?")
        options, text = (known.choices, known.text) if known else (("",) * 5, text)
    return Question(task, name, text, answer, options)


def text_of(row: dict) -> str:
    """A record's text, or a teacher's rationale with its answer."""
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("rationale"), str) and isinstance(row.get("teacher_completion"), str):
        return f"{row['rationale']} So the answer is {row['teacher_completion']}"
    raise ValueError("it has neither text nor rationale and teacher_completion")
