"""Stage 2 of SERT: fine-tune the student on its own kept paths (self-training), or on labels only.

[SERT §II-B, §III-A] `Question: {q}\\nAnswer: {path} So the answer is {a}.` with the gold answer;
Adam, batch 8, learning rate 3e-4, 20 epochs. The loss covers what follows the prompt (the paper can
be read both ways: --loss-on all). `--method finetune` is the baseline without any reasoning.

    python train.py                               # micro-world, on what `python sample.py` selected
    python train.py --task commonsense_qa         # real GPT-2, same thing
    python train.py --task strategy_qa --method finetune --dtype bf16
"""

import argparse
import contextlib
import hashlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from sert_min import filters, prompts, tasks
from sert_min.answers import strip_answer_sentence
from sert_min.finetune import (
    Example,
    TrainSettings,
    encode_example,
    fit,
    mean_loss,
    n_supervised,
)
from sert_min.gpt2 import GPT2, load_model, save_model
from sert_min.io import parallel
from sert_min.io.errors import SertError, need, printable, run_script
from sert_min.io.files import check_settings, lock_folder, read_jsonl, stored_settings
from sert_min.io.hub import read_sert, weights_hash
from sert_min.io.machine import resolve_machine
from sert_min.metrics import grade, greedy
from sert_min.questions import Question, describe
from sert_min.report import console
from sert_min.script import Student, add_flags, check_counts, given, open_student, parser
from sert_min.tokenizer import Tokenizer, load_tokenizer

VALIDATE = 100  # validation questions answered after each epoch
Pair = tuple[Question, str, str]  # question, prompt, completion


def add_training_flags(p: argparse.ArgumentParser) -> None:
    """The flags that train.py and distill.py share."""
    d = TrainSettings()
    g = p.add_argument_group("data and model")
    out = dict(help="default: out/TASK/MODEL/METHOD/seedN")
    add_flags(g, "--task", "--data-dir", "--model", "--limit", "--out-dir", out_dir=out)
    g = p.add_argument_group("optimisation [SERT §III-A]")
    g.add_argument(
        "--epochs", type=int, help="default: the task's (paper: 20); can be raised later"
    )
    g.add_argument("--batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    g.add_argument("--lr", type=float, default=d.lr, help="default: %(default)s, constant")
    g.add_argument("--max-steps", type=int, help="stop after so many steps; can be raised later")
    g.add_argument("--accumulate", type=int, default=d.accumulate, help="split a batch in N parts")
    g.add_argument("--loss-on", choices=("answer", "all"), default="answer", help="all: prompt too")
    g.add_argument("--holdout", action="store_true", help="keep a tenth for validation, save best")
    add_flags(g, "--seed")
    g = p.add_argument_group("how it runs")
    add_flags(g, "--device", "--dtype")
    g.add_argument("--save-seconds", type=float, default=300, help="between states (%(default)s)")
    g.add_argument("--report", type=int, help="test questions answered before and after "
                   "(micro: 100, else 0)")  # fmt: skip


def parse_args(argv=None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--method", choices=("sert", "finetune"), default="sert")
    p.add_argument("--paths", help="selected.jsonl (default: where sample.py put it for this task)")
    add_training_flags(p)
    return p.parse_args(argv)


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


def options(args) -> Options:
    """Check the training flags; the task's number of epochs stands for a missing one."""
    check_counts(args, "limit")
    task = tasks.get(args.task)
    chosen = {f.name: getattr(args, f.name) for f in fields(TrainSettings)}
    chosen["epochs"] = given(args.epochs, task.preset["epochs"])
    same = {k: getattr(args, k) for k in Options._fields if k not in ("s", "report")}
    return Options(
        s=TrainSettings(**chosen).check(), report=given(args.report, task.report), **same
    )


def main(args) -> None:
    parallel.start()
    o, student = options(args), open_student(args.model, args.task)
    questions = tasks.load(o.task, "train", o.data_dir)
    print(describe(questions, "train"))
    if args.method == "finetune":
        pairs, source = [(q, *prompts.finetune_pair(q)) for q in questions], "labels"
    else:
        default = f"out/{o.task}/{student.label}/paths-train/seed{o.s.seed}/selected.jsonl"
        paths = Path(args.paths or default)
        need(
            paths.exists(),
            f"{paths} does not exist; run `python sample.py --task {o.task} --model {student.name} "
            f"--seed {o.s.seed}` to its end first, or give --paths",
        )
        pairs, source = sert_pairs(paths, questions), str(paths)
    train_student(student, args.method, pairs, "", source, o)


def sert_pairs(paths: Path, questions: list[Question]) -> list[Pair]:
    """(question, prompt, completion) of each selected path. A path loses a closing answer sentence
    of its own, so that only the gold answer is stated."""
    by_id = {q.id: q for q in questions}
    pairs, stripped, empty = [], 0, 0
    for record in read_jsonl(paths):
        if record.get("verdict") != "selected":
            continue
        q = by_id.get(str(record.get("id")))
        if q is None or q.text != record.get("question") or not isinstance(record.get("text"), str):
            raise SertError(
                f"{paths}: question {record.get('id')} is not in this task's train split, or its "
                "record is damaged; give the --task that the paths were sampled for"
            )
        text, had_one = strip_answer_sentence(record["text"])
        stripped, empty = stripped + had_one, empty + (not text)
        if text:
            pairs.append((q, *prompts.sert_pair(q, text)))
    print(f"{len(pairs):,} selected paths of {len(questions):,} questions; {stripped} lost a closing "
          f"answer sentence of their own, {empty} were nothing else and are left out")  # fmt: skip
    return pairs


# --- the run --------------------------------------------------------------------------------------


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

    @property
    def bf16(self) -> bool:
        return self.settings["dtype"] == "bf16"


def train_student(
    student: Student, method: str, pairs: list[Pair], suffix: str, source: str, o: Options
) -> Path:
    """Train a student on (question, prompt, completion) pairs and save it; returns the run's folder.
    `suffix` is the prompts' one, `source` says where the completions come from. Repeating the call
    continues the training, or does nothing once it is done."""
    run = prepare(student, method, pairs, suffix, source, o)
    out, steps = run.out, o.s.steps(len(run.examples))
    print(
        f"{method}: {len(run.examples):,} examples, {n_supervised(run.examples):,} supervised "
        f"tokens, {steps:,} steps of {o.s.batch_size}; {run.sert['root']} on "
        f"{run.model.wte.weight.device}, {run.settings['dtype']}, {run.settings['threads']} thread(s)"
    )
    with lock_folder(out) if parallel.RANK == 0 else contextlib.nullcontext():
        # A longer run starts with the very steps of a shorter one: these two may be raised.
        fixed = {k: v for k, v in run.settings.items() if k not in ("epochs", "max_steps")}
        if parallel.RANK == 0:
            check_settings(out / "settings.json", fixed, "choose another --out-dir")
        done = parallel.RANK == 0 and read_sert(out / "last").get("step") == steps
        if parallel.largest(done):
            print(f"{out}/last is there already, trained for {steps:,} steps")
            if parallel.RANK == 0 and not (out / "loss.png").exists():
                draw_curve(run)
            return out
        asked = tasks.load(o.task, "test", o.data_dir)[: o.report] if parallel.RANK == 0 else []
        before = greedy_records(run, asked, student.suffix)
        validation = validate(run) if run.held else None
        fit(run.model, run.examples, run.names, out, o.s, run.bf16, validation, o.save_seconds)
        parallel.end()
        if parallel.RANK > 0:
            return out
        save_model(run.model, out / "last", student.folder, {**run.sert, "step": steps})
        if asked:
            after, limits = greedy_records(run, asked, suffix), tasks.get(o.task).preset
            console.print_before_after(asked, before, after, run.tokenizer, filters.limits(limits))
        draw_curve(run)
    print(f"\nwrote {out}/last (Hugging Face format), {out}/metrics.jsonl and {out}/loss.png")
    return out


def draw_curve(run: Run) -> None:
    """Draw loss.png from the log. The result is saved by then: a picture that fails is one line."""
    title = f"{run.settings['method']}, {run.o.task}, {run.sert['root']}"
    try:
        from sert_min.report.figures import plot_training  # late: matplotlib takes a second

        plot_training(run.out / "metrics.jsonl", run.out / "loss.png", title)
    except Exception as e:  # of matplotlib, its backend or its settings
        print(f"loss.png was not drawn ({type(e).__name__}: {printable(str(e))[:100]})")


def prepare(
    student: Student, method: str, pairs: list[Pair], suffix: str, source: str, o: Options
) -> Run:
    """Read the student, choose and encode the examples, collect what decides the result."""
    folder, label = student.folder, student.label
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    out = Path(o.out_dir or f"out/{o.task}/{label}/{method}/seed{o.s.seed}")
    pairs, held = split_pairs(pairs, o)
    stored = stored_settings(out / "settings.json")
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
    sert = {
        "method": method,
        "root": label,
        "parents": [*student.sert.get("parents", []), student.name],
        **{k: settings[k] for k in ("task", "prompt_suffix", "data", "seed")},
        "source": source,
        "settings": settings,
    }
    context, names = model.config.n_positions, [q.id for q, _, _ in pairs]
    examples, held = (encode_pairs(some, tokenizer, o.loss_on, context) for some in (pairs, held))
    model.to(device)
    return Run(student, model, tokenizer, out, o, settings, sert, examples, names, held)


def split_pairs(pairs: list[Pair], o: Options) -> tuple[list[Pair], list[Pair]]:
    """(train, held out) pairs: with --holdout the task's fixed tenth is not trained on."""
    held = []
    if o.holdout:
        held_ids = {q.id for q in tasks.load(o.task, "validation", o.data_dir)}
        held = [p for p in pairs if p[0].id in held_ids]
        pairs = [p for p in pairs if p[0].id not in held_ids]
        need(held, "--holdout finds no example of the validation split; leave it out")
    pairs = pairs[: o.limit]
    need(pairs, "there are no examples to train on; check the input file")
    return pairs, held


def encode_pairs(pairs: list[Pair], tokenizer, loss_on: str, context: int) -> list[Example]:
    """Examples of pairs; one that is longer than the context is an error."""
    examples = []
    for q, prompt, completion in pairs:
        ids, targets = encode_example(tokenizer, prompt, completion, loss_on)
        need(
            len(ids) <= context,
            f"question {q.id}: its training text has {len(ids)} tokens, the model's context is "
            f"{context}; leave that record out",
        )
        examples.append((ids, targets))
    return examples


def validate(run: Run):
    """A function for `fit` that measures loss and accuracy on the held-out tenth and keeps the model
    with the lowest loss in best/."""
    asked = tasks.load(run.o.task, "validation", run.o.data_dir)[:VALIDATE]
    metrics = run.out / "metrics.jsonl"

    def measure() -> dict:
        loss = mean_loss(run.model, run.held, run.bf16)
        records = greedy_records(run, asked, run.sert["prompt_suffix"])
        logged = (r.get("validation_loss", math.inf) for r in read_jsonl(metrics))
        if loss < min(logged, default=math.inf):
            sert = {**run.sert, "validation_loss": loss}
            save_model(run.model, run.out / "best", run.student.folder, sert)
        right = sum(r["correct"] for r in records)
        return {
            "validation_loss": round(loss, 6),
            "validation_acc": round(right / len(asked), 4),
        }

    return measure


# --- before and after -----------------------------------------------------------------------------


def greedy_records(run: Run, questions: list, suffix: str) -> list[dict]:
    """Prediction records of greedy decoding with prompts that end in `suffix`."""
    cap = tasks.get(run.o.task).greedy_cap
    outputs = greedy(run.model, run.tokenizer, questions, suffix, cap)
    return [grade(q, text, finish) for q, (text, finish) in zip(questions, outputs)]


if __name__ == "__main__":
    run_script(main, parse_args())
