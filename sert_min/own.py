"""Your own questions: a JSONL or CSV file with one question a row (`--task FILE`).

    {"question": "Where is money kept?", "choices": ["bank", "shop"], "answer": "A"}   options, 2 to 26
    {"question": "Is ice cold?", "choices": ["yes", "no"], "answer": "yes"}            yes or no
    {"question": "How many legs have 3 dogs?", "answer": "12"}                         free: no options

In a file without any choices whose every answer is yes, no, true or false, all questions are yes/no
questions. `answer` is an option's letter or text. `id` and `split` (train or test) may be left out:
then the id is a hash of the question, and by that hash one row in five is a test question.
"""

import csv
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from sert_min.answers import number_in
from sert_min.io.errors import SertError, need
from sert_min.io.files import clean_name, read_lines, there
from sert_min.io.parallel import RANK
from sert_min.questions import LETTERS, Question, choices_of, with_choices

FIELDS = ("question", "answer", "choices", "id", "split")
YES_NO = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
SPLITS = ("train", "test")
ENDINGS = (".jsonl", ".csv")


def open_file(name: str, fields: str | None, test_file: str | None) -> tuple[str, Callable, str]:
    """(the task's name, its reader, the flags that name it) of a file of questions."""
    mapped = parse_fields(fields)
    splits, twice = read_splits(name, mapped, test_file)
    if twice and RANK == 0:
        print(f"{twice:,} questions of {test_file} are in {name}, too: the student trains on them")
    given = {"--task": name, "--fields": fields, "--test-file": test_file}
    flags = shlex.join(part for pair in given.items() if pair[1] for part in pair)

    def read(split: str, data_dir: Path | None) -> list[Question]:
        need(not data_dir, f"--data-dir is of no use for {name}; leave it out")
        need(splits[split], f"{name} has no {split} questions; add some, or give a --test-file")
        return splits[split]

    return task_label(name, mapped), read, flags


def parse_fields(text: str | None) -> dict[str, str]:
    """{our name: the file's name} of `--fields question=prompt,answer=label`."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    fields = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    known = set(fields) <= set(FIELDS) and all(fields.values()) and len(fields) == len(pairs)
    need(known, f"--fields takes OURS=THEIRS,.. with {', '.join(FIELDS)} on the left, not {text!r}")
    return fields


def task_label(file: str, fields: dict[str, str]) -> str:
    """The task's name in output folders: the file's stem and a hash of its place and field map. The
    content is no part of it, so rows can be appended later."""
    where = json.dumps([os.path.abspath(file), sorted(fields.items())])
    return f"{clean_name(Path(file).stem)}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def read_splits(
    file: str, fields: dict[str, str], test_file: str | None = None
) -> tuple[dict[str, list[Question]], int]:
    """({split: its questions in the order of the file}, how many test questions are train questions
    as well). All rows of a `test_file` are test questions, and those of `file` train questions."""
    task = Path(file).stem
    rows = read_questions(file, fields, task)
    if test_file is None:
        given = [split for split, _ in rows if split]
        need(len(given) in (0, len(rows)), f"{file}: some rows have a split and others have none")
        splits = {name: [q for s, q in rows if (s or split_by_hash(q)) == name] for name in SPLITS}
        return splits, 0
    tests = read_questions(test_file, fields, task)
    two = any(split for split, _ in rows + tests)
    need(not two, f"{file} has a split field, and --test-file is given; use one of the two")
    train, test = ([q for _, q in some] for some in (rows, tests))
    texts = {q.text for q in train}
    return {"train": train, "test": test}, sum(q.text in texts for q in test)


def split_by_hash(q: Question) -> str:
    """A fixed fifth is for testing; a row that is appended changes the side of no other."""
    return "test" if hashlib.sha256(f"split {q.text}".encode()).digest()[0] < 51 else "train"


def read_questions(file: str, fields: dict[str, str], task: str) -> list[tuple[str, Question]]:
    """(split or "", question) of every row, whose fields are renamed. An error names its line."""
    names, out, seen = {name: fields.get(name, name) for name in FIELDS}, [], {}
    is_table, fix = file.lower().endswith(".csv"), f"mend that line of {file}"
    found = read_table(file, names["question"]) if is_table else read_lines(file, fix)
    rows = [(line, {ours: row.get(name) for ours, name in names.items()}) for line, row in found]
    need(rows, f"{file} has no questions; write one a row")
    answers = {str(row.get("answer")).strip().lower() for _, row in rows}
    yes_no = not any(row.get("choices") for _, row in rows) and answers <= set(YES_NO)
    for line, row in rows:
        try:
            q = make_question(row, task, f"{Path(file).name} line {line}", yes_no)
            for what in ("question " + repr(q.text), f"id {q.id!r}"):
                first = seen.setdefault(what, line)
                need(first == line, f"the {what[:80]} stands in line {first} already", ValueError)
            split = str(row.get("split") or "").strip().lower()
            need(split in ("", *SPLITS), f"split {split!r} is neither train nor test", ValueError)
        except ValueError as e:
            raise SertError(f"{file} line {line}: {e}") from None
        out.append((split, q))
    return out


def read_table(file: str, question: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of a CSV file with a column `question`; empty rows are passed over."""
    try:
        with open(there(file), encoding="utf-8-sig", newline="") as f:
            reader, line = csv.DictReader(f, strict=True), 2
            need(question in (reader.fieldnames or ()), f"{file}: its header is "
                 f"{reader.fieldnames}; separate columns by commas, or give --fields")  # fmt: skip
            for row in reader:
                wrong = None in row or None in row.values()
                need(not wrong, f"{file} line {line}: its cells are not those of the header")
                row = {name: cell.strip() for name, cell in row.items()}
                if any(row.values()):
                    yield line, row
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as e:
        raise SertError(f"{file} can't be read ({e}); save it as a table in UTF-8") from None


def make_question(
    row: dict, task: str = "own", where: str = "", yes_no: bool | None = None
) -> Question:
    """The question of a row {question, answer, choices, id}. Without choices it is a yes/no question
    if `yes_no` says so (None: if its answer is yes, no, true or false), else its answer is free. A
    row that can't be understood is a ValueError."""
    text, answer = row.get("question"), row.get("answer")
    for name, value, kinds in (("question", text, str), ("answer", answer, str | int | float)):
        told = f"it has no {name}; --fields {name}=NAME names the field that holds it"
        need(isinstance(value, kinds) and str(value).strip(), told, ValueError)
    said, choices, text = str(answer).strip(), read_choices(row.get("choices")), text.strip()
    yes_no = said.lower() in YES_NO if yes_no is None else yes_no
    yes_no = {c.lower() for c in choices} == {"yes", "no"} or (yes_no and not choices)
    free = not (choices or yes_no)
    if yes_no:
        if choices and (bare := said.strip("()").upper()) in ("A", "B"):
            said = choices["AB".index(bare)]
        need(said.lower() in YES_NO, f"answer {said!r} is neither yes nor no", ValueError)
        said, choices = YES_NO[said.lower()], ()
    elif choices:
        said = letter_of(answer, choices)
        text = with_choices(text, choices)
        told = "its text reads like another list of options; leave `(A) ..` out of it"
        need(choices_of(text) == choices, told, ValueError)
    name = "" if row.get("id") is None else str(row["id"]).strip()
    name = name or hashlib.sha256(text.encode()).hexdigest()[:12]
    return Question(task, name, text, said, choices, free=free, where=where)


def read_choices(choices) -> tuple[str, ...]:
    """The options of a row: a list, or in a CSV cell a JSON list or texts with `|` between them."""
    if isinstance(choices, str):
        try:
            choices = json.loads(choices) if choices.strip()[:1] == "[" else choices.split("|")
        except ValueError:
            raise ValueError("its choices begin with [ but are no JSON list") from None
        choices = [] if choices == [""] else choices
    need(isinstance(choices or [], list), "its choices are not a list of texts", ValueError)
    texts = tuple(str(c).strip() if isinstance(c, str | int | float) else "" for c in choices or [])
    n, most = len(texts), len(LETTERS)
    need(not n or 2 <= n <= most, f"it has {n} choices; 2 to {most} are possible", ValueError)
    if not all(texts):
        raise ValueError(f"option ({LETTERS[texts.index('')]}) is empty or no text")
    same = [t for t, n in Counter(" ".join(t.lower().split()) for t in texts).items() if n > 1]
    if same:
        raise ValueError(f"two options are {same[0]!r}")
    return texts


def letter_of(answer, choices: tuple[str, ...]) -> str:
    """The letter of the option that `answer` names by its letter (`B`, `(B)`) or by its text."""
    said = str(answer).strip()
    shown = ", ".join(f"({a}) {c}" for a, c in zip(LETTERS, choices))
    bare = said[1:-1] if said[:1] + said[-1:] == "()" else said
    by_text = [a for a, c in zip(LETTERS, choices) if c.lower() == said.lower()]
    by_letter = [a for a in LETTERS[: len(choices)] if a == bare.upper()]
    found = set(by_text + by_letter)
    if isinstance(answer, int | float) or (not found and said.lstrip("-").isdigit()):
        raise ValueError(f"answer {said} may be an index; give the option's letter or its text, "
                         f"as a string: {shown}")  # fmt: skip
    if len(found) > 1:
        raise ValueError(f"answer {said!r} is the letter of one option and the text of another; "
                         f"write ({by_letter[0]}) or ({by_text[0]}): {shown}")  # fmt: skip
    need(found, f"answer {said!r} is none of the options {shown}", ValueError)
    return found.pop()


def kind(q: Question) -> str:
    """What kind of answer a question asks for, in words."""
    if q.choices:
        return f"with {len(q.choices)} options"
    if not q.free:
        return "yes/no"
    return "free text" if number_in(q.answer, alone=True) is None else "number"
