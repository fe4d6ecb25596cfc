"""Stage 1 of SERT: sample 25 continuations per question and keep the latent reasoning paths.

[SERT §II-A, §III-A] The five most probable first tokens each start five nucleus samples. Rules then
drop imitation, option lists, direct answers, short, repetitive and too probable paths. Of what is
left, the least repetitive path of each question is selected for self-training (train.py).

    python sample.py                                    # the embedded micro-world, offline
    python sample.py --html paths.html                  # .. and a page to look at the paths
    python sample.py --min-perplexity 1.2               # filters the stored samples anew
    python sample.py --task commonsense_qa --limit 100  # real GPT-2, downloads weights and data
    torchrun --nproc-per-node 2 sample.py --task strategy_qa   # the same bytes, two processes
"""

import argparse
import contextlib
import itertools
import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from sert_min import filters, tasks
from sert_min.decode import fitting_rows
from sert_min.generate import SampleSettings, check_lengths, sample_paths
from sert_min.gpt2 import GPT2
from sert_min.io.errors import SertError, need, printable, printable_lines, run_script
from sert_min.io.files import (
    append_durable,
    check_settings,
    lock_folder,
    read_json,
    read_jsonl,
    stored_settings,
    to_line,
    write_atomic,
)
from sert_min.io.hub import weights_hash
from sert_min.io.machine import MACHINE, pick_device, pick_dtype, pick_threads, resolve_machine
from sert_min.io.parallel import RANK, WORLD
from sert_min.models import load_model
from sert_min.patterns import EARLY_KINDS
from sert_min.prompts import question_prompt
from sert_min.questions import Question, data_hash, describe
from sert_min.report import console
from sert_min.script import (
    Blocks,
    Student,
    TokenBar,
    add_flags,
    check_counts,
    given,
    open_student,
    parser,
)
from sert_min.tokenizer import Tokenizer, load_tokenizer

BLOCK = 32  # questions per block
DERIVED = ("paths.jsonl", "selected.jsonl", "funnel.json")  # made anew from blocks/ at every end


def parse_args(argv=None):
    p, d = parser(__doc__), SampleSettings()
    g = p.add_argument_group("what to sample")
    add_flags(g, "--task", "--data-dir", "--model", "--limit")
    g.add_argument("--split", choices=tasks.SPLITS, default="train", help="default: %(default)s")
    g.add_argument(
        "--out-dir", help="default: out/TASK/MODEL/paths-SPLIT/seedN; RUN/paths-SPLIT for a run"
    )
    g = p.add_argument_group("how paths are drawn [SERT §III-A]")
    g.add_argument("--branches", type=int, default=d.branches, help="first tokens (%(default)s)")
    g.add_argument("--samples", type=int, default=d.samples, help="per branch (%(default)s)")
    g.add_argument("--raw", action="store_true", help="branches x samples plain samples instead")
    g.add_argument("--top-k", type=int, default=d.top_k, help="0: off (%(default)s)")
    g.add_argument("--top-p", type=float, default=d.top_p, help="1: off (%(default)s)")
    g.add_argument("--temperature", type=float, default=d.temperature, help="0: greedy")
    g.add_argument("--max-new-tokens", type=int, help="default: the task's (paper: silent, 128)")
    add_flags(g, "--seed")
    g.add_argument(
        "--early-reject",
        action=argparse.BooleanOptionalAction,
        help="stop a row once it broke a pattern rule (default: on, off for micro)",
    )
    g = p.add_argument_group("which paths are kept [SERT §II-A-2]; default: the task's preset")
    filters.add_flags(g)
    g.add_argument(
        "--refilter", action="store_true", help="only filter what is stored; on any machine"
    )
    g = p.add_argument_group("how it runs")
    add_flags(g, "--device", "--dtype")
    g.add_argument("--block-questions", type=int, help=f"default: {BLOCK} (GPU: by rows)")
    g.add_argument("--rows", type=int, help="decoded together; 200 (GPU: by memory)")
    g = p.add_argument_group("a page to look at the paths (all of them: --no-early-reject)")
    g.add_argument("--html", help="write this one-file page when the run is done")
    g = p.add_argument_group("instead of sampling the task")
    g.add_argument("--prompt", help="continue this text, --samples times")
    g.add_argument("--check", action="store_true", help="compare gpt2 with known real outputs")
    add_flags(g, "--dry-run")
    return p.parse_args(argv)


class Run(NamedTuple):
    """One run of sampling, and everything that decides its bytes."""

    out: Path
    student: Student
    model: GPT2
    tokenizer: Tokenizer
    split: list[Question]  # all of them
    questions: list[Question]  # the first --limit of them
    s: SampleSettings
    limits: dict  # of the rules
    settings: dict  # what decides the samples; a folder of others is refused

    @property
    def per_question(self) -> int:
        return self.s.branches * self.s.samples

    @property
    def blocks(self) -> Blocks:
        size = self.settings["block_questions"]
        return Blocks(self.out / "blocks", self.questions, size, self.per_question)


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    if args.prompt is not None or args.check:
        return without_task(args)
    run = prepare(args)
    encode, suffix = run.tokenizer.encode_prompt, run.student.suffix
    prompts = [encode(question_prompt(q, suffix)) for q in run.questions]
    names = [f"question {q.id}" for q in run.questions]
    check_lengths(prompts, names, run.model, run.s.max_new_tokens)
    if RANK == 0:
        print_run(run)
    if args.dry_run:
        return print_plan(run, len(prompts[0]))
    with lock_folder(run.out, f".lock-{RANK}"):
        if not args.refilter:
            while RANK > 0 and not (run.out / "settings.json").exists():
                time.sleep(0.02)  # process 0 writes it
            check_settings(run.out / "settings.json", run.settings, "choose another --out-dir")
        convert(run)
        if not args.refilter:
            sample_missing(run)
        if RANK == 0:
            write_derived(run, whole=not args.refilter)
            console.print_funnel(read_json(run.out / "funnel.json"))
            console.print_paths(run.out)
            print_next(run)
            if args.html:
                from sert_min.report import page

                n = page.write_page(run.out, args.html, run.tokenizer)
                print(f"wrote {args.html} ({n:,} questions); open it in a browser")
    return None


def prepare(args) -> Run:
    """Resolve the flags: student, questions, settings, machine, folder."""
    check_counts(args, "limit", "block_questions")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise SertError(f"--html {args.html}: its folder does not exist; make it first")
    preset = tasks.get(args.task).preset
    s, limits = sample_settings(args, preset["max_new_tokens"]), filters.limits(preset, vars(args))
    student = open_student(args.model, args.task)
    tokenizer, model = load_tokenizer(student.folder), load_model(student.folder)
    questions = tasks.load(args.task, args.split, args.data_dir)
    if RANK == 0:
        print(describe(questions, args.split))
    out = Path(args.out_dir or default_folder(args.task, args.split, student, s))
    stored = stored_settings(out / "settings.json")
    if args.refilter:  # nothing is computed, so another machine or version will do
        need(stored, f"{out} holds no samples; run without --refilter first")
        device, machine = torch.device("cpu"), {k: stored.get(k) for k in MACHINE}
    else:
        device, machine = resolve_machine(args.device, args.dtype, stored, model.n_params())
    rows, size = s.rows, BLOCK
    if device.type == "cuda":
        rows, size = fitting_rows(device, model, s.max_new_tokens, BLOCK, s.branches * s.samples)
    s = replace(s, rows=given(args.rows, stored.get("rows", rows)))
    settings = {
        "task": args.task,
        "split": args.split,
        "data": data_hash(questions),
        "model": student.label,
        "weights": weights_hash(student.folder),
        "prompt_suffix": student.suffix,
        **asdict(s),
        "block_questions": given(args.block_questions, stored.get("block_questions", size)),
        "early_reject": early_kinds(args.early_reject, preset, limits, stored),
        **machine,
    }
    if args.refilter:
        check_settings(out / "settings.json", settings, "--refilter changes rules only")
    model.cast_(torch.bfloat16 if machine["dtype"] == "bf16" else torch.float32).to(device)
    some = questions[: args.limit]
    return Run(out, student, model, tokenizer, questions, some, s, limits, settings)


def sample_settings(args, max_new_tokens: int) -> SampleSettings:
    chosen = {f.name: getattr(args, f.name) for f in fields(SampleSettings)}
    chosen["max_new_tokens"] = given(args.max_new_tokens, max_new_tokens)
    chosen["rows"] = given(args.rows, SampleSettings.rows)
    return SampleSettings(**chosen).check()


def default_folder(task: str, split: str, student: Student, s: SampleSettings) -> Path:
    kind = f"{'paths-raw' if s.raw else 'paths'}-{split}"
    if student.sert.get("parents") and student.folder.name == "last":
        return student.folder.parent / kind  # in the run's folder, where the figures look for it
    return Path(f"out/{task}/{student.label}/{kind}/seed{s.seed}")


def early_kinds(flag: bool | None, preset: dict, limits: dict, stored: dict) -> list[str]:
    """The pattern kinds that end a row early. They are a setting of the samples: a stored run keeps
    its own, and filtering anew must drop at least these."""
    kinds = [k for k in limits["patterns"] if k in EARLY_KINDS]
    if not stored or flag is not None:
        kinds = kinds if given(flag, preset["early_reject"]) else []
    there = stored.get("early_reject", kinds)
    need(
        set(there) <= set(limits["patterns"]),
        f"the samples were made with early rejection of {','.join(there)}: looser --patterns need "
        "new samples (--no-early-reject, another --out-dir)",
    )
    return there if flag is None or (flag and there) else kinds


def sample_missing(run: Run) -> None:
    """Make the block files that are missing (every WORLD-th one of them) and wait, as process 0, for
    those of the other processes. A finished block is never made again."""
    blocks, memory = run.blocks, {}  # the decoder's memory, from block to block
    missing = blocks.missing()
    todo = [i for i in missing if i % WORLD == RANK]
    if RANK == 0 and missing:
        for name in DERIVED:  # train.py must not take a part for all
            (run.out / name).unlink(missing_ok=True)
        if there := len(blocks.numbers()) - len(missing):
            print(f"{there} of {len(blocks.numbers())} blocks are there already")
    bar = TokenBar(sum(len(blocks.block(i)) for i in todo), disable=RANK > 0 or not todo)
    kept, model, early = 0, (run.model, run.tokenizer), run.settings["early_reject"]
    for i in todo:
        block = blocks.block(i)
        sampled = sample_paths(*model, block, run.s, run.student.suffix, early, bar.count, memory)
        blocks.write(i, sampled)
        records = filters.path_records(sampled, block, run.tokenizer, run.limits)
        kept += sum(r["verdict"] in ("kept", "selected") for r in records)
        bar.note = f", {kept:,} paths kept"
        bar.update(len(block))
    bar.close()
    if RANK == 0 and todo:
        append_durable(run.out / "timings.jsonl", to_line({"processes": WORLD, **bar.spent()}))
    others = [i for i in missing if i % WORLD] if RANK == 0 else []
    if others:
        print("waiting for the blocks of the other processes")
    for i in others:
        while blocks.read(i) is None:
            time.sleep(0.05)


def write_derived(run: Run, whole: bool = True) -> None:
    """paths.jsonl, selected.jsonl and funnel.json from the block files, by today's rules. Blocks are
    read one by one, so memory stays flat. Without `whole`, missing blocks may be left out."""
    funnel, paths, blocks, there = filters.Funnel(), run.out / "paths.jsonl", run.blocks, 0

    def lines():
        nonlocal there
        for i in blocks.numbers():
            sampled = blocks.read(i)
            need(sampled or not whole, f"block {i} of {run.out} is damaged; repeat the command")
            there += bool(sampled)
            block = blocks.block(i)
            for r in filters.path_records(sampled or [], block, run.tokenizer, run.limits):
                yield to_line(funnel.add(r))
        need(funnel.verdicts, f"{run.out} holds no samples; run without --refilter first")

    write_atomic(paths, lines())  # an error in `lines` leaves the old file as it is
    if there < len(blocks.numbers()):
        print(
            f"{there} of {len(blocks.numbers())} blocks are there, the others are left out; a short "
            "last block is found with the --limit that it was made with"
        )
    selected = (r for r in read_jsonl(paths) if r["verdict"] == "selected")
    write_atomic(run.out / "selected.jsonl", map(to_line, selected))
    told = {"rules": run.limits, "counts": funnel.counts()}
    write_atomic(run.out / "funnel.json", json.dumps(told, indent=1) + "\n")


def convert(run: Run) -> None:
    """Bring a folder of an earlier version into today's form. Its samples stand in paths.jsonl, those
    of the last finished blocks perhaps still in blocks/, and its settings.json also holds the limits
    of the rules. What is torn is sampled anew."""
    path, old = run.out / "settings.json", run.out / "paths.jsonl"
    if not {rule.flag for rule in filters.RULES} & stored_settings(path).keys():
        return
    need(WORLD == 1, f"{run.out} is of an earlier version; run once without torchrun to convert it")
    keys = ("id", "question", "branch", "sample", "token_ids", "logprobs", "path_start", "finish")
    records = read_jsonl(old) if old.exists() else iter(())
    size, each = run.settings["block_questions"], run.per_question
    for i in range(-(-len(run.split) // size)):
        part: list[dict] = []
        with contextlib.suppress(SertError, KeyError):  # a torn line
            for r in itertools.islice(records, size * each):
                part.append({k: r[k] for k in keys})
        block = run.split[i * size : (i + 1) * size][: len(part) // each]  # --limit may have cut it
        part = part[: len(block) * each]
        if not part or [r["question"] for r in part[::each]] != [q.text for q in block]:
            break
        Blocks(run.out / "blocks", run.split[: i * size + len(block)], size, each).write(i, part)
    write_atomic(path, json.dumps(run.settings, indent=1) + "\n")


def without_task(args) -> None:
    """--prompt and --check: the model alone."""
    from sert_min.report import check

    student = open_student(args.model or ("gpt2" if args.check else None), args.task)
    tokenizer, device = load_tokenizer(student.folder), pick_device(args.device)
    model = load_model(student.folder, device)
    pick_threads(model.n_params())
    if args.check:  # in fp32, where the right weights are far inside the limit
        return check.check_known_outputs(model, tokenizer)
    model.cast_(pick_dtype(args.dtype, device, model.n_params()))
    return check.print_prompt_samples(model, tokenizer, args.prompt, sample_settings(args, 128))


# --- what the user sees ---------------------------------------------------------------------------


def print_run(run: Run) -> None:
    """What is about to happen, with everything that was resolved."""
    m = run.settings
    print(
        f"model {m['model']} ({run.model.n_params() / 1e6:.1f}M parameters), {m['device']}, "
        f"{m['dtype']}, {m['threads']} thread(s); {len(run.questions):,} questions x "
        f"{run.per_question} paths, at most {run.s.max_new_tokens} tokens each"
    )
    rules = "; ".join(filters.words(rule, run.limits[rule.flag]) for rule in filters.RULES)
    print(f"rules: {rules}; early rejection {'on' if m['early_reject'] else 'off'}")


def print_plan(run: Run, prompt_tokens: int) -> None:
    """--dry-run: a prompt, and how much there is to do at most."""
    q, most = run.questions[0], len(run.questions) * run.per_question * run.s.max_new_tokens
    print(f"\nprompt of question {printable(q.id)} ({prompt_tokens} tokens):")
    print(printable_lines(question_prompt(q, run.student.suffix)))
    n, size = len(run.blocks.numbers()), run.settings["block_questions"]
    print(f"\nplan: {n} blocks of {size} questions, at most {most:,} tokens, to {run.out}")


def print_next(run: Run) -> None:
    """Where the results are, and the next command."""
    selected, task = run.out / "selected.jsonl", run.settings["task"]
    print(f"\nwrote {run.out / 'paths.jsonl'} and {selected}")
    if run.settings["split"] == "train" and not run.s.raw:
        flag = "" if task == tasks.DEFAULT else f" --task {task}"
        print(f"next: python train.py{flag} --model {run.student.name} --paths {selected}")


if __name__ == "__main__":
    run_script(main, parse_args())
