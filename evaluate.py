"""Evaluation: what a student answers, how well it reasons, and the paper's table and figures.

[SERT §III] Greedy decoding of a test set gives Acc, Fmt, Len and Rep with 95 % intervals; a judge
model scores the reasoning (in the micro-world a program does, unasked). The paper is silent on
decoding for the table: ours is greedy, up to 512 new tokens. Repeating a command continues it.

    python evaluate.py                                   # micro-world: the student and what came of it
    python evaluate.py --model out/commonsense_qa/gpt2/sert/seed0 --task commonsense_qa
    python evaluate.py --table out && python evaluate.py --figures out    # Table II, Fig. 1, 3, 4
    python evaluate.py --predictions FILE.jsonl --task strategy_qa        # existing texts, no model
"""

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sample import given, whole_blocks
from sert_min import prompts, tasks
from sert_min.io import files
from sert_min.io.endpoint import Endpoint, check_flags, check_url
from sert_min.io.errors import SertError, printable, printable_lines, run_script
from sert_min.io.files import (
    append_durable,
    check_settings,
    lock_folder,
    read_json,
    read_jsonl,
    to_line,
    write_atomic,
)
from sert_min.io.hub import find_model, model_label, read_sert, weights_hash
from sert_min.io.machine import resolve_machine
from sert_min.metrics import greedy, score, share_interval, summarize, without_nan
from sert_min.models import load_model, read_config
from sert_min.questions import CHOICES, LETTERS, Question, data_hash, describe, stem
from sert_min.report import judge, table
from sert_min.report.likelihood import answer_logprobs, likelihood_record
from sert_min.report.texts import question_of, text_of
from sert_min.tokenizer import load_tokenizer

BLOCK = 64  # questions decoded together
JUDGED = dict.fromkeys(("task", "id", "question", "answer", "text"), str)  # of a path
OWN = ("predictions.jsonl", "evaluation.json")  # what marks a folder as a model's evaluation


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("what to evaluate")
    g.add_argument(
        "--task", choices=tasks.TASKS, default=tasks.DEFAULT, help="default: %(default)s"
    )
    g.add_argument("--data-dir", help="read the datasets here instead of downloading them")
    g.add_argument("--split", choices=tasks.SPLITS, default="test", help="default: %(default)s")
    g.add_argument("--limit", type=int, help="only the first N questions; may be raised later")
    g.add_argument("--model", nargs="+", help="checkpoints, run folders, names or hub ids "
                   "(default: the task's student and all that was trained from it under out/)")  # fmt: skip
    g.add_argument(
        "--prompt-suffix", help="put behind `Answer:` instead of what the checkpoint says"
    )
    g.add_argument("--by", choices=("generation", "likelihood"), default="generation",
                   help="likelihood: also the option whose answer sentence is most likely")  # fmt: skip
    g.add_argument("--max-new-tokens", type=int, help="of an output (512; micro: the task's)")
    g.add_argument("--out-dir", help="default: the run folder, or out/TASK/MODEL/base")
    g = p.add_argument_group("instead of decoding")
    g.add_argument("--predictions", help="existing texts (text, answer), or a teacher's file")
    g.add_argument("--paths", nargs="+", help="judge the paths of these paths.jsonl files")
    g.add_argument("--table", metavar="DIR", help="Table II from all metrics.json under DIR")
    g.add_argument("--figures", metavar="DIR", help="Figures 1, 3, 4 from the files under DIR")
    g = p.add_argument_group("judge [SERT Table I]")
    g.add_argument("--judge-model", help="model name at the endpoint (micro: a program judges)")
    g.add_argument(
        "--base-url",
        help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; default: OPENAI_BASE_URL, else OpenAI's",
    )
    g.add_argument("--judge-max-tokens", type=int, default=512)
    g.add_argument("--judge-temperature", default="0", help="a number, or `none`: not sent")
    g.add_argument("--token-parameter", choices=("auto", "max_tokens", "max_completion_tokens"),
                   default="auto")  # fmt: skip
    g.add_argument("--concurrency", type=int, default=8)
    g.add_argument("--timeout", type=float, default=120, help="seconds without an answer")
    g.add_argument("--deadline", type=float, default=900, help="seconds per request with retries")
    g.add_argument("--insecure", action="store_true", help="send the key over http:// as well")
    g.add_argument("--max-requests", type=int, help="requests sent by this run, retries included")
    g.add_argument("--max-cost", type=float, help="USD, all runs of this task and judge together")
    g.add_argument("--price-in", type=float, help="USD per million prompt tokens")
    g.add_argument("--price-out", type=float, help="USD per million completion tokens")
    g = p.add_argument_group("how it runs")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    g.add_argument("--block-questions", type=int, help=f"decoded together (default {BLOCK})")
    g.add_argument("--dry-run", action="store_true", help="print the plan and its price, then stop")
    return p.parse_args(argv)


# --- one checkpoint -------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A checkpoint to evaluate, and where its results go."""

    folder: Path
    out: Path
    label: str  # of its root parent
    method: str  # base, finetune, sert, rd, sert-rd
    seed: int | None
    suffix: str  # of the prompt
    variant: str  # not what the table is about: another split, task, prompt, or the best checkpoint


def cell_of(name: str, args) -> Cell:
    """What a checkpoint says of itself (sert.json), and its folder for results."""
    folder = find_model(name)
    sert, label = read_sert(folder), model_label(name, folder)
    method = sert.get("method") if sert.get("method") in table.METHODS else "base"
    own = sert.get("prompt_suffix", "")
    suffix = given(args.prompt_suffix, own)
    suffix = f" {suffix.strip()}" if suffix.strip() else ""
    changed = hashlib.sha256(suffix.encode()).hexdigest()[:8]
    variant = "-".join(
        what
        for what, differs in (
            (args.task, method != "base" and sert.get("task", args.task) != args.task),
            (args.split, args.split != "test"),
            (folder.name, folder.name == "best"),
            (f"prompt-{changed}", suffix != own),
        )
        if differs
    )
    seed = sert.get("seed") if method != "base" and type(sert.get("seed")) is int else None
    run = Path(f"out/{args.task}/{label}/{method}") / ("" if seed is None else f"seed{seed}")
    if method != "base" and folder.name in ("last", "best"):
        run = folder.parent
    out = Path(args.out_dir) if args.out_dir else run / (f"eval-{variant}" if variant else "")
    return Cell(folder, out, label, method, seed, suffix, variant)


def default_models(args) -> list[str]:
    """The task's student and every finished checkpoint that came of it."""
    name = tasks.get(args.task).student
    label = model_label(name, find_model(name))
    runs = (Path(f"out/{args.task}/{label}") / method for method in table.METHODS)
    done = [seed for run in runs for seed in sorted(run.glob("seed*"))]
    return [name, *(str(seed) for seed in done if (seed / "last" / "config.json").exists())]


def evaluate_cell(args, cell: Cell, everything: list[Question]) -> dict:
    """Decode, score, judge, write and print; returns the metrics."""
    with lock_folder(cell.out, ".lock-evaluate"):
        settings, load = prepare(args, cell, everything)
        if not args.out_dir and cell.method != "base":
            set_old_aside(cell.out, settings["weights"])
        check_settings(cell.out / "evaluation.json", settings, "choose another --out-dir")
        there, size = whole_lines(cell.out / "predictions.jsonl"), settings["block_questions"]
        questions = everything[: max(given(args.limit, len(everything)), there)]
        blocks = [questions[i : i + size] for i in range(0, len(questions), size)]
        decode(cell, blocks, load, settings["max_new_tokens"])
        records = rescore(cell.out / "predictions.jsonl", questions)
        if args.by == "likelihood":
            weigh_answers(cell, blocks, records, load)
        failures = judge_records(args, records, questions, cell.out)
        about = {k: settings[k] for k in ("task", "split", "model", "method")}
        about |= {"seed": cell.seed, "variant": cell.variant, "data": settings["data"]}
        metrics = {**about, **metrics_of(records, questions, cell.out)}
        write_atomic(cell.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    seed = "" if cell.seed is None else f", seed {cell.seed}"
    print_metrics(f"{cell.label} {table.NAMES[cell.method]}{seed}", metrics)
    print(f"wrote {cell.out}/predictions.jsonl and metrics.json")
    end_if_missing(failures)
    return metrics


def prepare(args, cell: Cell, everything: list[Question]):
    """(everything that decides the bytes of the predictions, a function that loads the model)."""
    path = cell.out / "evaluation.json"
    stored = read_json(path) if path.exists() else {}
    c = read_config(cell.folder)
    n_params = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd  # near enough for choices
    device, machine = resolve_machine(
        args.device, args.dtype, files.stored_settings(path), n_params
    )
    settings = {
        "task": args.task,
        "split": args.split,
        "data": data_hash(everything),
        "model": cell.label,
        "method": cell.method,
        "weights": weights_hash(cell.folder),
        "prompt_suffix": cell.suffix,
        "max_new_tokens": given(args.max_new_tokens, tasks.get(args.task).greedy_cap),
        "block_questions": given(args.block_questions, stored.get("block_questions", BLOCK)),
        **machine,
    }
    loaded: list = []

    def load():
        """(model, tokenizer), read when first asked for: a finished evaluation needs neither."""
        if not loaded:
            dtype = "bfloat16" if machine["dtype"] == "bf16" else "float32"
            import torch

            model = load_model(cell.folder, device, getattr(torch, dtype))
            loaded.extend((model, load_tokenizer(cell.folder)))
        return loaded

    return settings, load


def set_old_aside(out: Path, weights: str) -> None:
    """A run that was trained further has other weights: what its old ones said goes into a folder
    of its own. evaluation.json goes last, so that a kill in between is noticed."""
    path = out / "evaluation.json"
    old = str(read_json(path).get("weights")) if path.exists() else weights
    if old == weights:
        return
    aside = out / f"eval-old-{re.sub(r'[^0-9a-f]', '-', old[:8])}"
    aside.mkdir(exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)
    for name in ("predictions.jsonl", "likelihood.jsonl", *(p.name for p in out.glob("scores-*"))):
        if (out / name).exists():
            (out / name).rename(aside / name)
    path.rename(aside / path.name)
    print(f"{out} was trained further; its old outputs are now in {aside}")


def whole_lines(path: Path) -> int:
    """How many whole lines a file has; 0 if it is not there."""
    if not path.exists():
        return 0
    with open(path, "rb") as f:
        return sum(line.endswith(b"\n") for line in f)


def decode(cell: Cell, blocks: list[list], load, cap: int) -> None:
    """Greedy outputs of the blocks that predictions.jsonl lacks, block by block."""
    path = cell.out / "predictions.jsonl"
    todo = blocks[whole_blocks(path, blocks, 1) :]
    if not todo:
        return
    model, tokenizer = load()
    n, tokens, start = sum(map(len, todo)), 0, time.perf_counter()
    with tqdm(total=n, unit="question", desc=f"{cell.label} {cell.method}") as bar:

        def progress(new: int) -> None:
            nonlocal tokens
            tokens += new
            rate = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(0)

        for block in todo:
            outputs = greedy(
                model, tokenizer, block, cell.suffix, cap, rows=len(block), progress=progress
            )
            records = [score(q, text, finish) for q, (text, finish) in zip(block, outputs)]
            append_durable(path, "".join(map(to_line, records)))
            bar.update(len(block))
    spent = {"questions": n, "tokens": tokens, "seconds": round(time.perf_counter() - start, 2)}
    append_durable(cell.out / "timings-evaluate.jsonl", to_line(spent))


def rescore(path: Path, questions: list[Question]) -> list[dict]:
    """The records of `path`, read again by today's rules; the file follows if they have changed."""
    stored = list(read_jsonl(path, {"text": str, "finish": (str, None)}))
    records = [score(q, r["text"], r["finish"]) for q, r in zip(questions, stored)]
    if records != stored:
        write_atomic(path, map(to_line, records))
    return records


def weigh_answers(cell: Cell, blocks: list[list], records: list[dict], load) -> None:
    """likelihood.jsonl: the log-prob of each answer behind the model's own reasoning."""
    path = cell.out / "likelihood.jsonl"
    texts = {r["id"]: r["text"] for r in records}
    todo = blocks[whole_blocks(path, blocks, 1) :]
    for block in tqdm(todo, unit="block", desc="answer likelihood", disable=not todo):
        model, tokenizer = load()
        found = answer_logprobs(model, tokenizer, block, [texts[q.id] for q in block], cell.suffix)
        lines = (to_line(likelihood_record(q, values)) for q, values in zip(block, found))
        append_durable(path, "".join(lines))


# --- metrics --------------------------------------------------------------------------------------


def metrics_of(records: list[dict], questions: list[Question], out: Path | None) -> dict:
    """The metrics of records as JSON has them, and of what else stands in their folder."""
    metrics = summarize(records, questions)
    metrics["reasons"] = dict(Counter(r["reason"] for r in records).most_common())
    path = out / "likelihood.jsonl" if out else None
    if path and path.exists():
        right = [r["correct"] for r in read_jsonl(path, {"correct": bool})]
        if len(right) == len(records):
            metrics["acc_likelihood"] = share_interval(sum(right), len(right))
    for path in sorted(out.glob("scores-*.jsonl")) if out else ():
        scored = list(read_jsonl(path, judge.SCORED))
        name = path.stem.removeprefix("scores-")
        metrics.setdefault("judges", {})[name] = judge.summary(scored, len(records))
    return without_nan(metrics)


def print_metrics(title: str, m: dict) -> None:
    """The table of one model."""
    answer, share = m["majority"]
    print(f"\n{title}: {m['n']:,} questions")

    def line(name: str, value, scale: float = 1, unit: str = "", digits: int = 2, note="") -> None:
        if value[0] is None:
            print(f"  {name:<27}{'-':>8}{note}")
            return
        value = [None if v is None else scale * v for v in value]
        text = f"  {name:<27}{value[0]:>8.{digits}f}{unit:<7}"
        if value[1] is not None:
            text += f"95 %: {value[1]:.{digits}f} to {value[2]:.{digits}f}"
        print(text + note)

    right = f"   {round(m['acc'][0] * m['n']):,} right; always {answer}: {100 * share:.2f} %"
    line("Acc, strict", m["acc"], 100, " %", note=right)
    line("Acc, lenient", m["acc_lenient"], 100, " %")
    if "acc_likelihood" in m:
        line("Acc, by likelihood", m["acc_likelihood"], 100, " %")
    line("Fmt", m["fmt"], digits=3)
    line("Len", m["len"], unit=" words")
    line("Rep", m["rep"], digits=3)
    for name, j in m.get("judges", {}).items():
        for key in judge.KEYS:
            line(f"judge: {key}", j[key])
        print(f"  judge {name}: all four scores of {j['parsed']:,} of {j['total']:,} responses")
    print(f"  no readable answer in {m['unparseable']:,} of {m['n']:,} outputs")
    print("  " + ", ".join(f"{reason} {n:,}" for reason, n in m["reasons"].items()))


# --- the judge ------------------------------------------------------------------------------------


def endpoint(args) -> Endpoint:
    """Where the judge is asked, from checked flags."""
    check_flags(args, "judge_max_tokens")
    try:
        heat = None if args.judge_temperature == "none" else float(args.judge_temperature)
    except ValueError:
        heat = math.nan
    if heat is not None and not 0 <= heat < math.inf:
        raise SertError("--judge-temperature must be a number from 0, or none")
    e = Endpoint(
        model=args.judge_model,
        base_url=args.base_url,
        max_tokens=args.judge_max_tokens,
        temperature=heat,
        token_parameter=args.token_parameter,
        concurrency=args.concurrency,
        timeout=args.timeout,
        deadline=args.deadline,
        price_in=args.price_in,
        price_out=args.price_out,
        insecure=args.insecure,
    )
    check_url(e)
    return e


def judge_name(args) -> str:
    return re.sub(r"[^\w.-]", "-", args.judge_model)[:80] if args.judge_model else "program"


def judge_folder(args) -> Path:
    """Where replies are kept: bought once for all models of a task."""
    return Path(f"out/{args.task}/judge-{judge_name(args)}")


def judge_records(args, records: list[dict], questions: list[Question], out: Path) -> list[str]:
    """Write scores-JUDGE.jsonl for records; returns why replies are missing. Without a judge model
    only the micro-world has a judge."""
    path = out / f"scores-{judge_name(args)}.jsonl"
    if args.judge_model:
        caps = args.max_requests, args.max_cost
        scored, failures = judge.ask_judge(records, endpoint(args), judge_folder(args), *caps)
    elif program := tasks.get(args.task).judge:
        by_id = {q.id: q for q in questions}
        scored, failures = judge.program_scores(records, by_id, program), []
    else:
        return []
    write_atomic(path, map(to_line, scored))
    return failures


def end_if_missing(failures: list[str]) -> None:
    """Say what is missing and how to go on; exit status 2."""
    if not failures:
        return
    for why in failures[:5]:
        print(f"  missing: {printable(why)}", file=sys.stderr)
    print(
        f"error: {len(failures):,} judge replies are missing; repeat the command to ask for them",
        file=sys.stderr,
    )
    raise SystemExit(2)


def judge_paths(args) -> None:
    """Score the paths of sample.py's runs, for Figures 1 and 4."""
    if not tasks.get(args.task).judge and not args.judge_model:
        raise SertError("--paths needs --judge-model (only the micro-world has a judge program)")
    for name in args.paths:
        path = Path(name) / "paths.jsonl" if Path(name).is_dir() else Path(name)
        records = first_questions(list(read_jsonl(path, JUDGED)), args.limit)
        if not records:
            raise SertError(f"{path} holds no paths; run sample.py first")
        if args.dry_run:
            print_judge_plan(args, records, str(path))
            continue
        try:
            questions = [question_of(r, args.task, {}) for r in records]
        except ValueError as e:
            raise SertError(f"{path}: {e}; sample it again") from None
        failures = judge_records(args, records, questions, path.parent)
        scored = list(read_jsonl(path.parent / f"scores-{judge_name(args)}.jsonl"))
        summary = judge.summary(scored, len(records))
        means = ", ".join(f"{k} {summary[k][0]:.2f}" for k in judge.KEYS)
        print(f"{path}: {summary['parsed']:,} of {len(records):,} paths judged; {means}")
        end_if_missing(failures)


def first_questions(records: list[dict], limit: int | None) -> list[dict]:
    """The records of the first `limit` questions."""
    ids = list(dict.fromkeys(r["id"] for r in records))[:limit]
    return [r for r in records if r["id"] in set(ids)]


def print_judge_plan(args, records: list[dict], what: str) -> None:
    """What judging would ask and cost at most."""
    if not args.judge_model:
        return
    e = endpoint(args)
    n, there, n_in, n_out = judge.plan(records, e, judge_folder(args))
    text = f"{what}: {n:,} judge requests ({there:,} replies are there), at most {n_in:,} tokens "
    text += f"in (a token per byte; English has about 4 bytes) and {n_out:,} out"
    usd = e.usd(n_in, n_out)
    print(text + ("" if usd is None else f"; at most {usd:.2f} USD, --max-cost is a hard cap"))


# --- existing texts -------------------------------------------------------------------------------


def questions_by_key(args, rows: list[dict]) -> dict:
    """The dataset's questions by id and by text without options, if any row needs them."""
    if all(CHOICES in str(r.get("question", CHOICES)) for r in rows
           if r.get("answer") in tuple(LETTERS)):  # fmt: skip
        return {}
    both = [tasks.load(args.task, split, args.data_dir) for split in ("test", "train")]
    by_text = {stem(q.text): q for some in both for q in some}
    return by_text | {q.id: q for some in both for q in some}


def evaluate_texts(args) -> None:
    """--predictions FILE: the same metrics for texts that exist already."""
    rows = list(read_jsonl(args.predictions))[: args.limit]
    if not rows:
        raise SertError(f"{args.predictions} is empty; check the path")
    by_key, records, questions = questions_by_key(args, rows), [], []
    for number, row in enumerate(rows, 1):
        try:
            q = question_of(row, args.task, by_key)
            records.append(score(q, text_of(row), row.get("finish")))
        except ValueError as e:
            raise SertError(f"{args.predictions} line {number}: {e}") from None
        questions.append(q)
    out = Path(args.out_dir or Path(args.predictions).parent)
    if args.dry_run:
        return print_judge_plan(args, records, args.predictions)
    failures = []
    if args.judge_model:
        if not args.out_dir and Path(args.predictions).name != OWN[0]:
            raise SertError("give --out-dir for the scores of these texts")
        out.mkdir(parents=True, exist_ok=True)
        failures = judge_records(args, records, questions, out)
    about = {"task": args.task, "split": args.split, "model": Path(args.predictions).stem}
    judged = out if args.judge_model else None
    metrics = {**about, "method": "predictions", **metrics_of(records, questions, judged)}
    print_metrics(args.predictions, metrics)
    print_other_parse(rows, records)
    if args.out_dir:
        if any((out / name).exists() for name in OWN[1:]):
            raise SertError(f"{out} holds a model's evaluation; choose another --out-dir")
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "predictions.jsonl", map(to_line, records))
        write_atomic(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        print(f"wrote {out}/predictions.jsonl and metrics.json")
    return end_if_missing(failures)


def print_other_parse(rows: list[dict], records: list[dict]) -> None:
    """Where a teacher file holds somebody else's reading of its answers: every difference."""
    pairs = [(r, p) for r, p in zip(rows, records) if "teacher_answer" in r and "text" not in r]
    if not pairs:
        return
    differ = [(r, p) for r, p in pairs if (r["teacher_answer"] or None) != p["extracted"]]
    share = 1 - len(differ) / len(pairs)
    print(f"  teacher_answer agrees in {share:.2%}, differs in {len(differ):,} rows:")
    for r, p in differ[:60]:
        said = printable(r["teacher_completion"])[:100]
        theirs = r["teacher_answer"] or "-"
        print(printable(f"    {p['id']}: {theirs} there, {p['extracted'] or '-'} here: {said!r}"))


# --- table and figures ----------------------------------------------------------------------------


def print_table(folder: Path) -> None:
    """Table II of everything under `folder`, printed and kept there."""
    metrics = table.find_metrics(folder)
    if not metrics:
        raise SertError(
            f"no metrics.json under {folder}; run evaluate.py on some checkpoints first"
        )
    text, markdown = table.tables(metrics)
    print(printable_lines(f"{text}\n{markdown}"), end="")
    write_atomic(folder / "table.txt", text)
    write_atomic(folder / "table.md", markdown)


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    for flag in ("limit", "block_questions", "max_new_tokens"):
        if given(getattr(args, flag), 1) < 1:
            raise SertError(f"--{flag.replace('_', '-')} must be at least 1")
    for flag in ("table", "figures"):
        if (folder := getattr(args, flag)) and not Path(folder).is_dir():
            raise SertError(f"--{flag} {folder}: no such folder")
    if args.judge_model:
        endpoint(args)  # before hours of decoding
    if args.table:
        return print_table(Path(args.table))
    if args.figures:
        from sert_min.report import figures

        out = Path(args.out_dir or Path(args.figures) / "figures")
        return figures.draw_figures(Path(args.figures), out, args.split, args.judge_model)
    if args.paths:
        return judge_paths(args)
    if args.predictions:
        return evaluate_texts(args)
    names = args.model or default_models(args)
    if args.out_dir and len(names) > 1:
        raise SertError("--out-dir takes the results of one --model only")
    everything = tasks.load(args.task, args.split, args.data_dir)
    print(describe(everything, args.split))
    cells = [cell_of(name, args) for name in names]
    if args.dry_run:
        for cell in cells:
            print_plan(args, cell, everything)
        return None
    metrics = [evaluate_cell(args, cell, everything) for cell in cells]
    if len(metrics) > 1 and not any(m["variant"] for m in metrics):
        print("\n" + table.tables(metrics)[0], end="")
    return None


def print_plan(args, cell: Cell, everything: list[Question]) -> None:
    """--dry-run: how much there is to decode and to judge."""
    path = cell.out / "predictions.jsonl"
    n, there = len(everything[: args.limit]), whole_lines(path)
    cap = given(args.max_new_tokens, tasks.get(args.task).greedy_cap)
    print(
        f"{cell.label} {table.NAMES[cell.method]}: {max(0, n - there):,} of {n:,} outputs to decode, "
        f"at most {max(0, n - there) * cap:,} tokens, to {cell.out}"
    )
    prompt = printable_lines(prompts.question_prompt(everything[0], cell.suffix))
    print("  prompt: " + prompt.replace("\n", "\n          "))
    if args.judge_model:
        known = list(read_jsonl(path, {"id": str, "question": str, "text": str})) if there else []
        missing = [{"task": q.task, "id": q.id, "question": q.text, "text": "x" * 5 * cap}
                   for q in everything[len(known) : args.limit]]  # fmt: skip
        print_judge_plan(args, [*known, *missing], "  judge")


if __name__ == "__main__":
    run_script(main, parse_args())
