"""Stage 2 of SERT: fine-tune the student on its own kept paths (self-training), or on labels only.

[SERT §II-B, §III-A] `Question: {q}\\nAnswer: {path} So the answer is {a}.` with the gold answer;
Adam, batch 8, learning rate 3e-4, 20 epochs. The loss covers what follows the prompt (the paper can
be read both ways: --loss-on all). `--method finetune` is the baseline without any reasoning.

    python train.py                               # micro-world, on what `python sample.py` selected
    python train.py --task commonsense_qa         # real GPT-2, same thing
    python train.py --task strategy_qa --method finetune --dtype bf16
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from sert_min import filters, prompts, tasks
from sert_min.evaluate import greedy, score, summarize
from sert_min.finetune import TrainSettings, encode_example, fit, loss_sum, n_supervised, pack
from sert_min.gpt2 import find_model, load_model, model_label, read_sert, save_model, weights_hash
from sert_min.plots import plot_training
from sert_min.runtime import (
    SertError,
    pick_device,
    pick_dtype,
    pick_threads,
    printable,
    run_script,
)
from sert_min.store import (
    append_durable,
    check_settings,
    lock_folder,
    read_json,
    read_jsonl,
    to_line,
)
from sert_min.tokenizer import load_tokenizer


def add_training_flags(p: argparse.ArgumentParser) -> None:
    """The flags that train.py and distill.py share."""
    d = TrainSettings()
    g = p.add_argument_group("data and model")
    g.add_argument("--task", choices=tasks.TASKS, default="micro", help="default: %(default)s")
    g.add_argument("--data-dir", help="read the datasets here instead of downloading them")
    g.add_argument("--model", help="student to start from (default: see below)")
    g.add_argument("--out-dir", help="default: out/TASK/MODEL/METHOD/seedN")
    g.add_argument("--limit", type=int, help="only the first N examples")
    g = p.add_argument_group("optimisation [SERT §III-A]")
    g.add_argument("--epochs", type=int, help="default: the task's (paper: 20)")
    g.add_argument("--batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    g.add_argument("--lr", type=float, default=d.lr, help="default: %(default)s, constant")
    g.add_argument("--max-steps", type=int, help="stop after so many steps")
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
        q = by_id.get(record.get("id"))
        if q is None or q.text != record["question"]:
            raise SertError(
                f"{paths}: question {record.get('id')} is not in this task's train split; "
                "give the --task that the paths were sampled for"
            )
        text, had_one = prompts.strip_answer_sentence(record["text"])
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
    name = args.model or tasks.default_model(args.task)
    folder = find_model(name)
    questions = tasks.load(args.task, "train", args.data_dir)
    print(tasks.describe(questions, "train"))
    if args.method == "finetune":
        pairs, source = finetune_pairs(questions), "labels"
    else:
        label = model_label(name, folder)
        paths = Path(args.paths or f"out/{args.task}/{label}/paths-train/seed0/selected.jsonl")
        if not paths.exists():
            raise SertError(
                f"{paths} does not exist; run `python sample.py --task {args.task} --model {name}` "
                "first, or give --paths"
            )
        pairs, source = sert_pairs(paths, questions), str(paths)
    train_student(args, args.method, name, pairs, suffix="", source=source)


def train_student(args, method: str, name: str, pairs: list, suffix: str, source: str) -> Path:
    """Train the model `name` on (question, prompt, completion) pairs and save it; returns the run's
    folder. Repeating the call continues it, or does nothing once it is done."""
    # 1. What decides the result: everything in `settings`, stored beside it.
    s = TrainSettings(
        epochs=args.epochs if args.epochs is not None else tasks.preset(args.task)["epochs"],
        batch_size=args.batch_size,
        lr=args.lr,
        max_steps=args.max_steps,
        seed=args.seed,
        accumulate=args.accumulate,
        clip=args.clip,
    ).check()
    folder = find_model(name)
    tokenizer, device = load_tokenizer(folder), pick_device(args.device)
    model = load_model(folder)
    label = model_label(name, folder)
    out = Path(args.out_dir or f"out/{args.task}/{label}/{method}/seed{args.seed}")
    if args.limit is not None:
        pairs = pairs[: args.limit]
    held = []
    if args.holdout:
        chosen = {q.id for q in tasks.holdout_split([p[0] for p in pairs])[1]}
        held = [p for p in pairs if p[0].id in chosen]
        pairs = [p for p in pairs if p[0].id not in chosen]
    examples = encode_pairs(pairs, tokenizer, args.loss_on, model.config.n_positions)
    stored = read_json(out / "settings.json") if (out / "settings.json").exists() else {}
    threads = pick_threads(model.n_params())
    dtype = pick_dtype(args.dtype, device, model.n_params())
    settings = {
        "method": method,
        "task": args.task,
        "model": label,
        "weights": weights_hash(folder),
        "data": data_hash(pairs),
        "prompt_suffix": suffix,
        "loss_on": args.loss_on,
        "holdout": args.holdout,
        **asdict(s),
        "dtype": "bf16" if dtype is torch.bfloat16 else "fp32",
        "device": device.type,
        "threads": stored.get("threads", threads),
        "torch": torch.__version__,
    }
    torch.set_num_threads(settings["threads"])
    steps = s.steps(len(examples))
    print(
        f"{method}: {len(examples):,} examples, {n_supervised(examples):,} supervised tokens, "
        f"{steps:,} steps of {s.batch_size}; {label} on {device.type}, {settings['dtype']}, "
        f"{settings['threads']} thread(s)"
    )
    with lock_folder(out):
        check_settings(out / "settings.json", settings, "choose another --out-dir")
        sert = {
            "method": method,
            "root": label,
            "parents": [*read_sert(folder).get("parents", []), name],
            **{k: settings[k] for k in ("task", "prompt_suffix", "data", "seed")},
            "source": source,
            "settings": settings,
        }
        if read_sert(out / "last").get("step") == steps:
            print(f"{out}/last is there already, trained for {steps} steps")
            return out

        # 2. Train.
        report_on = tasks.load(args.task, "test", args.data_dir)[: report_size(args)]
        before = greedy_records(model, tokenizer, report_on, read_sert(folder), args.task)
        model.to(device)
        bar = tqdm(total=steps, unit="step")
        best = [float("inf")]

        def after_epoch(epoch: int) -> dict:
            if not held:
                return {}
            loss = mean_loss(model, encode_pairs(held, tokenizer, args.loss_on, 10**9))
            told = [p[0] for p in held][:100]
            right = greedy_records(model, tokenizer, told, sert, args.task)
            if loss < best[0]:
                best[0] = loss
                save_model(model, out / "best", folder, {**sert, "epoch": epoch})
            return {
                "validation_loss": round(loss, 6),
                "validation_acc": summarize(right, told)["acc"][0],
            }

        start = time.perf_counter()
        best[0] = best_so_far(out / "metrics.jsonl")
        fit(model, examples, out, s, settings["dtype"] == "bf16", after_epoch, bar=bar)
        bar.close()
        save_model(model, out / "last", folder, {**sert, "step": steps})
        seconds = round(time.perf_counter() - start, 2)
        append_durable(out / "timings.jsonl", to_line({"steps": steps, "seconds": seconds}))
        plot_training(out / "metrics.jsonl", out / "loss.png", f"{method}, {args.task}, {label}")

        # 3. Tell what changed.
        after = greedy_records(model, tokenizer, report_on, sert, args.task)
        if report_on:
            print_before_after(before, after, report_on, args.task, tokenizer)
    print(f"\nwrote {out}/last (Hugging Face format), {out}/metrics.jsonl and {out}/loss.png")
    return out


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
    import hashlib

    text = json.dumps([[prompt, completion] for _, prompt, completion in pairs])
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def mean_loss(model, examples: list) -> float:
    """Mean loss per supervised token, in batches of 32."""
    device = model.wte.weight.device
    parts = [pack(examples[i : i + 32], device) for i in range(0, len(examples), 32)]
    return sum(loss_sum(model, b).item() for b in parts) / n_supervised(examples)


def best_so_far(metrics: Path) -> float:
    """The lowest validation loss that an interrupted run has logged."""
    records = read_jsonl(metrics) if metrics.exists() else ()
    return min((r["validation_loss"] for r in records if "validation_loss" in r), default=1e9)


# --- before and after -----------------------------------------------------------------------------


def report_size(args) -> int:
    return args.report if args.report is not None else 100 if args.task == "micro" else 0


def greedy_records(model, tokenizer, questions: list, sert: dict, task: str) -> list[dict]:
    """Prediction records of greedy decoding with the prompt form of the checkpoint."""
    cap = tasks.preset(task)["max_new_tokens"]
    outputs = greedy(model, tokenizer, questions, sert.get("prompt_suffix", ""), cap)
    return [score(q, text, finish) for q, (text, finish) in zip(questions, outputs)]


def reasons(q, text: str, task: str, tokenizer) -> bool:
    """Is this output a reasoning path? Without its closing answer sentence it breaks no pattern
    rule and is as long as the task's length rule asks."""
    text = prompts.strip_answer_sentence(text)[0]
    long_enough = len(tokenizer.encode(text)) >= tasks.preset(task)["min_tokens"]
    return long_enough and filters.pattern_break(text, q) is None


def print_before_after(before, after, questions, task, tokenizer) -> None:
    """The table of what training changed in greedy decoding, and three outputs side by side."""
    print(f"\ngreedy decoding, {len(questions)} test questions{'before':>14}{'after':>10}")
    rows = []
    for records in (before, after):
        m = summarize(records, questions)
        shown = sum(reasons(q, r["text"], task, tokenizer) for q, r in zip(questions, records))
        rows.append((shown / len(records), m["acc"], m["unparseable"]))
    (r0, a0, u0), (r1, a1, u1) = rows
    print(f"{'reasoning outputs':<40}{r0:>10.1%}{r1:>10.1%}")
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
