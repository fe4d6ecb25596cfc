"""Files of teacher outputs: those that other people have published, and our own."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sert_min.io.download import DATA_URL, cache, download, save
from sert_min.io.errors import SertError, need
from sert_min.io.files import read_jsonl
from sert_min.questions import Question, stem
from sert_min.rationales import Output

# The outputs of text-davinci-002, zero-shot CoT, greedy, for StrategyQA: the paper's own teacher, at
# a pinned public commit. Its hash is not published; the number of its entries shows that it is whole.
DAVINCI = f"{DATA_URL.rpartition('/')[0]}/log/strategyqa_zero_shot_cot.log"
ENTRIES = 2290


def davinci_log(task: str) -> Path:
    """The cached file of DAVINCI, downloaded once."""
    need(task == "strategy_qa", "--teacher-file davinci is for --task strategy_qa")
    path = cache() / "teacher" / DAVINCI.rpartition("/")[2]
    if not path.is_file() or len(log_entries(path.read_bytes())) != ENTRIES:
        found = len(log_entries(data := download(DAVINCI)))
        need(found == ENTRIES, f"{DAVINCI} has {found} entries instead of {ENTRIES}; repeat (a cut "
             "download?), or get the file elsewhere and give its path")  # fmt: skip
        save(path, data)
    return path


def read_teacher_file(name: str, questions: list[Question]) -> tuple[dict[str, Output], Counter]:
    """(outputs by question id, counts of what was left out) from "davinci" (DAVINCI) or a file of a
    known form, which its ending tells:

    .jsonl  our own rationales.jsonl, or rows with question, rationale, teacher_completion, and
            optionally id (or index: the row number in the dataset)
    .log    a log of zero_shot_cot (arXiv 2205.11916)
    .json   LLM outputs of distilling-step-by-step (arXiv 2305.02301): one file train_CoT_N.json, or
            a folder of them
    """
    path = Path(name)
    if name == "davinci" and not path.exists():
        path = davinci_log(questions[0].task)
    need(path.exists(), f"--teacher-file {path} does not exist; check the path")
    try:
        if path.is_dir() or path.suffix == ".json":
            found, left = read_step_by_step(path, questions)
        else:
            rows = log_entries(path.read_bytes()) if path.suffix == ".log" else read_jsonl(path)
            found, left = read_rows(rows, questions, path.name)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        why = f"{type(e).__name__}: {str(e)[:80]}"
        raise SertError(f"--teacher-file {path} is in none of the known forms ({why}); `python "
                        "distill.py --help` names them") from None  # fmt: skip
    need(found, f"--teacher-file {path} has no output for any question of this task")
    return found, left


def read_rows(rows: Iterable[dict], questions: list[Question], source: str):
    """Join rows to questions by id (or row number) if the text agrees, else by text; the first of a
    question holds."""
    by_id = {q.id: q for q in questions}
    by_text = {stem(q.text): q for q in reversed(questions)}
    found, left = {}, Counter()
    for row in rows:
        text = row["question"].strip()
        q = by_id.get(str(row.get("id", row.get("index"))))
        if q is None or text not in (stem(q.text), q.text):
            q = by_text.get(stem(text))
        if q is None or q.id in found:
            left["other questions" if q is None else "repeated questions"] += 1
            continue
        completion, finish = row.get("teacher_completion"), row.get("finish")
        if completion is None and "teacher_answer" in row:  # our own record: read and cleaned
            answer = row["teacher_answer"]
            completion, finish = f"{q.write(answer)}." if answer else "", "stop"
        said = row["rationale"]  # null: the teacher said nothing
        texts = isinstance(said, str | None) and isinstance(completion, str | None)
        need(texts, "rationale or teacher_completion is no text", ValueError)
        found[q.id] = Output(said or "", completion, finish, source)
    return found, left


TRIGGER = r"\nTherefore, (?:among [A-Z] through [A-Z], )?the answer(?: \([^)\n]*\))? is\b"


def log_entries(log: bytes) -> list[dict]:
    """The entries of a zero_shot_cot log as rows. An entry has the question, the reasoning, the
    trigger of the second request on a line of its own (the last such line counts, because reasoning
    may say it as well) and `pred_before`, the answer as the teacher gave it. It is read in steps,
    because a single regular expression would take hours on a file that is no log."""
    entries, before, after = [], "\npred_before : ", "\npred_after :"
    text = log.decode("utf-8-sig", "replace").replace("\r\n", "\n")
    for block in re.split(r"^\*{20,}$", text, flags=re.MULTILINE):
        _, found, text = ("\n" + block).partition("\nQ: ")
        question, told, text = text.partition("\nA: Let's think step by step.")
        last = text.rfind(before, 0, max(0, text.rfind(after)))
        triggers = [m for m in re.finditer(TRIGGER, text) if m.end() <= last]
        if found and told and triggers:
            answer = text[text.find(before, triggers[-1].end()) + len(before) :]
            entries.append({
                "question": question.split(" Answer Choices:")[0],
                "rationale": text[: triggers[-1].start()].strip(),
                "teacher_completion": answer.partition(after)[0].strip(),
            })  # fmt: skip
    return entries


def read_step_by_step(path: Path, questions: list[Question]):
    """distilling-step-by-step: train_CoT_N.json holds the outputs from N * 1000 on, in the order of
    the train set. An output may run on into a made-up next question. Only the order ties outputs to
    questions, so at least the options that answers name must be those of their questions."""
    found, left = {}, Counter()
    named = []  # does an answer name an option of its question?
    for file in sorted(path.glob("train_CoT_*.json")) if path.is_dir() else [path]:
        outputs = json.loads(file.read_bytes())
        need(isinstance(outputs, list), f"{file.name} is no list", ValueError)
        first = 1000 * int(file.stem.rpartition("_")[2])
        belongs = questions[first : first + 1000]
        left["other questions"] += max(0, len(outputs) - len(belongs))
        for q, output in zip(belongs, outputs):
            rationale, trigger, said = output.split("Q:")[0].partition("So the answer is")
            completion = said.strip() if trigger else None
            found[q.id] = Output(rationale.strip(), completion, None, file.name)
            if completion and q.choices:
                named.append(any(choice.lower() in completion.lower() for choice in q.choices))
    n = named.count(False)
    need(n <= len(named) / 2, f"{n} answers name no option of their question", ValueError)
    return found, left
