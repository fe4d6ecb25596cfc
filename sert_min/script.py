"""What the four scripts share: common flags, the block files, and the student that they open."""

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sert_min import __version__, filters, tasks
from sert_min.io.errors import SertError, need
from sert_min.io.files import read_json, read_jsonl, to_line, write_atomic
from sert_min.io.hub import find_model, model_label, read_sert
from sert_min.io.parallel import WORLD
from sert_min.questions import Question

TASK = ("--task", "--fields", "--test-file", "--data-dir")  # what names the questions
# fmt: off
FLAGS: dict[str, dict] = {
    "--task": dict(default=tasks.DEFAULT, metavar="TASK",
                   help=f"{', '.join(tasks.TASKS)}, or a file of your questions, .jsonl or .csv "
                        "(docs/usage.md); default: %(default)s"),
    "--fields": dict(metavar="OURS=THEIRS,..",
                     help="names of the file's fields: question=prompt,.."),
    "--test-file": dict(help="the test questions of a file (default: its split field, or a fifth)"),
    "--data-dir": dict(help="read the datasets here instead of downloading them"),
    "--model": dict(help="student: a name (gpt2, smollm2, ..), folder or hub id (default: the "
                         "task's)"),
    "--out-dir": dict(help="where results go"),
    "--limit": dict(type=int, help="only the first N questions (default: all)"),
    "--seed": dict(type=int, default=0, help="default: %(default)s"),
    "--device": dict(default="auto", help="auto, cpu, cuda or mps"),
    "--dtype": dict(choices=("auto", "fp32", "bf16"), default="auto", help="of matrix products"),
    "--dry-run": dict(action="store_true", help="print a prompt and the plan, then stop"),
}
# fmt: on


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with the script's own docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=raw)
    p.add_argument("--version", action="version", version=f"sert-min {__version__}")
    return p


def add_flags(group, *names: str, **changes) -> None:
    """Add the shared flags `names`; `changes` (limit=dict(help=..)) override what FLAGS says."""
    for name in names:
        group.add_argument(name, **FLAGS[name] | changes.get(name[2:].replace("-", "_"), {}))


def parse(p: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """The flags; a file of questions in `--task` is read, and its name becomes that of its task."""
    args = p.parse_args(argv)
    args.task = tasks.open_task(args.task, args.fields, args.test_file)
    return args


def given(value, otherwise):
    """A flag's value, or `otherwise` if the flag was left out (0 is a value)."""
    return otherwise if value is None else value


def chosen(args, names: Iterable[str], **otherwise) -> dict:
    """The values of the flags `names`; `otherwise` gives those of flags that were left out."""
    return {name: given(getattr(args, name), otherwise.get(name)) for name in names}


def check_counts(args, *names: str) -> None:
    """Refuse flags below 1 that count something."""
    for name in names:
        need(given(getattr(args, name), 1) >= 1, f"--{name.replace('_', '-')} must be at least 1")


class Blocks(NamedTuple):
    """The block files of a run, each with the records of `size` consecutive questions, `each` per
    question. They are the only store: everything else is derived from them."""

    folder: Path
    questions: list[Question]
    size: int
    each: int = 1
    ending: str = ".jsonl"

    def check_order(self, split: list[Question]) -> None:
        """Refuse to go on if a stored block holds other questions than `split` has at its place: rows
        may be appended to a file, but one before them moves all others to other blocks."""
        for path in sorted(self.folder.glob(f"[0-9]*-*[0-9]{self.ending}")):
            number, n = map(int, path.name.removesuffix(self.ending).split("-"))
            here = split[number * self.size :][:n]
            for r, q in zip(self._records(path)[:: self.each], here):
                same = (r["id"], r["question"]) == (q.id, q.text)
                need(same, f"{self.folder} has question {r['id']} where the file has {q.name} now; "
                     "append new rows at the end, or choose another --out-dir")  # fmt: skip

    def numbers(self) -> range:
        return range(-(-len(self.questions) // self.size))

    def block(self, i: int) -> list[Question]:
        return self.questions[i * self.size : (i + 1) * self.size]

    def path(self, i: int) -> Path:
        """The file of block i. A block of fewer questions (--limit) is another file."""
        return self.folder / f"{i:06d}-{len(self.block(i))}{self.ending}"

    def _records(self, path: Path) -> list[dict]:
        """The records of a block file; [] if it is missing or damaged."""
        with contextlib.suppress(SertError):
            return list(read_jsonl(path, {"id": str, "question": str}))
        return []

    def read(self, i: int) -> list[dict] | None:
        """The records of block i; None if its file is missing, damaged, or of other questions."""
        wanted = [(q.id, q.text) for q in self.block(i) for _ in range(self.each)]
        records = self._records(self.path(i))
        return records if [(r["id"], r["question"]) for r in records] == wanted else None

    def missing(self) -> list[int]:
        return [i for i in self.numbers() if self.read(i) is None]

    def write(self, i: int, records: list[dict]) -> None:
        self.folder.mkdir(exist_ok=True)
        write_atomic(self.path(i), map(to_line, records))


def convert_older(out: Path, settings: dict, blocks: Blocks, split: list[Question]) -> None:
    """Bring a folder of an earlier version into today's form. Its samples stand in paths.jsonl, those
    of the last finished blocks perhaps still in blocks/, and its settings.json also holds the limits
    of the rules. Everything behind a torn line is sampled anew."""
    path, old, n = out / "settings.json", out / "paths.jsonl", 0
    if not {rule.flag for rule in filters.RULES} & read_json(path).keys():
        return
    need(WORLD == 1, f"{out} is of an earlier version; run once without torchrun to convert it")
    form = filters.SAMPLED
    with contextlib.suppress(SertError):  # the file is torn, or not there yet
        for _ in read_jsonl(old, form):
            n += 1
    records, blocks = read_jsonl(old), blocks._replace(questions=split[: n // blocks.each])
    for i in blocks.numbers():
        part = itertools.islice(records, len(blocks.block(i)) * blocks.each)
        blocks.write(i, [{k: r[k] for k in form} for r in part])
    write_atomic(path, json.dumps(settings, indent=1) + "\n")


class Student(NamedTuple):
    """A model folder, and what it says of itself."""

    name: str  # what --model named
    folder: Path
    label: str  # its root parent's name: the MODEL in output folders
    sert: dict  # sert.json of a checkpoint of ours; {} for a foreign model

    @property
    def commit(self) -> str | None:
        """The hub commit that it, or the student that it was trained from, was downloaded from."""
        cached = self.folder.parent.name == "snapshots"  # in huggingface_hub's cache
        return self.sert.get("commit") or (self.folder.name if cached else None)

    @property
    def suffix(self) -> str:
        """What stands behind `Answer:` in the prompts that the student was trained with."""
        return self.sert.get("prompt_suffix", "")


def open_student(name: str | None, task: str) -> Student:
    """Find (and if need be download) the student `name`; None stands for the task's own."""
    name = name or tasks.get(task).student
    folder = find_model(name)
    student = Student(name, folder, model_label(name, folder), read_sert(folder))
    if student.commit:
        print(f"{name}: commit {student.commit} of the hub")
    return student
