"""Your own questions: files that are read or refused, answers of every kind, and the four scripts."""

import csv
import json
from pathlib import Path

import pytest
from conftest import NO_RULES, refuses, start

import distill
import evaluate
import sample
import train
from sert_min import own, tasks
from sert_min.answers import extract_answer, free_answer, stated_answer
from sert_min.io.files import read_jsonl
from sert_min.patterns import pattern_break
from sert_min.questions import LETTERS, choices_of

WORDS = ["a bank, or two", "shop", "Zürich", "bus stop", "mall", "ox", "née"]
WORDS += [f"word {a}" for a in LETTERS[7:]]
ROWS = [
    *({"question": f"Which of {n}, in row {k}?", "choices": WORDS[:n], "answer": a}
      for n, some in ((2, "AB"), (3, "C"), (5, "E"), (7, "FG"), (26, "IZ")) for k, a in enumerate(some)),
    {"question": "Which, by text?", "choices": WORDS[:5], "answer": "bus STOP"},
    {"question": "Is ice cold?", "choices": ["No", "Yes"], "answer": "(B)"},
    {"question": "What is 500 + 500?", "answer": "1,000"},
    {"question": "What is 2 - 7?", "answer": "-5"},
    {"question": "Wo ist der Zoo?", "answer": "In Zürich, Schweiz"},
    *({"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20, 45))]  # fmt: skip
DRAW = ["--branches", "2", "--samples", "1", "--max-new-tokens", "8", "--block-questions", "8"]


def write(name: str, rows: list[dict], coding="utf-8-sig") -> str:
    """The rows as JSONL or CSV, by the ending."""
    with open(name, "w", encoding=coding, newline="") as f:
        if name.endswith(".jsonl"):
            f.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)))
            table.writeheader()
            table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                            for row in rows)  # fmt: skip
    return name


def read(name: str, rows: list[dict], fields: dict | None = None) -> dict:
    """The questions by split of a file with these rows."""
    return own.read_splits(write(name, rows), fields or {})[0]


@pytest.fixture(autouse=True)
def own_table(empty_folder, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))


def test_jsonl_and_csv_give_the_same_questions():
    """Guards kinds, letters, ids and splits; the fifth for testing does not move with new rows."""
    a = read("q.jsonl", ROWS)
    assert a == read("q.csv", ROWS)
    with open("q.csv", "a") as f:
        f.write(",,\n")  # as spreadsheets end their tables
    assert own.read_splits("q.csv", {})[0] == a
    with open("blank.csv", "w") as f:
        f.write("question,choices,answer\nHow many?, ,12\n")
    assert own.read_questions("blank.csv", {}, "t")[0][1].free
    longer = read("q.jsonl", [*ROWS, {"question": "New?", "answer": "1"}])
    assert all(longer[split][: len(a[split])] == a[split] for split in a)
    everything = sorted(a["train"] + a["test"], key=lambda q: int(q.where[13:]))
    assert [q.where for q in everything] == [f"q.jsonl line {i + 1}" for i in range(len(ROWS))]
    assert [q.answer for q in everything[:12]] == [*"ABCEFGIZ", "D", "yes", "1,000", "-5"]
    assert all(q.choices == choices_of(q.text) for q in everything)
    kinds = ["with 26 options", "with 5 options", "yes/no", "number", "number", "free text"]
    assert [own.kind(q) for q in everything[7:13]] == kinds
    assert 2 <= len(a["test"]) <= 14
    renamed = [{"prompt": row["question"], "label": row["answer"]} for row in ROWS[-9:]]
    found = read("r.csv", renamed, own.parse_fields("question=prompt, answer=label"))["train"]
    wanted = [q for q in everything[-9:] if q in a["train"]]
    assert [(q.text, q.answer) for q in found] == [(q.text, q.answer) for q in wanted]


def test_yes_no_files_and_splits():
    """Guards a file of true and false, the split field, and --test-file with its overlap."""
    rows = [{"question": f"{i}?", "answer": a} for i, a in enumerate(("true", False, "No", "YES"))]
    found = read("a.jsonl", rows)
    answers = {q.text: q.answer for q in found["train"] + found["test"]}
    assert answers == {"0?": "yes", "1?": "no", "2?": "no", "3?": "yes"}
    mixed = read("b.jsonl", [*rows, {"question": "x", "answer": "maybe"}])
    assert all(q.free for q in mixed["train"] + mixed["test"])
    split = [row | {"split": "Test" if i % 2 else "train"} for i, row in enumerate(rows)]
    texts = {k: [q.text for q in some] for k, some in read("c.csv", split).items()}
    assert texts == {"train": ["0?", "2?"], "test": ["1?", "3?"]}
    found, twice = own.read_splits("a.jsonl", {}, write("t.jsonl", rows[:1] + [ROWS[-1]]))
    assert (len(found["train"]), len(found["test"]), twice) == (4, 2, 1)
    refuses("use one of the two", own.read_splits, "c.csv", {}, "t.jsonl")


CHOSEN = [  # choices, answer, what is said
    (["x", "y"], "z", r"'z' is none of .*\(A\) x, \(B\) y"), (["B", "y"], "B", r"write \(B\) or \(A\)"),
    (["x", "y"], 1, "may be an index"), (["x", "y"], "1", "may be an index"),
    (["x", " "], "A", r"option \(B\) is empty"), (["x", "X "], "A", "two options are 'x'"),
    (["x"], "A", "1 choices; 2 to 26"), ([*map(str, range(27))], "A", "27 choices; 2 to 26"),
    ({"A": "x"}, "A", "not a list"), (["x, (B) z", "y"], "A", "another list of options"),
    (["yes", "no"], "maybe", "neither yes nor no")]  # fmt: skip


@pytest.mark.parametrize("row, message", [
    *(({"question": "q", "choices": c, "answer": a}, message) for c, a, message in CHOSEN),
    ({"question": " ", "answer": "1"}, "no question"),
    ({"question": "q", "answer": None}, "no answer"),
    ({"prompt": "q", "answer": "1"}, "no question; --fields"),
    ({"question": "q", "answer": "1", "split": "dev"}, "'dev' is neither"),
    ({"question": "ok", "answer": "2"}, "question 'ok' stands in line 1"),
    ({"question": "q", "answer": "2", "id": "x"}, "id 'x' stands in line 1"),
])  # fmt: skip
def test_a_bad_row_is_named_by_its_line(row, message):
    first = {"question": "ok", "answer": "1", "id": "x", "split": "train"}
    first = {k: v for k, v in first.items() if k in row or k in ("question", "answer")}
    refuses(f"q.jsonl line 2: .*{message}", read, "q.jsonl", [first, row])


@pytest.mark.parametrize("name, content, message", [
    ("q.csv", b"question,answer\nx\n", "line 2: its cells"),
    ("q.csv", b'question,answer\n"a\nb",1\nx,1,2\n', "line 4: its cells"),
    ("q.csv", b"question,answer\n\xff,1\n", "can't be read"), ("q.jsonl", b"\n", "no questions"),
    ("q.jsonl", b'{"question": "x"', "line 1 is not JSON"),
    ("q.csv", b"text,answer\nx,1\n", "its header is .*--fields"),
    ("q.csv", b"question;answer\nx;1\n", "separate columns by commas"),
])  # fmt: skip
def test_a_bad_file_is_refused(name, content, message):
    Path(name).write_bytes(content)
    refuses(message, tasks.open_task, name)


def test_what_is_no_task_is_refused():
    write("a.jsonl", ROWS)
    for name, fields in (("none.jsonl", None), ("what", None), ("micro", "question=q"),
                         ("a.jsonl", "q=x"), ("a.jsonl", "question")):  # fmt: skip
        refuses(".", tasks.open_task, name, fields)
    refuses("none.csv", tasks.open_task, "a.jsonl", None, "none.csv")


FREE = {  # gold: (texts that state it, texts that do not)
    "30": (("30", "$30.00.", "5 x 6 = 30.", "30 apples.", "30, because 2 + 2 is 4."),
           ("not 30.", "20 or 30", "30-40", "3:30", "-30", "three")),
    "1,000": (("1000.", "1,000", "1,000.0"), ("1", "1,0000")),
    "-5": (("-5.", "−5"), ("5", "- 5 or 5")),
    "1/2": (("0.5", ".5"), ("12", "1 or 2")),
    "3:30": (("3:30.",), ("330", "30")),
    "The Eiffel Tower": (('the "eiffel tower".', "Eiffel Tower"), ("the tower", "Eiffel")),
    "St. Louis": (("St. Louis. It lies",), ("St. Paul. Louis",)),
    "World War 2": (("World War 2.",), ("2", "Part 2")),
    "Café": (("cafe\u0301",), ("cafe",)), "Straße": (("STRASSE.",), ("Strase",))}  # fmt: skip


@pytest.mark.parametrize("gold", FREE)
def test_free_answers(gold):
    """Guards numbers read by value, and texts compared as SQuAD does."""
    right, wrong = FREE[gold]
    assert [free_answer(" " + text, gold) for text in right] == [gold] * len(right)
    assert gold not in [free_answer(" " + text, gold) for text in wrong]


def test_answers_of_each_kind_are_graded():
    """Guards letters beyond E: every question's own answer is read, and another one is not it."""
    splits = read("q.jsonl", ROWS)
    for q in splits["train"] + splits["test"]:
        other = "17" if q.free else next(a for a in q.answers if a != q.answer)
        for reads in (extract_answer, stated_answer):
            assert reads(f"We think. So the answer is {q.write()}.", q) == q.answer
            assert reads(f"We think. So the answer is {q.write(other)}.", q) != q.answer
        direct = f"So the answer is {q.write()}."
        assert pattern_break(direct, q) == "direct"
        assert pattern_break(f"It is so. {direct}", q) is None
    (q,) = [q for q in splits["train"] + splits["test"] if q.answer == "I"]
    assert extract_answer("the answer is I think that", q) is None
    assert extract_answer("the answer is I.", q) == "I"
    assert pattern_break("It is (Y) word Y or (Z) word Z, one of them.", q) == "options"


def run(script, file: str, model: Path, *more: str) -> Path:
    start(script, "--task", file, "--model", model, "--device", "cpu", *more)
    return Path("out") / own.task_label(file, {})


def test_the_four_scripts(model, capsys):
    """Guards a file's way through the program: sampling, training, a teacher's file, evaluation."""
    a = run(sample, write("q.jsonl", ROWS), model, *DRAW, *NO_RULES)
    assert "next: python train.py --task q.jsonl --model" in capsys.readouterr().out
    b = run(sample, write("q.csv", ROWS), model, *DRAW, *NO_RULES)
    paths, other = (next(out.glob("*/*/*/paths.jsonl")) for out in (a, b))
    assert paths.read_bytes() == other.read_bytes()
    assert {r["task"] for r in read_jsonl(paths)} == {"q"}
    train_flags = ["--max-steps", "1", "--report", "2"]
    run(train, "q.jsonl", model, *train_flags)
    questions = tasks.load(a.name, "train")
    taught = [{"id": q.id, "question": q.text, "rationale": f"We think. So the answer is {q.write()}."}
              for q in questions]  # fmt: skip
    write("t.jsonl", taught, "utf-8")
    run(distill, "q.jsonl", model, "--teacher-file", "t.jsonl", *train_flags)
    kept = list(read_jsonl(next(a.glob("*/rd/seed0/rationales.jsonl"))))
    assert [r["kept"] for r in kept] == [True] * len(questions)
    run(evaluate, "q.jsonl", model, "--max-new-tokens", "4")
    assert list(a.glob("*/base/metrics.json"))
    refuses("have numbers or free texts", run, evaluate, "q.jsonl", model, "--by", "likelihood")
    (predictions,) = a.glob("*/base/predictions.jsonl")
    run(evaluate, "q.jsonl", model, "--predictions", predictions, "--out-dir", "again")
    assert Path("again/predictions.jsonl").read_bytes() == predictions.read_bytes()


def test_likelihood_again_and_texts_in_the_form_of_the_file(model, capsys):
    """Guards evaluation of a file whose likelihood is stored already, and texts that name a question
    of the file by its own question or id, with its option's text as answer or a teacher's reply."""
    rows = [{"question": f"Where is {i}?", "choices": ["sea", "sky"], "answer": "sky", "id": f"n{i}"}
            for i in range(20)]  # fmt: skip
    write("o.jsonl", rows, "utf-8")
    for _ in range(2):
        run(evaluate, "o.jsonl", model, "--max-new-tokens", "2", "--by", "likelihood")
    assert "Acc, by likelihood" in capsys.readouterr().out
    said = {"rationale": "It is up.", "teacher_completion": "(B).", "finish": "stop"}
    texts = [{"question": "Where is 3?", "answer": "sky", **said}, {"id": "n4", **said}]
    write("t.jsonl", texts, "utf-8")
    run(evaluate, "o.jsonl", model, "--predictions", "t.jsonl", "--out-dir", "t")
    assert [r["format_ok"] for r in read_jsonl("t/predictions.jsonl")] == [True, True]
    for bad, message in (({"answer": "sea", "id": "n3"}, "is 'B' there, not 'sea'"),
                         ({"question": "Who?"}, "neither its id nor its question")):  # fmt: skip
        write("t.jsonl", [{**said, **bad}], "utf-8")
        refuses(message, run, evaluate, "o.jsonl", model, "--predictions", "t.jsonl")


def test_rows_are_appended_but_not_inserted(model, monkeypatch):
    """Guards that only the last, short block is made anew, and that blocks never shift."""
    made, real = [], sample.sample_paths
    monkeypatch.setattr(sample, "sample_paths", lambda *a: made.append(len(a[2])) or real(*a))
    n = len(read("q.jsonl", ROWS)["train"])
    out = run(sample, "q.jsonl", model, *DRAW, *NO_RULES)
    before = next(out.glob("*/*/*/paths.jsonl")).read_text().splitlines()
    new = [{"question": f"What is {i} - 1?", "answer": str(i - 1), "split": ""} for i in range(10)]
    more = len(read("q.jsonl", [*ROWS, *new])["train"])
    made.clear()
    run(sample, "q.jsonl", model, *DRAW, *NO_RULES)
    assert sum(made) == more - n // 8 * 8
    assert next(out.glob("*/*/*/paths.jsonl")).read_text().splitlines()[: len(before)] == before
    write("q.jsonl", [{"question": "First?", "answer": "1", "id": "new"}, *ROWS])
    refuses("append new rows at the end", run, sample, "q.jsonl", model, *DRAW, *NO_RULES)


def test_dry_run_and_hint(model, capsys):
    """Guards what --dry-run says of a file, and the way out where no path passes."""
    write("q.jsonl", ROWS)
    run(sample, "q.jsonl", model, "--dry-run", *DRAW)
    told = capsys.readouterr().out
    assert "free text" in told and "with 26 options" in told and "longest prompt has" in told
    run(sample, "q.jsonl", model, *DRAW, *NO_RULES, "--min-perplexity", "1e9")
    told = capsys.readouterr().out
    assert "few paths passed: perplexity dropped" in told and "half below" in told
    assert "next:" not in told  # train.py could only refuse
    limit = told.rpartition("--refilter --min-perplexity ")[2].split()[0]
    run(sample, "q.jsonl", model, *DRAW, *NO_RULES, "--min-perplexity", limit, "--refilter")
    assert "few paths" not in capsys.readouterr().out
