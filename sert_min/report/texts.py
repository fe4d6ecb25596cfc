"""Results for texts that exist already: metrics of anybody's outputs, judge scores of paths."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from sert_min import tasks
from sert_min.io.asking import end_if_missing
from sert_min.io.endpoint import WHOLE
from sert_min.io.errors import SertError, need
from sert_min.io.files import read_jsonl, to_line, write_atomic
from sert_min.metrics import grade, summarize, without_nan
from sert_min.questions import LETTERS, Question, choices_of, question_in, stem
from sert_min.report import judge
from sert_min.report.console import print_metrics
from sert_min.report.judge import Judge

JUDGED = dict.fromkeys(("task", "id", "question", "answer", "text"), str)  # keys of a path


def question_of(row: dict, task: str, known: Callable[[], dict]) -> Question:
    """The question of a record. Its options come from its own text, else from the dataset: `known()`
    gives questions by id and by text, with and without options. Without a text they are letters."""
    answer, text = row.get("answer"), row.get("question")
    name, text = str(row.get("id", row.get("index", ""))), text if isinstance(text, str) else ""
    if tasks.is_own(task):
        q = known().get(name) or known().get(text.strip()) or known().get(stem(text))
        if q is None:
            raise ValueError("neither its id nor its question is in the file of --task")
        stated = {q.answer, *(c for a, c in zip(LETTERS, q.choices) if a == q.answer)}
        if answer is not None and str(answer).strip() not in stated:
            raise ValueError(f"the answer of {q.name} is {q.answer!r} there, not {answer!r}")
        return q
    if answer not in ("yes", "no", *LETTERS):
        raise ValueError(f"answer {answer!r} is no letter, yes or no; give --task FILE for others")
    options = choices_of(text) if answer in LETTERS else ()
    if answer in LETTERS[:5] and not text:
        options = ("",) * 5
    elif answer in LETTERS and not options:
        q = known().get(name) or known().get(stem(text))
        if q is None:
            raise ValueError("its question shows no options and is not in the dataset; --task?")
        if q.answer != answer:
            raise ValueError(f"the answer of question {q.id} is {q.answer} in the dataset")
        text, options = q.text, q.choices
    return Question(str(row.get("task", task)), name, text, answer, options)


def text_of(row: dict) -> str:
    """A record's text, or a teacher's rationale with its answer."""
    text, *taught = (row.get(k) for k in ("text", "rationale", "teacher_completion"))
    if isinstance(text, str):
        return text
    if all(isinstance(part, str) for part in taught):
        return " So the answer is ".join(taught)
    raise ValueError("it has neither text nor rationale and teacher_completion")


def evaluate_texts(file: str, about: dict, load: Callable, to: Judge | None, limit: int | None,
                   out_dir: str | None, dry_run: bool) -> None:  # fmt: skip
    """evaluate.py --predictions FILE: the metrics of existing texts, and their scores by the judge
    `to`. `about` holds task and split; `load(split)` gives the task's questions."""
    rows, records, questions = list(read_jsonl(file))[:limit], [], []
    need(rows, f"{file} is empty; check the path")

    @cache
    def known() -> dict[str, Question]:
        everything = [q for split in ("test", "train") for q in load(split)]
        texts = {stem(q.text): q for q in everything} | {q.text: q for q in everything}
        return texts | {q.id: q for q in everything}

    for number, row in enumerate(rows, 1):
        try:
            questions.append(question_of(row, about["task"], known))
            finish = "eos" if row.get("finish") in WHOLE else row.get("finish")  # a teacher's
            records.append(grade(questions[-1], text_of(row), finish))
        except ValueError as e:
            raise SertError(f"{file} line {number}: {e}") from None
    if dry_run:
        return judge.print_plan(records, to, file)
    out, whole = Path(out_dir or Path(file).parent), Path(file).name == "predictions.jsonl"
    other = out_dir and any(out.glob("outputs-*"))
    need(not other, f"{out} holds a model's evaluation; choose another --out-dir")
    need(out_dir or whole or not to, "give --out-dir for the scores of these texts")
    out.mkdir(parents=True, exist_ok=True)
    judge.write_scores(records, {}, to, out)
    judges = judge.summaries(out, len(records)) if to else None
    about = about | {"model": Path(file).stem, "method": "predictions"}
    metrics = without_nan(about | summarize(records, questions, judges=judges))
    print_metrics(file, metrics)
    if out_dir:
        write_atomic(out / "predictions.jsonl", map(to_line, records))
        write_atomic(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        print(f"wrote {out}/predictions.jsonl and metrics.json")
    return end_if_missing(to and to.replies)


def judge_paths(paths: list[str], limit: int | None, to: Judge, dry_run: bool) -> None:
    """evaluate.py --paths: score the paths of the first `limit` questions of sample.py's runs, for
    Figures 1 and 4."""
    for name in paths:
        path = Path(name) / "paths.jsonl" if Path(name).is_dir() else Path(name)
        records = list(read_jsonl(path, JUDGED))
        ids = set(list(dict.fromkeys(r["id"] for r in records))[:limit])
        records = [r for r in records if r["id"] in ids]
        need(records, f"{path} holds no paths; run sample.py first")
        if dry_run:
            judge.print_plan(records, to, str(path))
            continue
        questions = {r["id"]: question_in(r) for r in records}
        judge.write_scores(records, questions, to, path.parent)
        found = judge.summaries(path.parent, len(records))[to.name]
        means = ", ".join(f"{k} {found[k][0]:.2f}" for k in judge.KEYS)
        print(f"{path}: {found['parsed']:,} of {len(records):,} paths judged; {means}")
        end_if_missing(to.replies)
