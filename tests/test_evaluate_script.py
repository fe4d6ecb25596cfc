"""evaluate.py as a user runs it: records, resume, likelihood, existing texts, Table II."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_checkpoint, make_tiny_model, refuses, shared, start

import evaluate
from sert_min import tasks
from sert_min.io.files import read_jsonl, to_line, write_atomic
from sert_min.metrics import grade, greedy
from sert_min.models import load_model
from sert_min.prompts import answer_sentence, question_prompt
from sert_min.questions import Question
from sert_min.report import table
from sert_min.report.likelihood import answer_logprobs, likelihood_record, make_tree, weigh_answers
from sert_min.report.texts import question_of
from sert_min.tokenizer import load_tokenizer

FIELDS = ["task", "id", "question", "answer", "text", "extracted", "extracted_lenient", "correct",
          "finish", "format_ok", "reason", "words", "rep1", "rep2_words"]  # fmt: skip
pytestmark = pytest.mark.usefixtures("empty_folder")
run = partial(start, evaluate)


def run_blocks(model, limit, folder, *more) -> None:
    """Evaluate a model on so many questions, in blocks of two."""
    run("--model", model, "--device", "cpu", "--max-new-tokens", 8, "--block-questions", 2,
        "--limit", limit, "--out-dir", folder, *more)  # fmt: skip


def as_checkpoint(model: Path, folder: str, **sert) -> Path:
    """A run folder whose last/ is `model` under another name."""
    about = {"method": "sert", "root": "gpt2", "task": "micro", "seed": 0, "prompt_suffix": ""}
    return make_checkpoint(model, Path(folder, "last"), **{**about, **sert}).parent


def derived(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def test_records_and_metrics(model, capsys):
    """Guards a dry run that writes, the record form that others read, metrics with timings inside."""
    judged = ["--judge-model", "m", "--base-url", "http://localhost:1/v1", "--price-in", 1]
    run_blocks(model, 5, "o", "--dry-run", *judged, "--price-out", 1)
    said = capsys.readouterr().out
    assert "5 of 5 outputs to decode, at most 40 tokens" in said and "Question: " in said
    assert "5 judge requests" in said and "USD" in said and not Path("o").exists()
    run_blocks(model, 5, "o")
    records = list(read_jsonl("o/predictions.jsonl"))
    questions = tasks.load("micro", "test")[:5]
    assert [list(r) for r in records] == [FIELDS] * 5
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    texts = [t for i in (0, 2, 4) for t in greedy(loaded, tokenizer, questions[i:i + 2], "", 8)]  # fmt: skip
    assert records == [grade(q, *t) for q, t in zip(questions, texts)]
    metrics = json.loads(Path("o/metrics.json").read_text())
    assert metrics["n"] == 5 and "seconds" not in json.dumps(metrics) and metrics["seed"] is None
    assert metrics["judges"]["program"]["total"] == 5
    said = capsys.readouterr().out
    for word in ("Acc, strict", "Acc, lenient", "Fmt", "Len", "Rep", "95 %", "always", "judge:",
                 "no readable"):  # fmt: skip
        assert word in said


def test_results_are_those_of_the_questions_asked(model):
    """Guards a short last block that is taken for a whole one, and metrics of another --limit."""
    for limit, folder in ((3, "a"), (5, "a"), (5, "b"), (3, "c")):
        run_blocks(model, limit, folder, "--by", "likelihood")
    assert derived("a") == derived("b")
    run_blocks(model, 3, "a")  # the log-probs are there: no --by
    assert derived("a") == derived("c")
    assert json.loads(Path("a/metrics.json").read_text())["acc_likelihood"]


def test_missing_and_damaged_blocks_are_made_anew(model, monkeypatch):
    """Guards decoding twice, a block of other questions, and metrics of a part after a kill."""
    run_blocks(model, 6, "w")
    before, decoded = derived("w"), []
    (folder,) = Path("w").glob("outputs-*")
    blocks = sorted(folder.glob("*-2.jsonl"))
    assert len(blocks) == 3
    assert list(next(read_jsonl(blocks[0]))) == ["id", "question", "text", "finish"]
    blocks[0].write_bytes(blocks[0].read_bytes()[:-9])
    blocks[1].write_text(blocks[1].read_text().replace('"question":"', '"question":"Not '))

    def once(loaded, tokenizer, questions, *rest, **more):
        assert not {"metrics.json", "predictions.jsonl"} & set(derived("w"))
        decoded.append([q.id for q in questions])
        return greedy(loaded, tokenizer, questions, *rest, **more)

    monkeypatch.setattr(evaluate, "greedy", once)
    for _ in range(2):
        run_blocks(model, 6, "w")
        assert len(decoded) == 2 and derived("w") == before


def test_other_settings_and_weights_are_kept_apart(model, tmp_path, capsys):
    """Guards outputs mixed in or lost, scores of the old outputs, and a table that counts both."""
    seed = as_checkpoint(model, "out/micro/gpt2/sert/seed0")
    words = ["--model", seed, "--limit", 3, "--max-new-tokens", 4]
    run(*words)
    before = derived(seed)
    (seed / "scores-other.jsonl").write_bytes((seed / "scores-program.jsonl").read_bytes())
    run(*words)
    assert (seed / "scores-other.jsonl").exists()  # of these very outputs
    weights = (seed / "last/model.safetensors").read_bytes()
    other = make_tiny_model(tmp_path / "other", seed=9, n_positions=1024)
    (seed / "last/model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    run(*words)
    assert derived(seed)["predictions.jsonl"] != before["predictions.jsonl"]
    assert not (seed / "scores-other.jsonl").exists()
    assert len(list(seed.glob("outputs-*"))) == 2 and len(table.find_metrics(Path("out"))) == 1
    run(*words[:-1], 5)
    assert len(list(seed.glob("outputs-*"))) == 3
    (seed / "last/model.safetensors").write_bytes(weights)
    (seed / "scores-other.jsonl").touch()  # of outputs that are replaced now
    capsys.readouterr()
    run(*words)
    assert derived(seed) == before and "question/s" not in capsys.readouterr().err
    (seed / "evaluation.json").write_text("{}")
    refuses("an evaluation by an earlier version; move", run, *words)


def test_where_results_go(model):
    """Guards a prompt of another form than in training, and results that slip into the table."""
    think = " Let's think step by step."
    seed = as_checkpoint(model, "out/micro/gpt2/rd/seed3", method="rd", seed=3, prompt_suffix=think)

    def cell(name, task="micro", split="test", suffix=None):
        return evaluate.cell_of(str(name), task, split, suffix)

    c = cell(seed)
    assert (c.out, c.student.label, c.method, c.seed) == (seed, "gpt2", "rd", 3)
    assert c.suffix == think and c.variant == ""
    assert cell(seed / "last").out == seed and cell(seed, suffix=think) == c
    other = cell(seed, suffix="Hm.")
    assert other.suffix == " Hm." and other.out.parent == seed
    assert other.variant.startswith("prompt")
    assert cell(seed, split="validation").out == seed / "eval-validation"
    assert cell(seed, task="strategy_qa").out == seed / "eval-strategy_qa"
    shutil.copytree(seed / "last", seed / "best")
    assert cell(seed / "best").out == seed / "eval-best"
    base = cell(model)
    assert base.method == "base" and base.out == Path(f"out/micro/{base.student.label}/base")
    run("--model", seed, "--limit", 2, "--max-new-tokens", 4)
    run("--model", seed, "--limit", 2, "--max-new-tokens", 4, "--split", "train")
    assert len(table.find_metrics(Path("out"))) == 1


def test_answer_logprobs_equal_whole_sequences(model):
    """Guards options that see each other, shifted positions, sums over the wrong tokens."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    for p in loaded.parameters():
        p.data *= 4
    options = ("sea", "a long shopping mall", "sky")
    questions = [Question("commonsense_qa", "c", "Where is he?", "B", options),
                 Question("strategy_qa", "s", "Is it?", "yes")]  # fmt: skip
    texts = ["He swims. So the answer is (A).", ""]
    found = answer_logprobs(loaded, tokenizer, questions, texts, " Hm.")
    by_text = answer_logprobs(loaded, tokenizer, questions[:1], texts[:1], " Hm.", by_text=True)
    weighed = weigh_answers(loaded, tokenizer, questions, texts, " Hm.")
    assert [r["sentences"] for r in weighed] == found
    assert [r["options"] for r in weighed] == [by_text[0], []]
    sentences = [[answer_sentence(q, a) for a in q.answers] for q in questions]
    told = ((questions[0], " He swims.", sentences[0], found[0]),
            (questions[1], "", sentences[1], found[1]),
            (questions[0], " He swims. So the answer is", options, by_text[0]))  # fmt: skip
    for q, reasoning, tails, values in told:
        context = tokenizer.encode(question_prompt(q, " Hm.")) + tokenizer.encode(reasoning)
        for tail, (value, n) in zip(tails, values, strict=True):
            sentence = tokenizer.encode(" " + tail)
            assert n == len(sentence)
            with torch.inference_mode():
                hidden = loaded(torch.tensor([context + sentence]))
                lp = loaded.logits(hidden)[0].log_softmax(-1)
            alone = sum(lp[len(context) - 1 + i, t].item() for i, t in enumerate(sentence))
            assert value == pytest.approx(alone, abs=2e-3)
    tree = make_tree(tokenizer, questions[1], "word " * 400, "", 128)  # cut to the context
    assert max(tree.positions) == 127 and tree.option.count(-1) == tree.start
    told = "tokens with its longest answer, .* context is 20"
    refuses(told, make_tree, tokenizer, questions[1], "", "", 20)


def test_letters_and_texts_are_told_apart():
    """(A) is the likeliest letter, the second text the likeliest per token, the third per character."""
    q = Question("commonsense_qa", "c", "Where?", "C", ("sea", "shop", "department store"))
    sentences, texts = [(-1.0, 6), (-2.0, 6), (-3.0, 6)], [(-3.0, 1), (-3.2, 2), (-8.0, 4)]
    a, b, c = (likelihood_record(replace(q, answer=x), sentences, texts) for x in "ABC")
    assert a["chosen"] == b["chosen"] == "A" and c["logprobs"]["C"] == -3.0
    for r, right in ((a, "correct"), (b, "correct_per_token"), (c, "correct_per_character")):
        assert [k for k in r if k.startswith("correct") and r[k]] == [right]
    yes_no = Question("strategy_qa", "s", "Is it?", "yes")
    assert "correct_per_token" not in likelihood_record(yes_no, sentences[:2], [])


def test_real_teacher_outputs():
    """Guards the extractor on 1,603 real texts; test_rationales.py compares them one by one."""
    file = shared("data", "teacher", "strategy_qa.train.text-davinci-002.jsonl")
    run("--predictions", file, "--task", "strategy_qa", "--out-dir", "o")
    m = json.loads(Path("o/metrics.json").read_text())
    assert m["n"] == 1603 and round(m["acc"][0] * 1603) == 874 and m["unparseable"] == 236
    assert m["fmt"][0] is None and m["reasons"] == {"finish not recorded": 1603}


def test_predictions_need_only_text_and_answer(capsys):
    rows = [{"text": "So the answer is (B).", "answer": "B"}, {"text": "Yes.", "answer": "no"}]
    write_atomic("p.jsonl", map(to_line, rows))
    run("--predictions", "p.jsonl")
    assert "50.00 %" in capsys.readouterr().out
    own = {"question": "Q? Answer choices: (A) sea, (B) a, (b) mall, (C) sky", "answer": "C"}
    assert question_of(own, "commonsense_qa", dict).choices == ("sea", "a, (b) mall", "sky")
    for row, message in (({"text": "x"}, "answer None is no letter, yes or no"),
                         ({"answer": "yes"}, "neither text nor rationale"),
                         ({**rows[0], "question": "Where?"}, "shows no options")):  # fmt: skip
        write_atomic("p.jsonl", map(to_line, [rows[0], row]))
        refuses(f"p.jsonl line 2: .*{message}", run, "--predictions", "p.jsonl")


@pytest.mark.parametrize("words, message", [
    ("--limit 0", "--limit must be at least 1"),
    ("--judge-model m --max-cost 1", "--max-cost needs --price-in"),
    ("--judge-model m --judge-temperature warm", "--judge-temperature"),
    ("--table nowhere", "nowhere: no such folder"), ("--table .", "no metrics.json under"),
    ("--model ./nowhere", "no such folder"),
    ("--model micro micro --out-dir o", "--out-dir takes"),
    ("--task strategy_qa --paths x", "--paths needs --judge-model"),
])  # fmt: skip
def test_bad_input_is_one_line(words, message):
    refuses(message, run, *words.split())
    assert not Path("o").exists()


def metrics(method="sert", acc=(0.55, 0.51, 0.59), model="gpt2", seed=0, task="strategy_qa"):
    return {"task": task, "split": "test", "model": model, "method": method, "seed": seed, "n": 687,
            "variant": "", "acc": acc, "fmt": [0.9, 0.88, 0.92], "len": [100.0, 90.0, 110.0],
            "rep": [0.53, 0.52, 0.54], "majority": ["no", 0.5255]}  # fmt: skip


def test_paper_numbers_are_those_of_the_spec():
    """Guards a mistyped cell: every number against a copy of the table that lies outside."""
    names = {"GPT-3.5": "GPT-3.5", "gpt2": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large"}
    methods = {v: k for k, v in table.NAMES.items()}
    form = r"^\| (GPT-3.5|gpt2|medium|large) (.+?) \| (.+?) \| (.+?) \|$"
    rows = re.findall(form, shared("SPEC.md").read_text(), re.MULTILINE)
    assert len(rows) == 13
    for model, method, *cells in rows:
        for task, cell in zip(("strategy_qa", "commonsense_qa"), cells):
            numbers = [None if x == "-" else float(x) for x in cell.split(" / ")]
            key = f"{names[model]} {methods[method]}"
            assert table.PAPER[task][key] == numbers + [None] * (4 - len(numbers))
    assert all(len(cells) == 13 for cells in table.PAPER.values())


def test_table_marks_and_averages():
    """Guards marks turned around, seeds counted as cells, numbers in empty cells."""
    found = [metrics(), metrics(seed=1, acc=(0.57, 0.53, 0.61)), metrics("rd", (0.4, 0.36, 0.44)),
             metrics("finetune")]  # fmt: skip
    text = table.tables([(Path("metrics.json"), m) for m in found])
    assert "always saying no scores 52.55 %" in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "SERT  56.00 [52.0, 60.0] (paper 54.00, in)" in re.sub("  +", "  ", lines["gpt2 SERT"])
    assert "100.00 (paper 145.33, out)" in lines["gpt2 SERT"] and "687 x 2" in lines["gpt2 SERT"]
    assert "100.00" not in lines["gpt2 Finetune"]  # it gives answers only: it has no Len
    assert "40.00 [36.0, 44.0] (paper 52.69, out)" in lines["gpt2 RD"]
    assert "SERT  (paper 55.75)  (paper 0.94)" in re.sub("  +", "  ", lines["gpt2-large SERT"])
    text = table.tables([(Path("metrics.json"), metrics(model="micro", task="micro"))])
    assert "paper" not in text and "GPT-3.5" not in text
    assert re.search(r"micro SERT\+RD +not trained\n", text)


def test_differences_are_paired(tmp_path):
    """Guards an interval of two separate samples, seeds counted as questions, a missing metric."""
    found = []
    for method, seed, right in (("sert", 0, "1101"), ("sert", 1, "1111"), ("finetune", 0, "0101")):
        folder = tmp_path / method / f"seed{seed}"
        folder.mkdir(parents=True)
        records = [{"id": str(i), "correct": x == "1", "format_ok": None, "words": 3, "rep1": 0.5}
                   for i, x in enumerate(right)]  # fmt: skip
        write_atomic(folder / "predictions.jsonl", map(to_line, records))
        found.append((folder / "metrics.json", metrics(method, seed=seed)))
    (row,) = table.differences(found, "strategy_qa")
    mean, low, high = row["acc"]  # of the questions: +100, 0, +50, 0; of the seeds: 75, 100
    half = 1.959964 * (47.871**2 / 4 + 17.678**2 / 2) ** 0.5
    assert mean == 37.5 and low == pytest.approx(37.5 - half, abs=0.01)
    assert row["methods"] == ["sert", "finetune"] and not {"fmt", "acc_likelihood"} & set(row)
    text = table.tables(found)
    assert "gpt2 SERT - Finetune" in text and f"+37.50 [{low:+.2f}, {high:+.2f}] " in text
    assert "+0.00 [+0.00, +0.00]\n" in text  # of rep: no star


def test_table_reads_folders(tmp_path, capsys):
    """Guards other splits and variants in the table, and a traceback for a foreign metrics.json."""
    others = {"seed0": {}, "seed0/eval-train": {"split": "train"}, "best": {"variant": "best"}}
    for name, other in others.items():
        folder = tmp_path / "t/strategy_qa/gpt2/sert" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({**metrics(), **other}))
    run("--table", tmp_path / "t")
    assert "687\n" in capsys.readouterr().out
    assert " x " not in (tmp_path / "t/table.txt").read_text()
    (folder / "metrics.json").write_text('{"split": "test", "method": "rd"}')
    refuses("metrics.json is not what evaluate.py writes", run, "--table", tmp_path / "t")


def paper(folder: Path, model: Path, *words, **variables) -> subprocess.Popen:
    """runs/paper.sh on one task with a tiny model, in a group of its own."""
    teacher = shared("data/teacher/strategy_qa.train.text-davinci-002.jsonl")
    env = {
        "MODELS": str(model), "TASKS": "strategy_qa", "LIMIT": "6",
        "DATA_DIR": str(shared("data")), "TEACHER_FILE_STRATEGY_QA": str(teacher),
        "SAMPLE_FLAGS": "--patterns none --min-tokens 2 --min-perplexity 0 --max-rep2 1 "
                        "--max-new-tokens 8",
        "TRAIN_FLAGS": "--epochs 2 --save-seconds 0.5", "PYTHON": sys.executable,
        "EVALUATE_FLAGS": "--max-new-tokens 12 --block-questions 2", **variables}  # fmt: skip
    folder.mkdir(exist_ok=True)
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(ROOT / "runs/paper.sh"), *words], cwd=folder,
                            env={**os.environ, **env}, start_new_session=True, **out)  # fmt: skip


def test_dry_run_of_the_matrix(tmp_path, model):
    """Guards the plan of paper.sh: 24 cells, tokens that scale with the limit."""
    said, _ = paper(tmp_path / "a", model, "--dry-run", TASKS="strategy_qa commonsense_qa",
                    MODELS="gpt2 gpt2-medium gpt2-large", LIMIT="").communicate()  # fmt: skip
    assert len(re.findall(r"^(?:strategy|commonsense)_qa ", said, re.MULTILINE)) == 24
    assert f"{9741 * 25 * 85:,}" in said and "in all about" in said and "17,172 requests" in said
    p = paper(tmp_path / "c", model, "--limit", "3")
    assert "takes --dry-run only" in p.communicate()[0] and p.returncode == 2


@pytest.mark.slow
def test_the_matrix_survives_kills(tmp_path):
    """Killed and repeated it ends with the same bytes; a failed cell does not stop the others."""
    folder = make_tiny_model(tmp_path / "tiny", n_positions=1024)
    said, _ = paper(tmp_path / "whole", folder).communicate()
    assert said.count(" questions\n") >= 4 and "failed" not in said, said
    rng, kills = random.Random(3), 0
    while True:
        p = paper(tmp_path / "killed", folder)
        try:
            p.communicate(timeout=rng.uniform(3, 15) if kills < 6 else None)
            break
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
            kills += 1
    assert p.returncode == 0 and kills >= 3
    names = ("table.txt", "metrics.json", "predictions.jsonl", "model.safetensors", "paths.jsonl")
    files = [f for name in names for f in (tmp_path / "whole/out").rglob(name)]
    assert len(files) >= 14
    for f in files:
        other = tmp_path / "killed" / f.relative_to(tmp_path / "whole")
        assert f.read_bytes() == other.read_bytes(), f
    said, _ = paper(tmp_path / "killed", folder).communicate()
    assert said.count("done before") == 4
    p = paper(tmp_path / "other", folder, METHODS="rd finetune", TEACHER_FILE_STRATEGY_QA="nowhere")
    said, _ = p.communicate()
    assert "failed: error: --teacher-file nowhere does not exist" in said and p.returncode == 1
    assert re.search(r"finetune +\d+ s +Acc", said)
