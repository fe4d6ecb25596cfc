"""The questions: CommonsenseQA, StrategyQA and the embedded micro-world, split as in the paper.

    commonsense_qa   9,741 train, 1,221 test (the official dev set: the test set has no labels)
    strategy_qa      1,603 train,   687 test (the split of Fine-tune-CoT, arXiv 2212.10071)

Files are downloaded once from a pinned public commit, checked against their SHA-256 and cached, or
read from `--data-dir`, where the same hashes are asked for. One StrategyQA question ("Can you find
Bob Marley's face in most smoke shops?") stands in the source twice and falls into train and test:
we keep the paper's split, so a test accuracy carries that one known question.

A task is a row of TASKS. Another one needs a reader and a row, and nothing elsewhere. A file of your
own questions (own.py) becomes a row when a script is started with `--task FILE`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sert_min import own
from sert_min.io import smollm2
from sert_min.io.download import DataFile, data_file
from sert_min.io.errors import SertError, need
from sert_min.io.files import read_json, read_jsonl
from sert_min.micro import program, world
from sert_min.questions import Question, with_choices

SPLITS = ("train", "validation", "test")
DEFAULT = "micro"
FILES = {  # DataFile(under --data-dir, at the source, SHA-256)
    ("commonsense_qa", "train"): DataFile(
        "commonsense_qa/train_rand_split.jsonl", "CommonsenseQA/train_rand_split.jsonl",
        "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb"),
    ("commonsense_qa", "test"): DataFile(
        "commonsense_qa/dev_rand_split.jsonl", "CommonsenseQA/dev_rand_split.jsonl",
        "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a"),
    ("strategy_qa", "all"): DataFile(
        "strategy_qa/task.json", "StrategyQA/task.json",
        "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803"),
}  # fmt: skip
# What flags that are left out stand for [SERT §III-A]; the rules' limits stand in filters.RULES.
PAPER = {"max_new_tokens": 128, "early_reject": True, "epochs": 20, "batch_size": 8, "lr": 3e-4}
# What a student wants instead, by its label; the rules stay the paper's (docs/choices.md).
STUDENTS = {smollm2.LABEL: {"epochs": 2, "batch_size": 4, "lr": 1e-4}}


class Task(NamedTuple):
    """What is particular to a task."""

    read: Callable[[str, Path | None], list[Question]]  # of train or test, from a folder
    sizes: dict[str, int] | None  # questions of train and test; None: any number
    student: str = "gpt2"  # what --model stands for if it is left out
    preset: dict = PAPER
    greedy_cap: int = 512  # tokens of a greedy output: 256 can't give the paper's Len of 257
    report: int = 0  # test questions that train.py answers before and after
    teacher: Callable[[Question], str] | None = None  # a program that writes rationales
    judge: Callable[[Question, str], dict] | None = None  # a program that scores a text
    flags: str = ""  # what names the task on a command line, if it is not its name


# --- the two public sets --------------------------------------------------------------------------


def read_commonsense_qa(split: str, data_dir: Path | None) -> list[Question]:
    """A file per split, a question per line; the options stand in the question text [SERT Fig. 2]."""
    questions = []
    for row in read_jsonl(data_file(FILES["commonsense_qa", split], data_dir)):
        options = sorted(row["question"]["choices"], key=lambda c: c["label"])
        if "".join(c["label"] for c in options) != "ABCDE" or row["answerKey"] not in "ABCDE":
            raise ValueError(f"options of question {row['id']}")
        choices = tuple(c["text"].strip() for c in options)
        text = with_choices(row["question"]["stem"].strip(), choices)
        questions.append(Question("commonsense_qa", row["id"], text, row["answerKey"], choices))
    return questions


def read_strategy_qa(split: str, data_dir: Path | None) -> list[Question]:
    """The rows of `split`, by the rule of Fine-tune-CoT: of a permutation with seed 0 the first
    70 %, sorted, are train. `id` is the row number in the file: its order matters."""
    rows = read_json(data_file(FILES["strategy_qa", "all"], data_dir))["examples"]
    order = np.random.RandomState(0).permutation(len(rows)).tolist()
    n_train, questions = round(0.7 * len(rows)), []
    for i in sorted(order[:n_train] if split == "train" else order[n_train:]):
        scores = rows[i]["target_scores"]
        need(sorted(scores.values()) == [0, 1], f"target_scores of row {i}", ValueError)
        answer = "yes" if scores["Yes"] else "no"
        questions.append(Question("strategy_qa", str(i), rows[i]["input"].strip(), answer))
    return questions


def read_micro(split: str, data_dir: Path | None) -> list[Question]:
    """The embedded micro-world's questions: generated, not read."""
    need(not data_dir, "the micro task is generated, not read; leave --data-dir out")
    return world.questions(split)


# --- the table ------------------------------------------------------------------------------------

TASKS = {
    "micro": Task(
        read_micro,
        {"train": 400, "test": 400},
        "micro",
        world.PRESET,
        greedy_cap=world.PRESET["max_new_tokens"],  # its student's context is small
        report=100,
        teacher=program.teacher_rationale,
        judge=program.judge,
    ),
    "commonsense_qa": Task(read_commonsense_qa, {"train": 9741, "test": 1221}),
    "strategy_qa": Task(read_strategy_qa, {"train": 1603, "test": 687}),
}


def get(name: str) -> Task:
    known = f"choose one of {', '.join(TASKS)}, or give a file of questions (.jsonl or .csv)"
    need(name in TASKS, f"unknown task {name!r}; {known}")
    return TASKS[name]


def open_task(name: str, fields: str | None = None, test_file: str | None = None) -> str:
    """The name of a task that `--task` names. A file of questions is read, and becomes a task."""
    if name in TASKS or not name.lower().endswith(own.ENDINGS):
        need(not (fields or test_file), "--fields and --test-file need a file as --task")
        return get(name) and name
    label, read, words = own.open_file(name, fields, test_file)
    TASKS[label] = Task(read, None, flags=words)
    return label


def is_own(name: str) -> bool:
    """Is a task a file of the user's own questions? Rows can be appended to it."""
    return not get(name).sizes


def flags(name: str) -> str:
    """What names a task on a command line, for commands that we print."""
    return get(name).flags or f"--task {name}"


def preset(name: str, label: str = "") -> dict:
    """What flags that are left out stand for, with the student `label`."""
    return PAPER | get(name).preset | STUDENTS.get(label, {})


def load(name: str, split: str, data_dir: Path | str | None = None) -> list[Question]:
    """The questions of a task in a fixed order. `train` is the whole train split, as in the paper;
    `validation` is a fixed tenth of it (`holdout_split`)."""
    task = get(name)
    need(split in SPLITS, f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if split == "validation":
        held = holdout_split(load(name, "train", data_dir))[1]
        need(held, f"{name} has too few questions to hold a tenth out for validation")
        return held
    try:
        questions = task.read(split, Path(data_dir) if data_dir else None)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise SertError(f"the {name} file is not in the expected form ({e!r}); get it again") from e
    size = task.sizes[split] if task.sizes else len(questions)
    need(len(questions) == size, f"{name} {split} has {len(questions)} questions instead of {size}; "
         "use the data files and the numpy of requirements.txt")  # fmt: skip
    return questions


def holdout_split(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """(rest, validation) of a whole train split: the tenth whose texts have the lowest hashes, in
    the given order. No seed is involved; equal texts fall on one side. Limit after this."""
    by_hash = sorted(questions, key=lambda q: hashlib.sha256(q.text.encode()).digest())
    held = {q.text for q in by_hash[: round(len(questions) / 10)]}
    return [q for q in questions if q.text not in held], [q for q in questions if q.text in held]
