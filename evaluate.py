"""Evaluation: what a student answers, how well it reasons, and the paper's table and figures.

[SERT §III] Greedy outputs for a test set (up to 512 new tokens; the paper does not say how it
decodes) give Acc, Fmt, Len and Rep with 95 % intervals, and a judge scores the reasoning. Outputs
lie in block files under OUT/outputs-HASH/, and everything else is derived from them anew.

    python evaluate.py                                   # micro-world: the student and what came of it
    python evaluate.py --model out/commonsense_qa/gpt2/sert/seed0 --task commonsense_qa
    python evaluate.py --table out && python evaluate.py --figures out    # Table II, Fig. 1, 3, 4
    python evaluate.py --predictions FILE.jsonl --task strategy_qa        # existing texts, no model
"""

import sert_min.io.early  # noqa: F401  (first: it makes one line of what fails below)

# isort: split
import argparse
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from sert_min import filters, prompts, script, tasks
from sert_min.io import asking, endpoint, files
from sert_min.io.errors import need, printable_lines, run_script
from sert_min.io.files import to_line, write_atomic
from sert_min.io.hub import weights_hash
from sert_min.io.machine import resolve_machine
from sert_min.io.progress import Bar
from sert_min.metrics import grade, greedy, summarize, without_nan
from sert_min.models import load_model, read_config
from sert_min.questions import Question, data_hash, describe
from sert_min.report import console, judge, table, texts
from sert_min.report.likelihood import likelihood_record, weigh_answers
from sert_min.script import given
from sert_min.tokenizer import load_tokenizer


def parse_args(argv=None) -> argparse.Namespace:
    p = script.parser(__doc__)
    # fmt: off
    g = p.add_argument_group("what to evaluate")
    several = dict(nargs="+", help="checkpoints, run folders, names or hub ids (default: the task's "
                   "student and all that was trained from it under out/)")
    script.add_flags(g, *script.TASK, "--limit", "--model", model=several)
    g.add_argument("--split", choices=tasks.SPLITS, default="test", help="default: %(default)s")
    g.add_argument("--prompt-suffix", help="what follows `Answer:` (default: as in training)")
    g.add_argument("--by", choices=("generation", "likelihood"), default="generation",
                   help="likelihood: also the option whose answer sentence is most likely")
    g.add_argument("--max-new-tokens", type=int, help="of an output (512; micro: the task's)")
    g.add_argument("--out-dir", help="default: the run folder, or out/TASK/MODEL/base")
    g = p.add_argument_group("instead of decoding")
    g.add_argument("--predictions", help="existing texts (text, answer), or a teacher's file")
    g.add_argument("--paths", nargs="+", help="judge the paths of these paths.jsonl files")
    g.add_argument("--table", metavar="DIR", help="Table II from all metrics.json under DIR")
    g.add_argument("--figures", metavar="DIR", help="Figures 1, 3, 4 from the files under DIR")
    endpoint.add_flags(p.add_argument_group("judge [SERT Table I]"), "judge")
    g = p.add_argument_group("how it runs")
    g.add_argument("--block-questions", type=int, default=64, help="decoded together (64)")
    script.add_flags(g, "--device", "--dtype", "--dry-run")
    # fmt: on
    return script.parse(p, argv)


class Cell(NamedTuple):
    """A checkpoint to evaluate: usually one cell of Table II."""

    student: script.Student
    out: Path
    method: str  # base, finetune, sert, rd, sert-rd
    seed: int | None
    suffix: str  # of the prompt
    variant: str  # "" or why the cell is not in the table: its split, task, prompt or checkpoint

    @property
    def title(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.student.label} {table.NAMES[self.method]}{seed}"


def cell_of(name: str, task: str, split: str, suffix=None, out_dir=None) -> Cell:
    """The cell of the checkpoint `name`, by its sert.json; `suffix` and `out_dir` override it."""
    student = script.open_student(name, task)
    sert, folder = student.sert, student.folder
    method = sert.get("method") if sert.get("method") in table.METHODS else "base"
    suffix = f" {given(suffix, student.suffix).strip()}".rstrip()
    differs = {
        task: method != "base" and sert.get("task", task) != task,
        split: split != "test",
        folder.name: folder.name == "best",
        f"prompt-{short_hash(suffix)}": suffix != student.suffix,
    }
    variant = "-".join(what for what in differs if differs[what])
    seed = sert.get("seed") if method != "base" and type(sert.get("seed")) is int else None
    run = Path(f"out/{task}/{student.label}/{method}") / ("" if seed is None else f"seed{seed}")
    if method != "base" and folder.name in ("last", "best"):
        run = folder.parent
    out = Path(out_dir or (run / f"eval-{variant}" if variant else run))
    return Cell(student, out, method, seed, suffix, variant)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_models(task: str) -> list[str]:
    """The task's student and every finished checkpoint that came of it."""
    student = script.open_student(None, task)
    runs = (Path(f"out/{task}/{student.label}") / method for method in table.METHODS)
    done = [path for run in runs for path in sorted(run.glob("seed*/last/config.json"))]
    return [student.name, *(str(path.parent.parent) for path in done)]


class Job(NamedTuple):
    """What one command asks of every checkpoint."""

    settings: dict  # task, split, data (hash of the whole split), max_new_tokens, block_questions
    questions: list[Question]  # the first --limit of the split
    likelihood: bool
    device: str
    dtype: str
    judge: judge.Judge | None


def evaluate(cell: Cell, job: Job) -> dict:
    """Decode what is missing, then derive, write and print the results; returns the metrics."""
    out, questions = cell.out, job.questions
    with files.lock_folder(out, ".lock-evaluate"):
        settings, device, blocks = settle(cell, job)
        blocks.folder.mkdir(exist_ok=True)
        files.check_settings(blocks.folder / "evaluation.json", settings, "use another --out-dir")
        if settings["data"] == "own":
            blocks.check_order(questions)
        folder, cap = cell.student.folder, settings["max_new_tokens"]
        dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
        model = load_model(folder, device, dtype), load_tokenizer(folder)

        # 1. Greedy outputs.
        memory: dict = {}  # from block to block

        def decode(block: list[Question], progress) -> list[dict]:
            outputs = greedy(*model, block, cell.suffix, cap, len(block), progress, memory)
            return [{"text": text, "finish": finish} for text, finish in outputs]

        if blocks.missing():
            remove_derived(out)
        outputs = complete(blocks, decode, cell.title)
        records = [grade(q, r["text"], r["finish"]) for q, r in zip(questions, outputs)]
        lines, path = "".join(map(to_line, records)), out / "predictions.jsonl"
        if not path.exists() or path.read_bytes() != lines.encode():
            remove_derived(out)  # these files were derived from other outputs
            write_atomic(path, lines)

        # 2. The log-prob of each answer behind the student's own reasoning.
        said = {r["id"]: r["text"] for r in records}

        def weigh(block: list[Question], progress) -> list[dict]:
            return weigh_answers(*model, block, [said[q.id] for q in block], cell.suffix)

        blocks, weighed = blocks._replace(ending=".answers.jsonl"), []
        free = any(q.free for q in questions)  # there are no options to weigh
        if job.likelihood or not (free or blocks.missing()):
            found = complete(blocks, weigh, "answer likelihood")
            pairs = zip(questions, found)
            weighed = [likelihood_record(q, r["sentences"], r["options"]) for q, r in pairs]
            write_atomic(out / "likelihood.jsonl", map(to_line, weighed))

        # 3. The judge's scores, then all metrics.
        judge.write_scores(records, {q.id: q for q in questions}, job.judge, out)
        about = {k: settings[k] for k in ("task", "split", "model", "method")}
        about |= {"seed": cell.seed, "variant": cell.variant, "data": settings["data"]}
        if about["data"] == "own":
            about["data"] = data_hash(questions)
        judges = judge.summaries(out, len(records))
        limits = filters.limits(tasks.preset(settings["task"], cell.student.label))
        shown = [filters.reasons(q, said[q.id], model[1], limits) for q in questions]
        metrics = without_nan(about | summarize(records, questions, shown, weighed, judges))
        write_atomic(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    console.print_metrics(cell.title, metrics)
    print(f"wrote {out}/predictions.jsonl and metrics.json")
    asking.end_if_missing(job.judge and job.judge.replies)
    return metrics


def settle(cell: Cell, job: Job) -> tuple[dict, torch.device, script.Blocks]:
    """(what decides the bytes of the outputs, the device, the block files). Their folder is named by a
    hash of the settings, so outputs of other settings or weights are neither lost nor mixed in."""
    older = (cell.out / "evaluation.json").exists()
    need(not older, f"{cell.out} holds an evaluation by an earlier version; move it away")
    c = read_config(cell.student.folder)
    n_params = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd  # near enough for choices
    device, machine = resolve_machine(job.device, job.dtype, {}, n_params)
    about = {"model": cell.student.label, "method": cell.method, "prompt_suffix": cell.suffix}
    settings = job.settings | about | {"weights": weights_hash(cell.student.folder)} | machine
    # How many threads are fastest is measured in each run and may differ: the first choice holds.
    for path in sorted(cell.out.glob("outputs-*/evaluation.json")):
        stored = files.stored_settings(path)
        if stored | {"threads": 0} == settings | {"threads": 0}:
            settings, device = stored, resolve_machine(job.device, job.dtype, stored, n_params)[0]
            break
    folder = cell.out / f"outputs-{short_hash(json.dumps(settings, sort_keys=True))}"
    return settings, device, script.Blocks(folder, job.questions, settings["block_questions"])


def complete(blocks: script.Blocks, make: Callable, what: str) -> list[dict]:
    """The records of all blocks, in order. `make(questions, progress)` computes those of a missing
    block, which is written before the next one begins."""
    missing = {i: blocks.block(i) for i in blocks.missing()}
    n = sum(map(len, missing.values()))
    if n:
        print(f"{what}: {n:,} of {len(blocks.questions):,} questions are to be done")
    with Bar(n, "question", disable=not n) as bar:
        done = 0
        for i, block in missing.items():
            made = make(block, bar.count)
            blocks.write(i, [{"id": q.id, "question": q.text, **r} for q, r in zip(block, made)])
            done += len(block)
            bar.reach(done)
    return [r for i in blocks.numbers() for r in blocks.read(i)]


def remove_derived(out: Path) -> None:
    """Remove what is derived from outputs; metrics.json goes first, because it stands for all."""
    for name in ("metrics.json", "predictions.jsonl", "likelihood.jsonl", "scores-*.jsonl"):
        for path in out.glob(name):
            path.unlink()


def print_plan(cell: Cell, job: Job) -> None:
    """--dry-run: how much there is to decode and to judge."""
    blocks, cap = settle(cell, job)[2], job.settings["max_new_tokens"]
    n = sum(len(blocks.block(i)) for i in blocks.missing())
    prompt = printable_lines(prompts.question_prompt(job.questions[0], cell.suffix))
    print(f"{cell.title}: {n:,} of {len(job.questions):,} outputs to decode, at most {n * cap:,} "
          f"tokens, to {cell.out}\nthe first prompt:\n{prompt}")  # fmt: skip
    longest = {"text": "x" * 5 * cap}  # no output costs the judge more than this one
    stored = (blocks.read(i) or [longest] * len(blocks.block(i)) for i in blocks.numbers())
    said = (r["text"] for records in stored for r in records)
    records = [grade(q, text, None) for q, text in zip(job.questions, said)]
    judge.print_plan(records, job.judge, "  judge")


def main(args) -> None:
    script.check_counts(args, "limit", "block_questions", "max_new_tokens")
    task, split = args.task, args.split
    folder = Path(args.table or args.figures or ".")
    need(folder.is_dir(), f"{folder}: no such folder")
    chosen = judge.choose(args, tasks.get(task).judge)  # bad flags end here, not hours later
    model_judge = chosen if args.judge_model else None
    if args.table:
        return table.print_table(folder)
    if args.figures:
        from sert_min.report import figures  # late: matplotlib takes a second

        out = Path(args.out_dir or folder / "figures")
        return figures.draw_figures(folder, out, split, model_judge and chosen.name)
    if args.paths:
        need(chosen, "--paths needs --judge-model (only the micro-world has a judge program)")
        return texts.judge_paths(args.paths, args.limit, chosen, args.dry_run)
    load = partial(tasks.load, task, data_dir=args.data_dir)
    if args.predictions:
        what = args.predictions, {"task": task, "split": split}, load, model_judge
        return texts.evaluate_texts(*what, args.limit, args.out_dir, args.dry_run)
    names = args.model or default_models(task)
    need(not args.out_dir or len(names) == 1, "--out-dir takes the results of one --model only")
    everything = load(split)
    print(describe(everything, split))
    cap, some = given(args.max_new_tokens, tasks.get(task).greedy_cap), everything[: args.limit]
    free = sum(q.free for q in some)
    need(not free or args.by == "generation", f"--by likelihood weighs options, or yes and no: {free:,} "
         "questions have numbers or free texts as answers; leave it out")  # fmt: skip
    data = "own" if tasks.is_own(task) else data_hash(everything)  # rows can be appended
    settings = {"task": task, "split": split, "data": data}
    settings |= {"max_new_tokens": cap, "block_questions": args.block_questions}
    job = Job(settings, some, args.by == "likelihood", args.device, args.dtype, chosen)
    cells = [cell_of(name, task, split, args.prompt_suffix, args.out_dir) for name in names]
    done = [print_plan(cell, job) if args.dry_run else evaluate(cell, job) for cell in cells]
    if len(done) > 1 and not args.dry_run and not any(cell.variant for cell in cells):
        found = [(cell.out / "metrics.json", m) for cell, m in zip(cells, done)]
        print("\n" + table.tables(found), end="")
    return None


if __name__ == "__main__":
    run_script(main, parse_args)
