"""Stage 1 of SERT: sample 25 continuations per question and keep the latent reasoning paths.

[SERT §II-A, §III-A] The five most probable first tokens each start five nucleus samples; rules then
drop imitation, option lists, direct answers, short, repetitive and too probable paths, and of what
is left the least repetitive path of each question is selected for self-training (train.py).
Choices where the paper is silent stand in the README.

    python sample.py                                    # the embedded micro-world, offline
    python sample.py --html paths.html                  # .. and a page to look at them
    python sample.py --task commonsense_qa --limit 100  # real GPT-2, downloads weights and data
    torchrun --nproc-per-node 2 sample.py --task strategy_qa   # the same bytes, two processes
"""

import argparse
import itertools
import json
import os
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from sert_min import filters, patterns, tasks
from sert_min.filters import FilterSettings
from sert_min.generate import Row, SampleSettings, check_lengths, sample_block
from sert_min.gpt2 import GPT2, load_model
from sert_min.io import files
from sert_min.io.errors import SertError, printable, printable_lines, run_script
from sert_min.io.files import (
    PATH,
    append_durable,
    check_settings,
    fits,
    lock_folder,
    read_json,
    read_jsonl,
    to_line,
    write_atomic,
)
from sert_min.io.hub import find_model, model_label, read_sert, weights_hash
from sert_min.io.machine import MACHINE, pick_device, pick_dtype, pick_threads, resolve_machine
from sert_min.prompts import question_prompt
from sert_min.questions import data_hash, describe
from sert_min.report import page
from sert_min.tokenizer import Tokenizer, load_tokenizer

BLOCK = 32  # questions per block
MOST = 10_000  # paths of a question
STORED = {"rows": range(1, 2**31), "block_questions": range(1, 2**31), "early_reject": [str]}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    d = SampleSettings()
    g = p.add_argument_group("what to sample")
    g.add_argument(
        "--task", choices=tasks.TASKS, default=tasks.DEFAULT, help="default: %(default)s"
    )
    g.add_argument("--data-dir", help="read the datasets here instead of downloading them")
    g.add_argument("--split", choices=("train", "validation", "test"), default="train")
    g.add_argument("--limit", type=int, help="only the first N questions (default: all)")
    g.add_argument(
        "--model", help="gpt2, gpt2-medium, .., a hub id or folder (default: the task's)"
    )
    g.add_argument(
        "--out-dir", help="default: out/TASK/MODEL/paths-SPLIT/seedN; RUN/paths-SPLIT for a run"
    )
    g = p.add_argument_group("how paths are drawn [SERT §III-A]")
    g.add_argument("--branches", type=int, default=d.branches, help="first tokens (%(default)s)")
    g.add_argument(
        "--samples", type=int, default=d.samples, help="samples per branch (%(default)s)"
    )
    g.add_argument("--raw", action="store_true", help="branches x samples plain samples instead")
    g.add_argument("--top-k", type=int, default=d.top_k, help="0: off (%(default)s)")
    g.add_argument("--top-p", type=float, default=d.top_p, help="1: off (%(default)s)")
    g.add_argument(
        "--temperature", type=float, default=d.temperature, help="0: greedy (%(default)s)"
    )
    g.add_argument("--max-new-tokens", type=int, help="default: the task's (paper: silent, 128)")
    g.add_argument("--seed", type=int, default=d.seed)
    g = p.add_argument_group("which paths are kept [SERT §II-A-2]; default: the task's preset")
    g.add_argument("--patterns", help="kinds to drop, by comma: imitative,options,direct; or none")
    g.add_argument("--min-tokens", type=int, help="paper: 25; 0: off")
    g.add_argument("--max-rep2", type=float, help="repeated bigrams, paper: 0.2; 1: off")
    g.add_argument("--min-perplexity", type=float, help="paper: 5; 0: off")
    g.add_argument(
        "--early-reject",
        action=argparse.BooleanOptionalAction,
        help="stop a row once it broke a pattern rule (default: on, off for micro)",
    )
    g.add_argument(
        "--refilter",
        action="store_true",
        help="judge stored samples anew by the rules given; others: the preset",
    )
    g = p.add_argument_group("how it runs")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    g.add_argument("--block-questions", type=int, help="default: 32 (GPU: by rows)")
    g.add_argument("--rows", type=int, help="decoded together; 200 (GPU: by memory)")
    g = p.add_argument_group("a page to look at the paths (all of them: --no-early-reject)")
    g.add_argument("--html", help="write this one-file page when the run is done")
    g.add_argument("--html-before", help="folder of an earlier run to show beside it")
    g.add_argument("--html-questions", type=int, default=page.LIMIT, help="default: %(default)s")
    g = p.add_argument_group("instead of sampling the task")
    g.add_argument("--prompt", help="continue this text, --samples times")
    g.add_argument("--check", action="store_true", help="compare gpt2 with known real outputs")
    g.add_argument("--dry-run", action="store_true", help="print a prompt and the plan, then stop")
    return p.parse_args(argv)


def filter_settings(args) -> FilterSettings:
    """The task's preset, moved by the flags that were given."""
    names = ("min_tokens", "max_rep2", "min_perplexity")
    chosen = {k: given(getattr(args, k), tasks.get(args.task).preset[k]) for k in names}
    if args.patterns is not None:
        chosen["patterns"] = patterns.parse_patterns(args.patterns)
    return FilterSettings(**chosen)


def given(value, otherwise):
    """A flag's value, or what stands for it when it is left out (0 is a value)."""
    return otherwise if value is None else value


def sample_settings(args) -> SampleSettings:
    chosen = {f.name: getattr(args, f.name) for f in fields(SampleSettings)}
    default = tasks.get(args.task).preset["max_new_tokens"]
    chosen["max_new_tokens"] = given(args.max_new_tokens, default)
    chosen["rows"] = given(args.rows, SampleSettings.rows)
    s = SampleSettings(**chosen).check()
    if s.branches * s.samples > MOST:
        raise SertError(f"--branches times --samples is {s.branches * s.samples}, more than {MOST}")
    return s


class Run(NamedTuple):
    """One run of sampling, and all that decides its bytes."""

    out: Path
    name: str  # --model
    model: GPT2
    tokenizer: Tokenizer
    questions: list  # of the whole split: --limit comes later
    suffix: str  # of the prompt, as the checkpoint was trained
    s: SampleSettings
    rules: FilterSettings
    settings: dict  # stored beside the paths; other ones are refused
    kept: dict  # memory, from one block to the next

    @property
    def per_question(self) -> int:
        return self.s.branches * self.s.samples


# --- one block ------------------------------------------------------------------------------------


def early_reject(questions: list, tokenizer, kinds: list):
    """A test for rows that have broken a pattern rule which no later token can mend."""

    def broken(row: Row) -> bool:
        text = tokenizer.decode(row.token_ids[row.path_start :])
        return patterns.pattern_break(text, questions[row.question], kinds, final=False) is not None

    return broken


def block_records(run: Run, questions: list, progress=lambda tokens: None) -> list[dict]:
    """Sample and judge one block: 25 path records per question, in order."""
    prompts = [run.tokenizer.encode(question_prompt(q, run.suffix)) for q in questions]
    names = [f"{q.task}/{q.id}" for q in questions]
    kinds = run.settings["early_reject"]
    reject = early_reject(questions, run.tokenizer, kinds) if kinds else None
    rows = sample_block(run.model, run.tokenizer, prompts, names, run.s, reject, progress, run.kept)
    records = []
    for row in rows:
        q = questions[row.question]
        records.append(
            {
                "task": q.task,
                "id": q.id,
                "question": q.text,
                "answer": q.answer,
                "branch": row.branch,
                "sample": row.sample,
                "text": "",
                "token_ids": row.token_ids,
                "logprobs": row.logprobs,
                "path_start": row.path_start,
                "path_end": len(row.token_ids),
                "finish": row.finish,
            }
        )
    return apply_rules(records, {q.id: q for q in questions}, run.tokenizer, run.rules)


def apply_rules(records: list[dict], by_id: dict, tokenizer, rules) -> list[dict]:
    """Fill text, path_end, perplexity, rep2 and verdict of whole questions' records."""
    for r in records:
        token_bytes = [tokenizer.to_bytes.get(i, b"") for i in r["token_ids"]]
        r.update(filters.judge_path(r, token_bytes, by_id[r["id"]], rules))
    return filters.select(records)


# --- the folder -----------------------------------------------------------------------------------


def whole_blocks(path: Path, blocks: list[list], per_question: int) -> int:
    """How many of `blocks` (lists of questions) stand whole at the start of paths.jsonl. What
    follows them there (a torn block, the short last block of a smaller --limit) is cut off; more
    than that is damage, and set aside in paths.jsonl.torn."""
    if not path.exists():
        return 0
    whole = end = 0
    with open(path, "rb") as f:
        for block in blocks:
            wanted = [q.id for q in block for _ in range(per_question)]
            lines = list(itertools.islice(f, len(wanted)))
            if [stored_id(line) for line in lines] != wanted:
                if RANK == 0:  # the others only look
                    cut_off(path, end, damaged=bool(f.readline()))
                break
            whole, end = whole + 1, end + sum(map(len, lines))
    return whole


def cut_off(path: Path, end: int, damaged: bool) -> None:
    """Cut `path` at byte `end`; keep what was there if it is more than an unfinished block."""
    if damaged:
        torn = path.with_name(path.name + ".torn")
        with open(path, "rb") as f, open(torn, "ab") as aside:
            f.seek(end)
            shutil.copyfileobj(f, aside)
        print(f"{path} is damaged behind byte {end:,}; the rest is set aside in {torn}")
    os.truncate(path, end)


def stored_id(line: bytes) -> str | None:
    """The id in a line of paths.jsonl; None for a torn line."""
    try:
        return json.loads(line)["id"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def merge_blocks(folder: Path, blocks: list[list], done: int) -> int:
    """Move finished block files to the end of paths.jsonl, in order; returns how many blocks it
    holds now."""
    while done < len(blocks):
        part = block_file(folder, done, blocks[done])
        if not part.exists():
            break
        append_durable(folder / "paths.jsonl", part.read_text(encoding="utf-8"))
        part.unlink()
        done += 1
    return done


def block_file(folder: Path, i: int, block: list) -> Path:
    return folder / "blocks" / f"{i:06d}-{len(block)}.jsonl"


def write_selected(folder: Path) -> None:
    """selected.jsonl: one record per question that kept any path."""
    chosen = (r for r in read_jsonl(folder / "paths.jsonl", PATH) if r["verdict"] == "selected")
    write_atomic(folder / "selected.jsonl", map(to_line, chosen))


def refilter(run: Run, stored: dict) -> None:
    """New verdicts for the stored samples, question by question; no sampling."""
    folder, rules = run.out, run.rules
    if not (folder / "paths.jsonl").exists():
        raise SertError(f"{folder} holds no samples; run without --refilter first")
    of_rules = {*asdict(rules), "early_reject", "refilter"}
    fixed = run.settings.keys() - of_rules
    if differ := sorted(k for k in fixed if stored.get(k) != run.settings[k]):
        shown = "; ".join(f"{k}: {stored.get(k)} there, {run.settings[k]} now" for k in differ)
        raise SertError(f"{folder} was sampled otherwise ({shown}); --refilter changes rules only")
    if not set(stored["early_reject"]) <= set(rules.patterns or ()):
        raise SertError(
            f"{folder} was sampled with early rejection of {','.join(stored['early_reject'])}: "
            "looser --patterns need new samples (--no-early-reject, another --out-dir)"
        )
    single = [[q] for q in run.questions]  # the last block may be short: --limit
    whole_blocks(folder / "paths.jsonl", single, run.per_question)  # cuts a torn question off

    by_id = {q.id: q for q in run.questions}

    def lines():
        group: list[dict] = []
        for record in read_jsonl(folder / "paths.jsonl", PATH):
            if group and record["id"] != group[0]["id"]:
                yield from map(to_line, apply_rules(group, by_id, run.tokenizer, rules))
                group = []
            group.append(record)
        yield from map(to_line, apply_rules(group, by_id, run.tokenizer, rules))

    def write_settings(**more) -> None:
        settings = {**stored, **asdict(rules), **more}
        write_atomic(folder / "settings.json", json.dumps(settings, indent=1) + "\n")

    write_settings(refilter="unfinished")  # a kill from here on is noticed by the next command
    for waiting in (folder / "blocks").glob("*"):  # judged by the old rules
        waiting.unlink()
    write_atomic(folder / "paths.jsonl", lines())
    stored.pop("refilter", None)
    write_settings()


# --- what the user sees ---------------------------------------------------------------------------


def print_run(run: Run, n: int) -> None:
    """What is about to happen, with everything that was resolved."""
    m, rules = run.settings, run.rules
    print(describe(run.questions, m["split"]))
    print(
        f"model {m['model']} ({run.model.n_params() / 1e6:.1f}M parameters), {m['device']}, "
        f"{m['dtype']}, {m['threads']} thread(s); {n:,} questions x {run.per_question} paths, at "
        f"most {run.s.max_new_tokens} tokens each"
    )
    print(
        f"rules: drop {', '.join(rules.patterns or ('no pattern',))}; at least {rules.min_tokens} "
        f"tokens; rep-2 at most {rules.max_rep2}; perplexity at least {rules.min_perplexity}; "
        f"early rejection {'on' if m['early_reject'] else 'off'}"
    )


def print_plan(run: Run, question, prompt_tokens: int, n: int, n_blocks: int) -> None:
    """--dry-run: a prompt, and how much there is to do at most."""
    print(f"\nprompt of question {printable(question.id)} ({prompt_tokens} tokens):")
    print(printable_lines(question_prompt(question, run.suffix)))
    most = n * run.per_question * run.s.max_new_tokens
    size = run.settings["block_questions"]
    print(f"\nplan: {n_blocks} blocks of {size} questions, at most {most:,} tokens, to {run.out}")


def print_summary(run: Run) -> None:
    """The funnel, three kept and three rejected paths, and what to do next."""
    folder, rules = run.out, run.rules
    print_funnel(filters.count_verdicts(read_jsonl(folder / "paths.jsonl", PATH)), rules)
    shown = {"selected": [], "other": []}
    for r in read_jsonl(folder / "paths.jsonl"):
        kind = "selected" if r["verdict"] == "selected" else "other"
        seen = {x["verdict"] for x in shown["other"]}
        if len(shown[kind]) < 3 and (kind == "selected" or r["verdict"] not in seen | {"kept"}):
            shown[kind].append(r)
    for title, some in (("selected", shown["selected"]), ("rejected", shown["other"])):
        print(f"\n{title}:")
        for r in some:
            print(f"  Q: {printable(r['question'])[:200]}")
            text = printable(r["text"])[:300] or "(empty)"
            print(f"     {text}")
            p = r["perplexity"]
            facts = "no tokens" if p is None else f"perplexity {p:.2f}, rep-2 {r['rep2']:.2f}"
            print(f"     -> {r['verdict']} ({facts}, branch {r['branch']})")
    print(f"\nwrote {folder / 'paths.jsonl'} and {folder / 'selected.jsonl'}")
    if run.settings["split"] == "train" and not run.s.raw:
        task = "" if run.settings["task"] == tasks.DEFAULT else f" --task {run.settings['task']}"
        print(f"next: python train.py{task} --model {run.name} --paths {folder / 'selected.jsonl'}")


def print_funnel(c: filters.Counts, rules: FilterSettings) -> None:
    """How many paths each rule saw and dropped."""
    limits = {
        "pattern": ", ".join(rules.patterns or ()) or "off",
        "length": f"at least {rules.min_tokens} tokens",
        "repetition": f"rep-2 at most {rules.max_rep2}",
        "perplexity": f"at least {rules.min_perplexity}",
    }
    print(f"\n{'rule':<22}{'saw':>9}{'dropped':>9}{'share':>8}   limit")
    for rule in filters.RULES:
        saw, dropped = c.seen[rule], c.dropped[rule]
        print(f"{rule:<22}{saw:>9,}{dropped:>9,}{dropped / max(saw, 1):>8.1%}   {limits[rule]}")
        for kind in patterns.PATTERN_KINDS if rule == "pattern" else ():
            print(f"  {kind:<20}{'':>9}{c.dropped[f'pattern:{kind}']:>9,}")
    print(
        f"{c.passed:,} of {c.paths:,} paths passed; {c.selected:,} of {c.questions:,} questions have "
        f"a selected path, {c.without_path:,} have none"
    )


def print_prompt_samples(args, model, tokenizer, s: SampleSettings) -> None:
    """Plain sampling from any text."""
    s = replace(s, raw=True, branches=1, max_new_tokens=given(args.max_new_tokens, 128))
    prompt = tokenizer.encode(args.prompt)
    for row in sample_block(model, tokenizer, [prompt], ["the prompt"], s):
        lp = sum(row.logprobs) / max(1, len(row.logprobs))
        text = printable_lines(tokenizer.decode(row.token_ids))
        print(f"--- sample {row.sample}: {len(row.token_ids)} tokens, mean log-prob {lp:.2f}")
        print(args.prompt + text)


def check_known_outputs(model, tokenizer) -> None:
    """Compare next-token log-probs of gpt2 124M with known ones of the real weights."""
    known = json.loads(
        (Path(tasks.__file__).parent / "report" / "gpt2_known_outputs.json").read_text()
    )
    errors = []
    for row in known["prompts"]:
        ids = tokenizer.encode(row["prompt"])
        if ids != row["token_ids"]:
            raise SertError(f"token ids of {row['prompt']!r} differ; is this gpt2's tokenizer?")
        with torch.inference_mode():
            lp = model.logits(model(torch.tensor([ids], device=model.wte.weight.device))[0, -1])
        lp = lp.log_softmax(-1).cpu()
        off = (lp[row["ids"]] - torch.tensor(row["logprobs"])).abs()
        errors.append(error := off.max().item())  # NaN stays NaN, unlike in Python's max
        best = lp.topk(len(row["ids"])).indices.tolist()
        same = sum(a == b for a, b in zip(best, row["ids"]))
        print(
            f"{row['prompt'][:50]:50}  {same}/{len(best)} of the top in place, off by {error:.4f}"
        )
    if not all(error < 0.05 for error in errors):
        raise SertError(
            f"log-probs are off by up to {torch.tensor(errors).max():.3f} (limit 0.05): these are not gpt2's 124M "
            "weights (use --model gpt2 --dtype fp32)"
        )
    print("the weights are gpt2's: all log-probs within 0.05 of the known ones")


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    if args.prompt is not None or args.check:
        return without_task(args)
    run = prepare(args)
    questions = run.questions[: args.limit]
    prompts = [run.tokenizer.encode(question_prompt(q, run.suffix)) for q in questions]
    names = [f"question {q.id}" for q in questions]
    check_lengths(prompts, names, run.model, run.s.max_new_tokens)
    size = run.settings["block_questions"]
    blocks = [questions[i : i + size] for i in range(0, len(questions), size)]
    if RANK == 0:
        print_run(run, len(questions))
    if args.dry_run:
        return print_plan(run, questions[0], len(prompts[0]), len(questions), len(blocks))
    with lock_folder(run.out, f".lock-{RANK}", shared=WORLD > 1):
        if args.refilter:
            if RANK == 0:
                refilter(run, stored_settings(run.out))
        else:
            fix = "choose another --out-dir, or --refilter if only thresholds of rules differ"
            check_settings(run.out / "settings.json", run.settings, fix)
            sample_blocks(run, blocks)
        if RANK == 0:
            write_selected(run.out)
            print_summary(run)
            if args.html:
                runs = [Path(args.html_before)] if args.html_before else []
                n = page.write_page(
                    [*runs, run.out], args.html, run.tokenizer, limit=args.html_questions
                )
                print(f"wrote {args.html} ({n:,} questions); open it in a browser")
    return None


def prepare(args) -> Run:
    """Read questions and model, resolve what was left to us, write down what decides the bytes."""
    s, rules = sample_settings(args), filter_settings(args)
    for flag in ("limit", "block_questions", "html_questions"):
        if given(getattr(args, flag), 1) < 1:
            raise SertError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise SertError(f"--html {args.html}: its folder does not exist; make it first")
    if args.html_before and not args.html:
        raise SertError("--html-before needs --html")
    name = args.model or tasks.get(args.task).student
    folder = find_model(name)
    tokenizer, model, label = load_tokenizer(folder), load_model(folder), model_label(name, folder)
    questions = tasks.load(args.task, args.split, args.data_dir)
    sert = read_sert(folder)
    suffix = sert.get("prompt_suffix", "")
    kind = f"{'paths-raw' if s.raw else 'paths'}-{args.split}"
    out = Path(f"out/{args.task}/{label}/{kind}/seed{s.seed}")
    if sert.get("parents") and folder.name == "last":  # a trained student: in its run's folder,
        out = folder.parent / kind  # where the figures look for it
    out = Path(args.out_dir or out)
    stored = stored_settings(out)
    if args.refilter:  # nothing is computed: another machine or version will do
        if not stored:
            raise SertError(f"{out} holds no samples; run without --refilter first")
        device, machine = torch.device("cpu"), {k: stored.get(k) for k in MACHINE}
    else:
        device, machine = resolve_machine(
            args.device, args.dtype, files.stored_settings(out / "settings.json"), model.n_params()
        )
    rows, size = room(device, model, s) if device.type == "cuda" else (s.rows, BLOCK)
    s = replace(s, rows=given(args.rows, stored.get("rows", rows)))
    early = given(args.early_reject, tasks.get(args.task).preset["early_reject"])
    early = [k for k in rules.patterns or () if k in patterns.EARLY_KINDS] if early else []
    settings = {
        "task": args.task,
        "split": args.split,
        "data": data_hash(questions),
        "model": label,
        "weights": weights_hash(folder),
        "prompt_suffix": suffix,
        **asdict(s),
        "block_questions": given(args.block_questions, stored.get("block_questions", size)),
        "early_reject": stored.get("early_reject") if args.refilter else early,
        **machine,
        **asdict(rules),
    }
    model.cast_(torch.bfloat16 if machine["dtype"] == "bf16" else torch.float32).to(device)
    return Run(out, name, model, tokenizer, questions, suffix, s, rules, settings, {})


def room(device: torch.device, model: GPT2, s: SampleSettings) -> tuple[int, int]:
    """Live rows (a multiple of 25, 2,000 at most) for half of a GPU's free memory, and questions in
    a block: four times as many as are live, so that few rows idle at a block's end."""
    c = model.config
    own = 4 * 2 * c.n_layer * c.n_embd * (s.max_new_tokens + 32)  # keys and values, fp32 at most
    logits = 3 * 4 * c.vocab_size
    free = torch.cuda.mem_get_info(device)[0] - 2 * 4 * model.n_params()
    rows = min(2000, max(25, int(free / 2 / (own + logits)) // 25 * 25))
    return rows, max(BLOCK, 4 * rows // (s.branches * s.samples))


def stored_settings(out: Path) -> dict:
    """What an earlier run of this folder wrote down; {} if there was none."""
    path = out / "settings.json"
    stored = read_json(path) if path.exists() else {}
    if stored and not fits(stored, STORED):
        raise SertError(f"{path} is damaged, or not of a sampling run; choose another --out-dir")
    return stored


def without_task(args) -> None:
    """--prompt and --check: the model alone."""
    folder = find_model(args.model or ("gpt2" if args.check else tasks.get(args.task).student))
    tokenizer, device = load_tokenizer(folder), pick_device(args.device)
    model = load_model(folder, device)
    pick_threads(model.n_params())
    if args.check:  # in fp32, where right weights are far inside the limit
        return check_known_outputs(model, tokenizer)
    model.cast_(pick_dtype(args.dtype, device, model.n_params()))
    return print_prompt_samples(args, model, tokenizer, sample_settings(args))


def sample_blocks(run: Run, blocks: list[list]) -> None:
    """Compute the blocks that are missing (every WORLD-th one of them) and, on rank 0, put all of
    them into paths.jsonl in order. A finished block is never computed again."""
    out = run.out
    (out / "blocks").mkdir(exist_ok=True)
    done = whole_blocks(out / "paths.jsonl", blocks, run.per_question)
    todo = [i for i in range(done, len(blocks)) if i % WORLD == RANK]
    todo = [i for i in todo if not block_file(out, i, blocks[i]).exists()]
    if RANK == 0 and done < len(blocks):
        (out / "selected.jsonl").unlink(missing_ok=True)  # train.py must not take a part for all
    if RANK == 0 and done:
        print(f"{done} of {len(blocks)} blocks are there already; going on behind them")
    tokens = kept = 0
    start = time.perf_counter()
    bar = tqdm(total=sum(len(blocks[i]) for i in todo), unit="question", disable=RANK > 0)

    def progress(n: int) -> None:
        nonlocal tokens
        tokens += n
        rate = tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s, {kept} paths kept", refresh=False)
        bar.update(0)

    for i in todo:
        records = block_records(run, blocks[i], progress)
        kept += sum(r["verdict"] in ("selected", "kept") for r in records)
        write_atomic(block_file(out, i, blocks[i]), map(to_line, records))
        if RANK == 0:
            done = merge_blocks(out, blocks, done)
        bar.update(len(blocks[i]))
    bar.close()
    if RANK == 0 and done < len(blocks) and WORLD > 1:
        print("waiting for the blocks of the other processes")
    while RANK == 0 and done < len(blocks):
        time.sleep(0.02)
        done = merge_blocks(out, blocks, done)
    for i in range(done if RANK == 0 else 0):  # made twice around a restart
        block_file(out, i, blocks[i]).unlink(missing_ok=True)
    if RANK == 0 and tokens:
        seconds = time.perf_counter() - start
        append_durable(
            out / "timings.jsonl",
            to_line({"processes": WORLD, "tokens": tokens, "seconds": round(seconds, 2)}),
        )


if __name__ == "__main__":
    run_script(main, parse_args())
