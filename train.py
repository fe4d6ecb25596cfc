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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from sert_min import answers, filters, patterns, prompts, tasks
from sert_min.finetune import METRICS, TrainSettings, encode_example, fit, mean_loss, n_supervised
from sert_min.gpt2 import GPT2, load_model, save_model
from sert_min.io import files, parallel
from sert_min.io.errors import SertError, printable, run_script
from sert_min.io.files import check_settings, lock_folder, read_jsonl
from sert_min.io.hub import find_model, model_label, read_sert, weights_hash
from sert_min.io.machine import resolve_machine
from sert_min.metrics import grade, greedy, summarize
from sert_min.questions import describe
from sert_min.tokenizer import Tokenizer, load_tokenizer

VALIDATE = 100  # validation questions answered after each epoch


def add_training_flags(p: argparse.ArgumentParser) -> None:
    """The flags that train.py and distill.py share."""
    d = TrainSettings()
    g = p.add_argument_group("data and model")
    g.add_argument(
        "--task", choices=tasks.TASKS, default=tasks.DEFAULT, help="default: %(default)s"
    )
    g.add_argument("--data-dir", help="read the datasets here instead of downloading them")
    g.add_argument(
        "--model", help="student to start from: name, folder or hub id (default: the task's)"
    )
    g.add_argument("--out-dir", help="default: out/TASK/MODEL/METHOD/seedN")
    g.add_argument("--limit", type=int, help="only the first N examples")
    g = p.add_argument_group("optimisation [SERT §III-A]")
    g.add_argument(
        "--epochs", type=int, help="default: the task's (paper: 20); may be raised later"
    )
    g.add_argument("--batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    g.add_argument("--lr", type=float, default=d.lr, help="default: %(default)s, constant")
    g.add_argument("--max-steps", type=int, help="stop after so many steps; may be raised later")
    g.add_argument("--accumulate", type=int, default=d.accumulate, help="split a batch in N parts")
    g.add_argument("--clip", type=float, default=d.clip, help="gradient norm, default %(default)s")
    g.add_argument("--loss-on", choices=("answer", "all"), default="answer", help="all: prompt too")
    g.add_argument("--holdout", action="store_true", help="keep a tenth for validation, save best")
    g.add_argument("--seed", type=int, default=d.seed)
    g = p.add_argument_group("how it runs")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="bf16: autocast"
    )
    g.add_argument("--compile", action="store_true", help="torch.compile model and loss")
    g.add_argument(
        "--save-seconds", type=float, default=300, help="between saved states (%(default)s)"
    )
    g.add_argument(
        "--report", type=int, help="test questions for before/after (micro: 100, else 0)"
    )


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--method", choices=("sert", "finetune"), default="sert")
    p.add_argument("--paths", help="selected.jsonl (default: where sample.py put it for this task)")
    add_training_flags(p)
    return p.parse_args(argv)


# --- examples -------------------------------------------------------------------------------------


def sert_pairs(paths: Path, questions: list) -> list[tuple]:
    """(question, prompt, completion) of each selected path; a closing answer sentence of the
    path's own goes first, so that only the gold answer is stated."""
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
        text, had_one = answers.strip_answer_sentence(record["text"])
        stripped, empty = stripped + had_one, empty + (not text)
        if text:
            pairs.append((q, *prompts.sert_pair(q, text)))
    print(f"{len(pairs):,} selected paths of {len(questions):,} questions; {stripped} lost a closing "
          f"answer sentence of their own, {empty} were nothing else and are left out")  # fmt: skip
    return pairs


def finetune_pairs(questions: list) -> list[tuple]:
    return [(q, *prompts.finetune_pair(q)) for q in questions]


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    parallel.start()
    name = args.model or tasks.get(args.task).student
    folder = find_model(name)
    questions = tasks.load(args.task, "train", args.data_dir)
    print(describe(questions, "train"))
    if args.method == "finetune":
        pairs, source = finetune_pairs(questions), "labels"
    else:
        label = model_label(name, folder)
        paths = Path(
            args.paths or f"out/{args.task}/{label}/paths-train/seed{args.seed}/selected.jsonl"
        )
        if not paths.exists():
            raise SertError(
                f"{paths} does not exist; run `python sample.py --task {args.task} --model {name} "
                f"--seed {args.seed}` to its end first, or give --paths"
            )
        pairs, source = sert_pairs(paths, questions), str(paths)
    train_student(args, args.method, name, pairs, suffix="", source=source)


class Run(NamedTuple):
    """One training: the student it starts from, its examples, and all that decides the result."""

    folder: Path  # of the student
    model: GPT2
    tokenizer: Tokenizer
    out: Path
    device: torch.device
    s: TrainSettings
    settings: dict
    sert: dict  # what its checkpoints will say of themselves
    examples: list
    names: list[str]  # question ids of the examples
    held: list  # validation examples


def train_student(args, method: str, name: str, pairs: list, suffix: str, source: str) -> Path:
    """Train the model `name` on (question, prompt, completion) pairs and save it; returns the run's
    folder. Repeating the call continues it, or does nothing once it is done."""
    run = prepare(args, method, name, pairs, suffix, source)
    out, steps = run.out, run.s.steps(len(run.examples))
    print(
        f"{method}: {len(run.examples):,} examples, {n_supervised(run.examples):,} supervised "
        f"tokens, {steps:,} steps of {run.s.batch_size}; {run.sert['root']} on {run.device}, "
        f"{run.settings['dtype']}, {run.settings['threads']} thread(s)"
    )
    with lock_folder(out) if parallel.RANK == 0 else contextlib.nullcontext():
        # A longer run starts with the very steps of a shorter one: these two may be raised.
        fixed = {k: v for k, v in run.settings.items() if k not in ("epochs", "max_steps")}
        if parallel.RANK == 0:
            check_settings(out / "settings.json", fixed, "choose another --out-dir")
        done = parallel.RANK == 0 and read_sert(out / "last").get("step") == steps
        if parallel.largest(done):
            print(f"{out}/last is there already, trained for {steps:,} steps")
            return out
        run.model.to(run.device)
        asked = report_questions(args) if parallel.RANK == 0 else []
        before = greedy_records(run, asked, read_sert(run.folder))
        fit(
            run.model,
            run.examples,
            run.names,
            out,
            run.s,
            run.settings["dtype"] == "bf16",
            args.compile,
            partial(validate, run, args) if run.held else None,
            args.save_seconds,
        )
        parallel.end()
        if parallel.RANK > 0:
            return out
        save_model(run.model, out / "last", run.folder, {**run.sert, "step": steps})  # it is done
        from sert_min.report.figures import plot_training  # late: matplotlib takes a second

        title = f"{method}, {args.task}, {run.sert['root']}"
        plot_training(out / "metrics.jsonl", out / "loss.png", title)
        if asked:
            print_before_after(before, greedy_records(run, asked, run.sert), asked, run.tokenizer)
    print(f"\nwrote {out}/last (Hugging Face format), {out}/metrics.jsonl and {out}/loss.png")
    return out


def prepare(args, method: str, name: str, pairs: list, suffix: str, source: str) -> Run:
    """Read the student, choose and encode the examples, write down what decides the result."""
    s, folder = train_settings(args), find_model(name)
    model, tokenizer, label = load_model(folder), load_tokenizer(folder), model_label(name, folder)
    out = Path(args.out_dir or f"out/{args.task}/{label}/{method}/seed{args.seed}")
    pairs, held = split_pairs(pairs, args)
    device, machine = resolve_machine(
        args.device, args.dtype, files.stored_settings(out / "settings.json"), model.n_params()
    )
    settings = {
        "method": method,
        "task": args.task,
        "model": label,
        "weights": weights_hash(folder),
        "data": data_hash(pairs + held),
        "prompt_suffix": suffix,
        "loss_on": args.loss_on,
        "holdout": args.holdout,
        **asdict(s),
        "compile": args.compile,
        **machine,
    }
    sert = {
        "method": method,
        "root": label,
        "parents": [*read_sert(folder).get("parents", []), name],
        **{k: settings[k] for k in ("task", "prompt_suffix", "data", "seed")},
        "source": source,
        "settings": settings,
    }
    examples, held = (
        encode_pairs(some, tokenizer, args.loss_on, model.config.n_positions)
        for some in (pairs, held)
    )
    names = [q.id for q, _, _ in pairs]
    return Run(folder, model, tokenizer, out, device, s, settings, sert, examples, names, held)


def validate(run: Run, args, poll) -> dict:
    """Loss and accuracy on the held-out tenth; the model with the lowest loss is kept in best/."""
    loss = mean_loss(run.model, run.held, run.settings["dtype"] == "bf16", poll)
    asked = tasks.load(args.task, "validation", args.data_dir)[:VALIDATE]
    right = sum(r["correct"] for r in greedy_records(run, asked, run.sert, poll))
    if loss < best_so_far(run.out / "metrics.jsonl"):
        save_model(run.model, run.out / "best", run.folder, {**run.sert, "validation_loss": loss})
    return {"validation_loss": round(loss, 6), "validation_acc": round(right / len(asked), 4)}


def train_settings(args) -> TrainSettings:
    """The flags, with the task's number of epochs where none is given."""
    if args.limit is not None and args.limit < 1:
        raise SertError("--limit must be at least 1")
    chosen = {f.name: getattr(args, f.name) for f in fields(TrainSettings)}
    if chosen["epochs"] is None:
        chosen["epochs"] = tasks.get(args.task).preset["epochs"]
    return TrainSettings(**chosen).check()


def split_pairs(pairs: list, args) -> tuple[list, list]:
    """(train, held out) pairs: with --holdout the task's fixed tenth is not trained on."""
    held = []
    if args.holdout:
        held_ids = {q.id for q in tasks.load(args.task, "validation", args.data_dir)}
        held = [p for p in pairs if p[0].id in held_ids]
        pairs = [p for p in pairs if p[0].id not in held_ids]
        if not held:
            raise SertError("--holdout finds no example of the validation split; leave it out")
    pairs = pairs[: args.limit]
    if not pairs:
        raise SertError("there are no examples to train on; check the input file")
    return pairs, held


def encode_pairs(pairs: list, tokenizer, loss_on: str, context: int) -> list:
    """Examples of (question, prompt, completion); what does not fit the context is an error."""
    examples = []
    for q, prompt, completion in pairs:
        ids, targets = encode_example(tokenizer, prompt, completion, loss_on)
        if len(ids) > context:
            raise SertError(
                f"question {q.id}: its training text has {len(ids)} tokens, the model's context is "
                f"{context}; leave that record out"
            )
        examples.append((ids, targets))
    return examples


def data_hash(pairs: list) -> str:
    """SHA-256 of all training text, in order."""
    text = json.dumps([[prompt, completion] for _, prompt, completion in pairs])
    return hashlib.sha256(text.encode()).hexdigest()


def best_so_far(metrics: Path) -> float:
    """The lowest validation loss that the run has logged."""
    losses = (r.get("validation_loss", math.inf) for r in read_jsonl(metrics, METRICS))
    return min(losses, default=math.inf)


# --- before and after -----------------------------------------------------------------------------


def report_questions(args) -> list:
    """The test questions of the table of before and after; none on the real tasks by default."""
    n = args.report if args.report is not None else tasks.get(args.task).report
    return tasks.load(args.task, "test", args.data_dir)[:n] if n > 0 else []


def greedy_records(run: Run, questions: list, sert: dict, progress=lambda _: None) -> list[dict]:
    """Prediction records of greedy decoding with the prompt form that `sert` names."""
    suffix, cap = sert.get("prompt_suffix", ""), tasks.get(run.settings["task"]).greedy_cap
    outputs = greedy(run.model, run.tokenizer, questions, suffix, cap, progress=progress)
    return [grade(q, text, finish) for q, (text, finish) in zip(questions, outputs)]


def reasons(q, text: str, tokenizer) -> bool:
    """Is this output a reasoning path? Without its closing answer sentence it breaks no pattern
    rule, is as long as the task's rules ask, and does not repeat itself more than they allow."""
    text, rules = answers.strip_answer_sentence(text)[0], tasks.get(q.task).preset
    ids = tokenizer.encode(text)
    if len(ids) < rules["min_tokens"] or filters.rep2(ids) > rules["max_rep2"]:
        return False
    return patterns.pattern_break(text, q) is None


def print_before_after(before, after, questions, tokenizer) -> None:
    """The table of what training changed in greedy decoding, and three outputs side by side."""
    print(f"\ngreedy decoding, {len(questions)} test questions{'before':>14}{'after':>10}")
    rows = []
    for records in (before, after):
        m = summarize(records, questions)
        shown = sum(reasons(q, r["text"], tokenizer) for q, r in zip(questions, records))
        rows.append((shown / len(records), m["acc"], m["acc_lenient"][0], m["unparseable"]))
    (r0, a0, l0, u0), (r1, a1, l1, u1) = rows
    print(f"{'reasoning outputs':<40}{r0:>10.1%}{r1:>10.1%}")
    print(f"{'accuracy (lenient: any answer word)':<40}{l0:>10.1%}{l1:>10.1%}")
    print(
        f"{'accuracy (strict)':<40}{a0[0]:>10.1%}{a1[0]:>10.1%}   95 % {a1[1]:.1%} to {a1[2]:.1%}"
    )
    print(f"{'no readable answer':<40}{u0:>10}{u1:>10}")
    for q, b, a in list(zip(questions, before, after))[:3]:
        print(f"\n  Q: {printable(q.text)[:160]}  [{q.answer}]")
        print(f"     before: {printable(b['text'])[:160]}")
        print(f"     after:  {printable(a['text'])[:240]}")


if __name__ == "__main__":
    run_script(main, parse_args())
