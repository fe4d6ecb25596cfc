"""The questions: CommonsenseQA, StrategyQA and the embedded micro-world, split as in the paper.

    commonsense_qa   9,741 train, 1,221 test (the official dev set: the test set has no labels)
    strategy_qa      1,603 train,   687 test (the split of Fine-tune-CoT, arXiv 2212.10071)

Files are downloaded once from a pinned public commit, checked against their SHA-256 and cached, or
read from `--data-dir`, where the same hashes are asked for. One StrategyQA question ("Can you find
Bob Marley's face in most smoke shops?") stands in the source twice and falls into train and test:
we keep the paper's split, so a test accuracy carries that one known question.
"""

import contextlib
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sert_min.runtime import SertError
from sert_min.store import read_json, read_jsonl, sha256_file, sync_folder

LETTERS = "ABCDE"
TASKS = ("micro", "commonsense_qa", "strategy_qa")
SPLITS = ("train", "validation", "test")

DATA_URL = (  # of the authors of zero-shot CoT; SERT_DATA_URL names another place
    "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/"
    "5ef330fcdeec0cd26aee27943504f91f8ec1c33c/dataset"
)
TIMEOUT = 30  # seconds without an answer
MAX_BYTES = 50_000_000


class DataFile(NamedTuple):
    local: str  # under --data-dir and in the cache
    remote: str  # under DATA_URL
    sha256: str


FILES = {
    ("commonsense_qa", "train"): DataFile(
        "commonsense_qa/train_rand_split.jsonl",
        "CommonsenseQA/train_rand_split.jsonl",
        "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb",
    ),
    ("commonsense_qa", "test"): DataFile(
        "commonsense_qa/dev_rand_split.jsonl",
        "CommonsenseQA/dev_rand_split.jsonl",
        "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a",
    ),
    ("strategy_qa", "all"): DataFile(
        "strategy_qa/task.json",
        "StrategyQA/task.json",
        "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
    ),
}
SIZES = {
    ("commonsense_qa", "train"): 9741,
    ("commonsense_qa", "test"): 1221,
    ("strategy_qa", "train"): 1603,
    ("strategy_qa", "test"): 687,
}
CHOICES = " Answer choices: "  # between a question and its options, in the prompt


@dataclass(frozen=True)
class Question:
    """One question as it stands in the prompt; `answer` is canonical: A..E, yes or no."""

    task: str
    id: str
    text: str  # options included: "... Answer choices: (A) .., (B) .."
    answer: str
    choices: tuple[str, ...] = ()  # option texts in order A, B, ..; empty for yes/no questions


def stem(text: str) -> str:
    """A question's text without its options: files of other people carry only that."""
    return text.partition(CHOICES.rstrip())[0].strip()


def load(task: str, split: str, data_dir: Path | str | None = None) -> list[Question]:
    """The questions of a task in a fixed order. `train` is the whole train split, as in the paper;
    `validation` is a fixed tenth of it (`holdout_split`)."""
    if task not in TASKS:
        raise SertError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise SertError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if split == "validation":
        return holdout_split(load(task, "train", data_dir))[1]
    if task == "micro":
        if data_dir:
            raise SertError("the micro task is generated, not read; leave --data-dir out")
        from sert_min import micro

        return micro.questions(split)
    path = data_file(task, split, data_dir)
    try:
        if task == "commonsense_qa":  # a file per split
            questions = read_commonsense_qa(path)
        elif task == "strategy_qa":
            questions = read_strategy_qa(path, split)
        else:
            raise NotImplementedError(f"a reader for {task}")
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise SertError(f"the {task} file is not in the expected form ({e!r}); get it again") from e
    if len(questions) != SIZES[task, split]:
        raise SertError(
            f"{task} {split} has {len(questions)} questions instead of {SIZES[task, split]}; "
            "use the data files and the numpy of requirements.txt"
        )
    return questions


def default_model(task: str) -> str:
    """The student that `--model` stands for if it is left out."""
    return "micro" if task == "micro" else "gpt2"


def preset(task: str) -> dict:
    """What a task sets where a flag is left out: the paper's values, or those of the micro-world,
    whose paths are shorter and whose model is tiny."""
    if task == "micro":
        from sert_min import micro

        return micro.PRESET
    return {
        "min_tokens": 25,
        "max_rep2": 0.2,
        "min_perplexity": 5.0,
        "max_new_tokens": 128,
        "early_reject": True,
        "epochs": 20,
    }


def holdout_split(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """(rest, validation) of a whole train split: the tenth whose texts have the lowest hashes, in
    the given order. No seed is involved; equal texts fall on one side. Limit after this, not
    before."""
    by_hash = sorted(questions, key=lambda q: hashlib.sha256(q.text.encode()).digest())
    held = {q.text for q in by_hash[: round(len(questions) / 10)]}
    return [q for q in questions if q.text not in held], [q for q in questions if q.text in held]


def data_hash(questions: list[Question]) -> str:
    """SHA-256 of the questions' content, independent of where they came from."""
    rows = [[q.task, q.id, q.text, q.answer, list(q.choices)] for q in questions]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def majority(questions: list[Question]) -> tuple[str, float]:
    """(most frequent answer, its share): what always saying the same thing scores."""
    answer, count = min(
        Counter(q.answer for q in questions).items(), key=lambda item: (-item[1], item[0])
    )
    return answer, count / len(questions)


def describe(questions: list[Question], split: str) -> str:
    """One line for every run: size, content hash, majority class."""
    if not questions:
        return f"{split}: 0 questions"
    answer, share = majority(questions)
    return (
        f"{questions[0].task} {split}: {len(questions):,} questions, "
        f"data {data_hash(questions)[:12]}, majority {answer} {100 * share:.2f} %"
    )


# --- the two public sets ---------------------------------------------------------------------


def read_commonsense_qa(path: Path) -> list[Question]:
    """One question per line; the options stand in the question text [SERT Fig. 2]."""
    questions = []
    for row in read_jsonl(path):
        options = sorted(row["question"]["choices"], key=lambda c: c["label"])
        if "".join(c["label"] for c in options) != LETTERS or row["answerKey"] not in LETTERS:
            raise ValueError(f"options of question {row['id']}")
        choices = tuple(c["text"].strip() for c in options)
        listed = ", ".join(f"({a}) {c}" for a, c in zip(LETTERS, choices))
        text = row["question"]["stem"].strip() + CHOICES + listed
        questions.append(Question("commonsense_qa", row["id"], text, row["answerKey"], choices))
    return questions


def read_strategy_qa(path: Path, split: str) -> list[Question]:
    """The rows of `split`, by the rule of Fine-tune-CoT: of a permutation with seed 0 the first
    70 %, sorted, are train. `id` is the row number in the file: its order matters."""
    rows = read_json(path)["examples"]
    order = np.random.RandomState(0).permutation(len(rows))
    n_train = round(0.7 * len(rows))
    picked = sorted(int(i) for i in (order[:n_train] if split == "train" else order[n_train:]))
    questions = []
    for i in picked:
        scores = rows[i]["target_scores"]
        if sorted(scores.values()) != [0, 1]:
            raise ValueError(f"target_scores of row {i}")
        answer = "yes" if scores["Yes"] else "no"
        questions.append(Question("strategy_qa", str(i), rows[i]["input"].strip(), answer))
    return questions


# --- files -----------------------------------------------------------------------------------


def data_file(task: str, split: str, data_dir: Path | str | None = None) -> Path:
    """Path of a checked data file: in `data_dir`, or in the cache, downloaded if need be."""
    file = FILES.get((task, split)) or FILES[task, "all"]
    if data_dir:
        path = Path(data_dir) / file.local
        if not path.is_file():
            raise SertError(f"{path} is missing; check --data-dir, or leave it out to download")
        found = sha256_file(path)
        if found != file.sha256:
            raise SertError(
                f"{path} has SHA-256 {found}, expected {file.sha256}; "
                "replace the file, or leave --data-dir out to download the right one"
            )
        return path
    cache = os.environ.get("SERT_CACHE") or Path.home() / ".cache" / "sert_min"
    path = Path(cache) / file.local
    if not (path.is_file() and sha256_file(path) == file.sha256):
        url = f"{os.environ.get('SERT_DATA_URL') or DATA_URL}/{file.remote}"
        save_checked(path, download(url), file.sha256, url)
    return path


def download(url: str) -> bytes:
    """The body of `url`; every failure is one line that names a way out."""
    way_out = "check the network and repeat, or get the files elsewhere and give --data-dir"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read(MAX_BYTES)
    except urllib.error.HTTPError as e:
        raise SertError(f"{url} answered {e.code} {e.reason}; {way_out}") from None
    except (OSError, http.client.HTTPException, ValueError) as e:  # URLError is an OSError
        reason = getattr(e, "reason", None) or e
        raise SertError(f"could not download {url} ({reason}); {way_out}") from None


def save_checked(path: Path, data: bytes, sha256: str, url: str) -> None:
    """Write `data` at `path`, whole and durable, if its hash is right; else nothing is kept."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SertError(
            f"{url} gave {len(data):,} bytes with SHA-256 {found}, expected {sha256}; "
            "repeat (a cut download?), or get the files elsewhere and give --data-dir"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as e:
        raise SertError(
            f"could not write {path} ({e.strerror}); free space or name a folder with SERT_CACHE"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # an unusable folder has its own error, above
            part.unlink(missing_ok=True)
