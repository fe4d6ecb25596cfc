"""Table II: the paper's numbers beside ours, and which differences between our students are real.

Ours come from the metrics.json of every evaluated checkpoint; several seeds of a cell are averaged.
The average's interval keeps the mean width of one seed's interval: the seeds share the test
questions, so more seeds do not make more questions. `in` and `out` say whether the paper's number
lies in our interval.
"""

import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from sert_min.io.errors import need, printable_lines
from sert_min.io.files import folders_in, read_json, read_jsonl, write_atomic
from sert_min.metrics import mean_interval, without_nan

METHODS = ("finetune", "star", "sert", "sert-rd", "rd")  # in the paper's order; STaR is ours
COLUMNS = {
    "acc": "Acc % [95 %]", "acc_likelihood": "by likelihood", "acc_text": "of the text",
    "reasoning": "reasoning", "contradictory": "contradicts",
    "fmt": "Fmt", "len": "Len", "rep": "Rep",
}  # fmt: skip
SCALE = {k: 1 if k in ("fmt", "len", "rep") else 100 for k in COLUMNS}  # the others are in %
NAMES = {"base": "base", "finetune": "Finetune", "star": "STaR", "sert": "SERT",
         "sert-rd": "SERT+RD", "rd": "RD", "teacher": "zero-shot CoT"}  # fmt: skip
TEACHER = "GPT-3.5"
# Acc in %, Fmt, Len, Rep by task and "model method" [SERT Table II]; Finetune states answers only.
# Several accuracies are no k / 687 or k / 1221, and the teacher's row fits the full sets.
PAPER = read_json(Path(__file__).with_name("table2.json"))


def find_metrics(folder: Path) -> list[tuple[Path, dict]]:
    """(path, content) of the metrics.json of test sets anywhere under `folder`, in order of their
    path; other splits, prompts and checkpoints are left out."""
    found = []
    for path in (p / "metrics.json" for p in folders_in(folder) if (p / "metrics.json").exists()):
        m = read_json(path)
        if m.get("split") == "test" and not m.get("variant") and str(m.get("method")) in NAMES:
            whole = {"task", "model", "n", "majority"} <= m.keys()
            need(whole, f"{path} is not what evaluate.py writes; evaluate that model again")
            found.append((path, m))
    return found


def pooled(metrics: list[dict], key: str) -> tuple | None:
    """(value, low, high) of a metric, several seeds as one; None without any value."""
    values = [v for m in metrics if (v := m.get(key)) and v[0] is not None]
    if not values:
        return None
    spans = [v for v in values if None not in v]
    mean, n = math.fsum(v[0] for v in values) / len(values), len(spans) or math.nan
    low = mean - math.fsum(v[0] - v[1] for v in spans) / n
    high = mean + math.fsum(v[2] - v[0] for v in spans) / n
    return tuple(SCALE[key] * v for v in (mean, low, high))


def table_rows(found: list[tuple[Path, dict]], task: str) -> list[dict]:
    """One row per model and method: the paper's cells, and what else was evaluated. `n` counts test
    questions (0: not evaluated); `ours` is metric -> (mean, low, high), NaN for no interval;
    `paper` is metric -> value; shares are in %."""
    metrics = [m for _, m in found if m["task"] == task]
    paper, rows = PAPER.get(task, {}), []
    models = dict.fromkeys([cell.split()[0] for cell in paper] + [m["model"] for m in metrics])
    for model, method in itertools.product(models, ("teacher", "base", *METHODS)):
        some = [m for m in metrics if (m["model"], m["method"]) == (model, method)]
        printed = paper.get(f"{model} {method}", ())
        # a model that the paper lacks gets its four rows too: missing cells stay empty
        wanted = method in METHODS and method != "star" and model != TEACHER
        if some or printed or wanted:
            # Finetune gives answers only: the paper prints its accuracy alone
            keys = [k for k in COLUMNS if method != "finetune" or k.startswith("acc")]
            ours = {k: v for k in keys if (v := pooled(some, k))}
            theirs = {k: v for k, v in zip(("acc", "fmt", "len", "rep"), printed) if v is not None}
            row = {"model": model, "method": method, "n": min((m["n"] for m in some), default=0)}
            rows.append({**row, "seeds": len(some), "ours": ours, "paper": theirs})
    return rows


# --- paired differences ---------------------------------------------------------------------------

PAIRS = (("sert", "base"), ("sert", "finetune"), ("sert", "star"), ("sert-rd", "rd"),
         ("sert-rd", "sert"))  # fmt: skip
VALUES = {  # of a record of predictions.jsonl or likelihood.jsonl, by the name of the metric
    "acc": "correct", "acc_likelihood": "correct", "acc_text": "correct_per_character",
    "fmt": "format_ok", "len": "words", "rep": "rep1",
}  # fmt: skip


def question_values(folder: Path, metric: str) -> dict[str, float]:
    """Each question's value of a metric in one evaluated folder."""
    path = folder / ("likelihood.jsonl" if metric.startswith("acc_") else "predictions.jsonl")
    records = read_jsonl(path) if path.exists() else ()
    return {r["id"]: r[VALUES[metric]] for r in records if r.get(VALUES[metric]) is not None}


def difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> tuple | None:
    """(mean, low, high) of a - b, two lists of question values, one per seed. The 95 % interval
    covers the choice of questions, paired, and of seeds; None if no question has all values."""
    ids = set(a[0]).intersection(*a, *b)
    if not ids:
        return None
    x, y = ([statistics.fmean(seed[id] for seed in some) for id in ids] for some in (a, b))
    mean, low, _ = mean_interval([u - v for u, v in zip(x, y)])
    by_seed = ([statistics.fmean(seed[id] for id in ids) for seed in some] for some in (a, b))
    of_seeds = sum(statistics.variance(some) / len(some) for some in by_seed if len(some) > 1)
    half = math.hypot(mean - low, 1.959964 * math.sqrt(of_seeds))
    return mean, mean - half, mean + half


def differences(found: list[tuple[Path, dict]], task: str) -> list[dict]:
    """For each model and two of its students, how far the first lies above the second on the same
    questions: metric -> (mean, low, high), accuracies in points."""
    folders = defaultdict(list)
    for path, m in found:
        if m["task"] == task:
            folders[m["model"], m["method"]].append(path.parent)
    rows = []
    for model, pair in itertools.product(dict.fromkeys(m for m, _ in folders), PAIRS):
        sides, values = [folders[model, method] for method in pair], {}
        for metric in VALUES if all(sides) else ():
            a, b = ([question_values(folder, metric) for folder in side] for side in sides)
            if found_one := difference(a, b):
                values[metric] = tuple(SCALE[metric] * v for v in found_one)
        if values:
            rows.append({"model": model, "methods": list(pair), **values})
    return rows


# --- as text --------------------------------------------------------------------------------------


def cell(ours: tuple | None, paper: float | None, interval: bool) -> str:
    """Our value, its interval where asked for, and the paper's number with its mark."""
    text = f"{ours[0]:.2f}" if ours else ""
    if ours and interval:
        text += f" [{ours[1]:.1f}, {ours[2]:.1f}]"
    if paper is not None:
        known = ours and not math.isnan(ours[1])
        mark = "" if not known else ", in" if ours[1] <= paper <= ours[2] else ", out"
        text += f" (paper {paper:.2f}{mark})"
    return text.strip()


def table_grid(rows: list[dict]) -> list[list[str]]:
    """The table as text, a header line first."""
    keys = [k for k in COLUMNS if any(k in row["ours"] | row["paper"] for row in rows)]
    lines = [["", *(COLUMNS[k] for k in keys), "n"]]
    for row in rows:
        cells = [cell(row["ours"].get(k), row["paper"].get(k), k == "acc") for k in keys]
        n = f"{row['n']:,}" + (f" x {row['seeds']} seeds" if row["seeds"] > 1 else "")
        if not row["n"]:
            n = "not evaluated" if row["method"] == "base" else "not trained"
        lines.append([f"{row['model']} {NAMES[row['method']]}", *cells, n])
    return lines


def difference_grid(rows: list[dict]) -> list[list[str]]:
    """The differences as text, a header line first; a star marks an interval without 0."""
    keys = [k for k in COLUMNS if any(k in row for row in rows)]
    lines = [["difference, same questions", *(COLUMNS[k].replace(" [95 %]", "") for k in keys)]]
    for row in rows:
        a, b = (NAMES[method] for method in row["methods"])
        lines.append([f"{row['model']} {a} - {b}"])
        for mean, low, high in (row.get(k, (math.nan,) * 3) for k in keys):
            mark = "*" if low > 0 or high < 0 else ""
            text = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]{mark}"
            lines[-1].append("" if math.isnan(low) else text)
    return lines


def tables(found: list[tuple[Path, dict]]) -> str:
    """The aligned tables of all tasks that were evaluated."""
    text, tasks = [], sorted({m["task"] for _, m in found})
    for task in tasks:
        sets = {(m["n"], *m["majority"]) for _, m in found if m["task"] == task}
        text += [f"{task} test, {n:,} questions; always saying {answer} scores {100 * share:.2f} %"
                 for n, answer, share in sorted(sets, reverse=True)] + [""]  # fmt: skip
        rows = differences(found, task)
        for lines in (table_grid(table_rows(found, task)), difference_grid(rows) if rows else []):
            widths = [max(map(len, column)) for column in zip(*lines)]
            text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines] + [""]
    if PAPER.keys() & tasks:
        text.append("in, out: the paper's number lies inside or outside our 95 % interval")
    return "\n".join(text).rstrip() + "\n"


def print_table(folder: Path) -> None:
    """Table II of everything under `folder`, printed and kept there."""
    found = find_metrics(folder)
    need(found, f"no metrics.json under {folder}; run evaluate.py on some checkpoints first")
    text, numbers = tables(found), {}
    print(printable_lines(text), end="")
    for task in sorted({m["task"] for _, m in found}):
        rows = [row for row in table_rows(found, task) if row["n"]]
        numbers[task] = {"rows": rows, "differences": differences(found, task)}
    write_atomic(folder / "table.json", json.dumps(without_nan(numbers), indent=1) + "\n")
    write_atomic(folder / "table.txt", text)
