"""Stage 2 of SERT: fine-tune the student on its own kept paths (self-training), or on labels only.

[SERT §II-B, §III-A] `Question: {q}\\nAnswer: {path} So the answer is {a}.` with the gold answer;
Adam, batch 8, learning rate 3e-4, 20 epochs. The loss covers what follows the prompt (the paper can
be read both ways: --loss-on all). Two baselines: `--method finetune` learns labels without any
reasoning, `--method star` only from paths that state the right answer (STaR, arXiv 2203.14465, one
round without rationalisation).

    python train.py                               # micro-world, on what `python sample.py` selected
    python train.py --task commonsense_qa         # real GPT-2, same thing
    python train.py --task strategy_qa --method finetune --dtype bf16
"""

import sert_min.io.early  # noqa: F401  (first: it makes one line of what fails below)

# isort: split
import argparse
import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sert_min import filters, prompts, script, tasks
from sert_min.answers import strip_answer_sentence
from sert_min.finetune import Example, TrainSettings, encode_example, fit, mean_loss, n_supervised
from sert_min.gpt2 import GPT2
from sert_min.io import files, parallel
from sert_min.io.errors import command, need, run_script
from sert_min.io.hub import read_sert, weights_hash
from sert_min.io.machine import resolve_machine
from sert_min.metrics import grade, greedy
from sert_min.models import load_model, save_model
from sert_min.questions import Question, describe
from sert_min.report import console
from sert_min.script import Student, add_flags, open_student
from sert_min.tokenizer import Tokenizer, load_tokenizer

VALIDATE = 100  # validation questions answered after each epoch
Pair = tuple[Question, str, str]  # question, prompt, completion


def add_training_flags(p: argparse.ArgumentParser) -> None:
    """The flags that train.py and distill.py share."""
    d = TrainSettings()
    # fmt: off
    g = p.add_argument_group("data and model")
    out = dict(help="default: out/TASK/MODEL/METHOD/seedN")
    add_flags(g, *script.TASK, "--model", "--limit", "--out-dir", out_dir=out)
    g = p.add_argument_group("optimisation [SERT §III-A]")
    g.add_argument("--epochs", type=int, help="paper: 20; smollm2: 2; can be raised later")
    g.add_argument("--batch-size", type=int, help="paper: 8; smollm2: 4")
    g.add_argument("--lr", type=float, help="constant; paper: 3e-4; smollm2: 1e-4")
    g.add_argument("--max-steps", type=int, help="stop after so many steps; can be raised later")
    g.add_argument("--accumulate", type=int, default=d.accumulate, help="split a batch in N parts")
    g.add_argument("--loss-on", choices=("answer", "all"), default="answer", help="all: prompt too")
    g.add_argument("--holdout", action="store_true", help="keep a tenth for validation, save best")
    add_flags(g, "--seed")
    g = p.add_argument_group("how it runs")
    add_flags(g, "--device", "--dtype")
    g.add_argument("--save-seconds", type=float, default=300, help="between states (%(default)s)")
    g.add_argument("--report", type=int, help="test questions before and after (micro: 100, else 0)")
    # fmt: on


def parse_args(argv=None) -> argparse.Namespace:
    p = script.parser(__doc__)
    p.add_argument("--method", choices=("sert", "finetune", "star"), default="sert")
    p.add_argument("--paths", help="selected.jsonl (default: where sample.py put it for this task)")
    g = p.add_argument_group(
        "rules: given one, or star, train.py selects anew from "
        "paths.jsonl; the others stay as sample.py had them"
    )
    filters.add_flags(g)
    add_training_flags(p)
    return script.parse(p, argv)


class Options(NamedTuple):
    """The training flags, resolved."""

    s: TrainSettings
    task: str
    data_dir: str | None
    out_dir: str | None
    limit: int | None  # of the examples
    loss_on: str
    holdout: bool
    save_seconds: float
    report: int  # test questions answered before and after
    device: str
    dtype: str


def options(args, label: str) -> Options:
    """Check the training flags; the task, or the student `label`, gives those that are left out."""
    script.check_counts(args, "limit")
    flags = script.chosen(args, TrainSettings.__annotations__, **tasks.preset(args.task, label))
    s, report = TrainSettings(**flags).check(), tasks.get(args.task).report
    return Options(s, **script.chosen(args, Options._fields[1:], report=report))


def main(args) -> None:
    parallel.start()
    student = open_student(args.model, args.task)
    o = options(args, student.label)
    questions = tasks.load(o.task, "train", o.data_dir)
    print(describe(questions, "train"))
    if args.method == "finetune":
        given = args.paths or rules_given(args)
        need(not given, "--method finetune learns labels alone; leave --paths and the rules out")
        pairs, about = [(q, *prompts.finetune_pair(q)) for q in questions], {"source": "labels"}
    else:
        pairs, about = self_training_pairs(args, student, questions)
    train_student(prepare(student, args.method, pairs, "", about, o))


def rules_given(args) -> bool:
    """Is a flag of a rule given?"""
    return any(getattr(args, rule.flag) is not None for rule in filters.RULES)


def self_training_pairs(
    args, student: Student, questions: list[Question]
) -> tuple[list[Pair], dict]:
    """(the pairs of the selected paths, where they come from). Without a flag of a rule sample.py has
    selected them; with one, and for STaR, they are selected here, by sample.py's other rules, and
    selected.jsonl stays."""
    star = args.method == "star"
    right = not star or args.answer in (None, "right")
    need(right, "--method star is --answer right; leave --answer out")
    default = f"out/{args.task}/{student.label}/paths-train/seed{args.seed}/selected.jsonl"
    paths, preset = Path(args.paths or default), tasks.preset(args.task, student.label)
    paths = paths / "selected.jsonl" if paths.is_dir() else paths
    anew = star or rules_given(args)
    paths = paths.with_name("paths.jsonl") if anew else paths
    flags = {"model": student.name, "data_dir": args.data_dir, "seed": args.seed}
    before = command("sample.py", tasks.flags(args.task), **flags)
    need(
        paths.exists(),
        f"{paths} does not exist; run `{before}` to its end first, or give --paths",
    )
    if not anew:
        return sert_pairs(paths, questions), {"source": str(paths)}
    preset |= files.stored_settings(paths.with_name("funnel.json")).get("rules", {})
    preset |= {"answer": "right"} if star else {}
    rules, tokenizer = filters.limits(preset, vars(args)), load_tokenizer(student.folder)
    select = partial(filters.path_records, tokenizer=tokenizer, limits=rules)
    return sert_pairs(paths, questions, select), {"source": str(paths), "rules": rules}


def sert_pairs(
    paths: Path, questions: list[Question], select: Callable | None = None
) -> list[Pair]:
    """(question, prompt, completion) of each selected path. A path loses a closing answer sentence
    of its own, so that only the gold answer is stated. `select(records, [question])` gives the
    records of all paths of a question their verdicts anew."""
    by_text = {(q.id, q.text): q for q in questions}
    pairs, stripped, empty, wrong = [], 0, 0, 0
    form = {"verdict": str, "id": str, "question": str, "text": str}
    form |= filters.SAMPLED if select else {}
    records = files.read_jsonl(paths, form)
    for (name, question), some in itertools.groupby(records, lambda r: (r["id"], r["question"])):
        q = by_text.get((name, question))
        need(q, f"{paths}: question {name} is not in this task's train split; give its --task")
        for r in select(list(some), [q]) if select else some:
            if r["verdict"] != "selected":
                continue
            text, had_one = strip_answer_sentence(r["text"])
            stripped, empty = stripped + had_one, empty + (not text)
            if text:
                pairs.append((q, *prompts.sert_pair(q, text)))
                wrong += filters.answers_stated(r["text"], q) == "wrong"
    need(pairs, f"no path of {paths} is selected; loosen a rule (--min-tokens, ..) or sample more")
    print(f"{len(pairs):,} selected paths of {len(questions):,} questions; {stripped} lost a closing "
          f"answer sentence of their own, {empty} were nothing else and are left out")  # fmt: skip
    if wrong:
        print(f"{wrong:,} of these paths state another answer than the gold one that is appended to "
              "them; --answer consistent leaves such paths out")  # fmt: skip
    return pairs


class Run(NamedTuple):
    """One training: the student that it starts from, its examples, and what decides the result."""

    student: Student
    model: GPT2
    tokenizer: Tokenizer
    out: Path
    o: Options
    settings: dict  # everything that decides the weights
    sert: dict  # what its checkpoints will say of themselves
    examples: list[Example]
    names: list[str]  # question ids of the examples
    held: list[Example]  # validation examples


def prepare(
    student: Student, method: str, pairs: list[Pair], suffix: str, about: dict, o: Options
) -> Run:
    """Read the student, choose and encode the examples, collect what decides the result. `suffix` is
    the prompts' one, `about` says where the completions come from."""
    folder, label = student.folder, student.label
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    out = Path(o.out_dir or f"out/{o.task}/{label}/{method}/seed{o.s.seed}")
    pairs, held = split_pairs(pairs, o)
    stored = files.stored_settings(out / "settings.json")
    device, machine = resolve_machine(o.device, o.dtype, stored, model.n_params())
    text = json.dumps([[prompt, completion] for _, prompt, completion in pairs + held])
    settings = {
        "method": method,
        "task": o.task,
        "model": label,
        "weights": weights_hash(folder),
        "data": hashlib.sha256(text.encode()).hexdigest(),
        "prompt_suffix": suffix,
        "loss_on": o.loss_on,
        "holdout": o.holdout,
        **asdict(o.s),
        **machine,
    }
    parents = [*student.sert.get("parents", []), student.name]
    sert = {"method": method, "root": label, "parents": parents, "commit": student.commit}
    sert |= {k: settings[k] for k in ("task", "prompt_suffix", "data", "seed")}
    sert |= {**about, "settings": settings}
    examples = [encode_example(tokenizer, *texts, o.loss_on) for _, *texts in pairs + held]
    for (q, _, _), (ids, _) in zip(pairs + held, examples):
        n, context = len(ids), model.config.n_positions
        told = f"{q.name}: its training text has {n} tokens, the model's context is {context}"
        need(n <= context, f"{told}; leave that record out")
    model.to(device)
    parts = examples[: len(pairs)], [q.id for q, _, _ in pairs], examples[len(pairs) :]
    return Run(student, model, tokenizer, out, o, settings, sert, *parts)


def split_pairs(pairs: list[Pair], o: Options) -> tuple[list[Pair], list[Pair]]:
    """(train, held out) pairs: with --holdout the task's fixed tenth is not trained on."""
    held_ids = {q.id for q in tasks.load(o.task, "validation", o.data_dir)} if o.holdout else ()
    held = [p for p in pairs if p[0].id in held_ids]
    pairs = [p for p in pairs if p[0].id not in held_ids][: o.limit]
    need(held or not o.holdout, "--holdout finds no example of the validation split; leave it out")
    need(pairs, "there are no examples to train on; check the input file")
    return pairs, held


def train_student(run: Run) -> None:
    """Train the student and save it; a repeated call continues, or does nothing at the end."""
    out, o, m, main = run.out, run.o, run.settings, parallel.RANK == 0
    steps = o.s.steps(len(run.examples))
    print(
        f"{m['method']}: {len(run.examples):,} examples, {n_supervised(run.examples):,} supervised "
        f"tokens, {steps:,} steps of {o.s.batch_size}; {m['model']} on {m['device']}, {m['dtype']}, "
        f"{m['threads']} thread(s)"
    )
    with files.lock_folder(out) if main else contextlib.nullcontext():
        if main:
            files.check_place(out / "last", folder=True)
            # A longer run starts with the very steps of a shorter one: these two may be raised.
            fixed = {k: v for k, v in m.items() if k not in ("epochs", "max_steps")}
            files.check_settings(out / "settings.json", fixed, "choose another --out-dir")
        title = f"{m['method']}, {o.task}, {m['model']}"
        if parallel.largest(main and read_sert(out / "last").get("step") == steps):
            if main and not (out / "loss.png").exists():
                console.draw_curve(out, title)
            return print(f"{out}/last is there already, trained for {steps:,} steps")
        asked = tasks.load(o.task, "test", o.data_dir)[: o.report] if main else []
        before = greedy_records(run, asked, run.student.suffix)
        validation, bf16 = partial(validate, run) if run.held else None, m["dtype"] == "bf16"
        fit(run.model, run.examples, run.names, out, o.s, bf16, validation, o.save_seconds)
        parallel.end()
        if not main:
            return None
        save_model(run.model, out / "last", run.student.folder, {**run.sert, "step": steps})
        if asked:
            after = greedy_records(run, asked, m["prompt_suffix"])
            limits = filters.limits(tasks.preset(o.task, run.student.label))
            console.print_before_after(asked, before, after, run.tokenizer, limits)
        print(f"\nwrote {out}/last (Hugging Face format) and {out}/metrics.jsonl")
        console.draw_curve(out, title)


def validate(run: Run) -> dict:
    """Measure loss and accuracy on the held-out tenth; the model with the lowest loss goes to best/."""
    asked = tasks.load(run.o.task, "validation", run.o.data_dir)[:VALIDATE]
    loss = mean_loss(run.model, run.held, run.settings["dtype"] == "bf16")
    records = greedy_records(run, asked, run.settings["prompt_suffix"])
    log = files.read_jsonl(run.out / "metrics.jsonl")
    if loss < min((r.get("validation_loss", math.inf) for r in log), default=math.inf):
        sert = {**run.sert, "validation_loss": loss}
        save_model(run.model, run.out / "best", run.student.folder, sert)
    accuracy = sum(r["correct"] for r in records) / len(asked)
    return {"validation_loss": round(loss, 6), "validation_acc": round(accuracy, 4)}


def greedy_records(run: Run, questions: list[Question], suffix: str) -> list[dict]:
    """Prediction records of greedy decoding with prompts that end in `suffix`."""
    cap = tasks.get(run.o.task).greedy_cap
    outputs = greedy(run.model, run.tokenizer, questions, suffix, cap)
    return [grade(q, text, finish) for q, (text, finish) in zip(questions, outputs)]


if __name__ == "__main__":
    run_script(main, parse_args)
