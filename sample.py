"""Stage 1 of SERT: sample 25 continuations per question and keep the latent reasoning paths.

[SERT §II-A, §III-A] The five most probable first tokens each start five nucleus samples. Rules then
drop imitation, option lists, direct answers, short, repetitive and too probable paths. Of what is
left, the least repetitive path of each question is selected for self-training (train.py).

    python sample.py                                    # the embedded micro-world, offline
    python sample.py --html paths.html                  # also writes a page of all paths
    python sample.py --min-perplexity 1.2               # filters the stored samples anew
    python sample.py --task commonsense_qa --limit 100  # real GPT-2, downloads weights and data
    torchrun --nproc-per-node 2 sample.py --task strategy_qa   # the same bytes, two processes
"""

import sert_min.io.early  # noqa: F401  (first: it makes one line of what fails below)

# isort: split
import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from sert_min import filters, script, tasks
from sert_min.decode import fitting_rows
from sert_min.generate import SampleSettings, check_lengths, sample_paths
from sert_min.gpt2 import GPT2
from sert_min.io import files
from sert_min.io.errors import command, need, run_script, this_command
from sert_min.io.files import read_jsonl, to_line, write_atomic
from sert_min.io.hub import weights_hash
from sert_min.io.machine import MACHINE, resolve_machine
from sert_min.io.parallel import RANK, WORLD
from sert_min.io.progress import Bar
from sert_min.models import load_model
from sert_min.patterns import EARLY_KINDS
from sert_min.prompts import question_prompt
from sert_min.questions import Question, data_hash, describe
from sert_min.report import check, console, page
from sert_min.script import Blocks, Student, add_flags, given
from sert_min.tokenizer import Tokenizer, load_tokenizer

BLOCK = 32  # questions per block
DERIVED = ("paths.jsonl", "selected.jsonl", "funnel.json")  # made anew from blocks/ at every end


def parse_args(argv=None):
    p, d = script.parser(__doc__), SampleSettings()
    # fmt: off
    g = p.add_argument_group("what to sample")
    add_flags(g, *script.TASK, "--model", "--limit")
    g.add_argument("--split", choices=tasks.SPLITS, default="train", help="default: %(default)s")
    g.add_argument("--out-dir", help="default: out/TASK/MODEL/paths-SPLIT/seedN; RUN/paths-SPLIT for a run")
    g = p.add_argument_group("how paths are drawn [SERT §III-A]")
    g.add_argument("--branches", type=int, default=d.branches, help="first tokens (%(default)s)")
    g.add_argument("--samples", type=int, default=d.samples, help="per branch (%(default)s)")
    g.add_argument("--raw", action="store_true", help="branches x samples plain samples instead")
    g.add_argument("--top-k", type=int, default=d.top_k, help="0: off (%(default)s)")
    g.add_argument("--top-p", type=float, default=d.top_p, help="1: off (%(default)s)")
    g.add_argument("--temperature", type=float, default=d.temperature, help="0: greedy")
    g.add_argument("--max-new-tokens", type=int, help="default: the task's (paper: silent, 128)")
    g.add_argument("--early-reject", action=argparse.BooleanOptionalAction,
                   help="stop a row once it broke a pattern rule (default: on, off for micro)")
    add_flags(g, "--seed")
    g = p.add_argument_group("which paths are kept [SERT §II-A-2]; default: the task's preset")
    filters.add_flags(g)
    g.add_argument("--refilter", action="store_true", help="only filter what is stored; on any machine")
    g = p.add_argument_group("how it runs")
    add_flags(g, "--device", "--dtype")
    g.add_argument("--block-questions", type=int, help=f"default: {BLOCK} (GPU: by rows)")
    g.add_argument("--rows", type=int, help="decoded together; 200 (GPU: by memory)")
    g.add_argument("--html", help="write a one-file page to look at the paths (--no-early-reject: all)")
    g = p.add_argument_group("instead of sampling the task")
    g.add_argument("--prompt", help="continue this text, --samples times")
    g.add_argument("--check", action="store_true", help="compare gpt2 with known real outputs")
    add_flags(g, "--dry-run")
    # fmt: on
    return script.parse(p, argv)


class Run(NamedTuple):
    """One run of sampling, and everything that decides its bytes."""

    out: Path
    student: Student
    model: GPT2
    tokenizer: Tokenizer
    split: list[Question]  # all of them
    blocks: Blocks  # of the first --limit of them
    s: SampleSettings
    limits: dict  # of the rules
    settings: dict  # they decide the samples; a folder with other settings is refused


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    if args.prompt is not None or args.check:
        return check.run(args, sample_settings(args, 128))
    if args.dry_run and RANK > 0:
        return None
    run = prepare(args)
    questions, model, m = run.blocks.questions, run.model, run.settings
    prompts = [question_prompt(q, run.student.suffix) for q in questions]
    names = [q.name for q in questions]
    ids = list(map(run.tokenizer.encode_prompt, prompts))
    check_lengths(ids, names, model, run.s.max_new_tokens)
    if RANK == 0:
        console.print_sampling(m, run.limits, model.n_params(), len(questions), run.out)
    if args.dry_run:
        return console.print_questions(questions, prompts, list(map(len, ids)))
    with files.lock_folder(run.out, f".lock-{RANK}"):
        fix = "--refilter changes rules only" if args.refilter else "choose another --out-dir"
        files.check_settings(run.out / "settings.json", m, fix)
        if m["data"] == "own":
            run.blocks.check_order(run.split)
        script.convert_older(run.out, m, run.blocks, run.split)
        if not args.refilter:
            sample_missing(run)
        if RANK > 0:
            return None
        write_derived(run)
        funnel = files.read_json(run.out / "funnel.json")
        console.print_funnel(funnel)
        console.print_paths(run.out)
        console.print_hint(run.out, funnel, bool(m["early_reject"]))
        selected = run.out / "selected.jsonl"
        print(f"\nwrote {run.out / 'paths.jsonl'} and {selected}")
        if args.html:
            n = page.write_page(run.out, args.html, run.tokenizer, command=this_command())
            print(f"wrote {args.html} ({n:,} questions); open it in a browser")
        first = not run.student.sert.get("parents")  # a second round needs a place of its own
        if first and m["split"] == "train" and not run.s.raw and funnel["counts"]["selected"]:
            flags = {"model": run.student.name, "paths": selected, "data_dir": args.data_dir}
            task = tasks.flags(m["task"])
            print(f"next: {command('train.py', task, **flags, seed=run.s.seed)}")


def prepare(args) -> Run:
    """Resolve the flags: student, questions, settings, machine, folder."""
    script.check_counts(args, "limit", "block_questions")
    parent = Path(args.html or ".").absolute().parent
    need(parent.is_dir(), f"--html {args.html}: its folder does not exist; make it first")
    if args.html:
        files.check_place(args.html, folder=False)
    student = script.open_student(args.model, args.task)
    preset = tasks.preset(args.task, student.label)
    s, limits = sample_settings(args, preset["max_new_tokens"]), filters.limits(preset, vars(args))
    tokenizer, model = load_tokenizer(student.folder), load_model(student.folder)
    questions = tasks.load(args.task, args.split, args.data_dir)
    if RANK == 0:
        print(describe(questions, args.split))
    out = Path(args.out_dir or default_folder(args.task, args.split, student, s))
    while RANK > 0 and not (out / "settings.json").exists():
        time.sleep(0.02)  # process 0 writes it: rows by its memory, and which kernels serve
    stored = files.stored_settings(out / "settings.json")
    need(stored or not args.refilter, f"{out} holds no samples; run without --refilter first")
    if args.refilter:  # nothing is computed, so another machine or version will do
        device, machine = torch.device("cpu"), {k: stored.get(k) for k in MACHINE}
    else:
        device, machine = resolve_machine(args.device, args.dtype, stored, model.n_params())
    rows, size, each = s.rows, BLOCK, s.branches * s.samples
    if device.type == "cuda":
        rows, size = fitting_rows(device, model, s.max_new_tokens, BLOCK, each)
    size = given(args.block_questions, stored.get("block_questions", size))
    s = replace(s, rows=given(args.rows, stored.get("rows", rows)))
    settings = {
        "task": args.task,
        "split": args.split,
        "data": "own" if tasks.is_own(args.task) else data_hash(questions),  # rows can be appended
        "model": student.label,
        "weights": weights_hash(student.folder),
        "prompt_suffix": student.suffix,
        **asdict(s),
        "block_questions": size,
        "early_reject": early_kinds(args.early_reject, preset, limits, stored),
        **machine,
    }
    model.cast_(torch.bfloat16 if machine["dtype"] == "bf16" else torch.float32).to(device)
    blocks = Blocks(out / "blocks", questions[: args.limit], size, each)
    return Run(out, student, model, tokenizer, questions, blocks, s, limits, settings)


def sample_settings(args, max_new_tokens: int) -> SampleSettings:
    named = SampleSettings.__annotations__
    flags = script.chosen(args, named, max_new_tokens=max_new_tokens, rows=SampleSettings.rows)
    return SampleSettings(**flags).check()


def default_folder(task: str, split: str, student: Student, s: SampleSettings) -> Path:
    kind = f"{'paths-raw' if s.raw else 'paths'}-{split}"
    if student.sert.get("parents") and student.folder.name == "last":
        return student.folder.parent / kind  # in the run's folder, where the figures look for it
    return Path(f"out/{task}/{student.label}/{kind}/seed{s.seed}")


def early_kinds(flag: bool | None, preset: dict, limits: dict, stored: dict) -> list[str]:
    """The pattern kinds that end a row early. They are a setting of the samples: a stored run keeps
    its own, and filtering anew must drop at least these."""
    kinds = [k for k in limits["patterns"] if k in EARLY_KINDS]
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
        print(f"{len(missing)} of {len(blocks.numbers())} blocks are to be sampled")
    kept, model, early = 0, (run.model, run.tokenizer), run.settings["early_reject"]
    n, done = sum(len(blocks.block(i)) for i in todo) * blocks.each, 0
    with Bar(n, "path", disable=RANK > 0 or not todo) as bar:
        for i in todo:
            block = blocks.block(i)
            done += len(block) * blocks.each
            sampled = sample_paths(
                *model, block, run.s, run.student.suffix, early, bar.count, memory
            )
            blocks.write(i, sampled)
            records = filters.path_records(sampled, block, run.tokenizer, run.limits)
            kept += sum(r["verdict"] in ("kept", "selected") for r in records)
            bar.note = f", {kept:,} kept"
            bar.reach(done)
    if RANK == 0 and todo:
        spent = to_line({"processes": WORLD, **bar.spent()})
        files.append_durable(run.out / "timings.jsonl", spent)
    for i in missing if RANK == 0 else []:
        while blocks.read(i) is None:
            time.sleep(0.05)


def write_derived(run: Run) -> None:
    """paths.jsonl, selected.jsonl and funnel.json from the block files, by today's rules. Blocks are
    read one by one, so memory stays flat. With --refilter, blocks may be missing."""
    funnel, paths, blocks, left_out = filters.Funnel(), run.out / "paths.jsonl", run.blocks, []

    def lines():
        for i in blocks.numbers():
            sampled = blocks.read(i)
            if not sampled:
                left_out.append(i)
                continue
            for r in filters.path_records(sampled, blocks.block(i), run.tokenizer, run.limits):
                yield to_line(funnel.add(r))
        fix = "run without --refilter first"
        if any(blocks.folder.glob("*.jsonl")):
            fix = "give the --limit that its blocks were made with"
        need(funnel.verdicts, f"{run.out} holds no samples of these questions; {fix}")

    write_atomic(paths, lines())  # an error in `lines` leaves the old file as it is
    if left_out:
        n = len(blocks.numbers())
        print(f"{n - len(left_out)} of {n} blocks are there, the others are left out; a short last "
              "block is found with the --limit that it was made with")  # fmt: skip
    selected = (r for r in read_jsonl(paths) if r["verdict"] == "selected")
    write_atomic(run.out / "selected.jsonl", map(to_line, selected))
    told = {"rules": run.limits, "counts": funnel.counts()}
    write_atomic(run.out / "funnel.json", json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main, parse_args)
