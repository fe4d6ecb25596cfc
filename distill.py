"""Stage 3 of SERT: distil a teacher's zero-shot chain of thought into the student.

[SERT §II-C] (a) collect a rationale per question with `Question: {q}\\nAnswer: Let's think step by
step.`, (b) train on `.. step by step. {R} So the answer is {a}.`. From a SERT checkpoint that is
SERT+RD, from the raw student RD. The paper's teacher, text-davinci-002, is gone: the teacher is any
OpenAI-compatible endpoint, a file of existing rationales, or, in the micro-world, its generator.

    python distill.py                                    # micro-world, offline
    python distill.py --task strategy_qa --teacher-file davinci   # the paper's teacher, public log
    OPENAI_API_KEY=.. python distill.py --task commonsense_qa --teacher-model NAME --dry-run
    python distill.py --task strategy_qa --teacher-model llama3 --base-url http://localhost:11434/v1
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from sert_min import prompts, tasks
from sert_min.io import parallel
from sert_min.io.endpoint import (
    Ask,
    Collection,
    Endpoint,
    Retry,
    check_flags,
    check_url,
    collect,
    missing,
    read_reply,
    stored_replies,
)
from sert_min.io.errors import SertError, printable, run_script
from sert_min.io.files import lock_folder, read_jsonl, to_line, write_atomic
from sert_min.io.hub import find_model, model_label, read_sert
from sert_min.models import read_config
from sert_min.questions import describe
from sert_min.rationales import rationale_records, teacher_answer
from sert_min.teacher_files import PUBLIC, Output, read_teacher_file
from sert_min.tokenizer import load_tokenizer
from train import add_training_flags, train_student

ASK_ANSWER = "Therefore, the answer is"  # second request of --two-step, as in zero-shot CoT


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("teacher")
    g.add_argument(
        "--teacher-file",
        help="existing rationales instead of a model's: a public file by name "
        f"({', '.join(PUBLIC)}), a rationales.jsonl of ours, a zero_shot_cot .log, a folder of "
        "distilling-step-by-step's train_CoT_N.json, or .jsonl rows of your own with question, "
        'rationale, teacher_completion ("(B)."; null: the rationale states it), and maybe id and '
        'finish ("stop": the rationale is whole; else a last half sentence is cut off)',
    )
    g.add_argument("--teacher-model", help="model name at the endpoint; there is no default")
    g.add_argument(
        "--base-url",
        help="OpenAI-compatible endpoint, e.g. "
        "http://localhost:8000/v1; default: OPENAI_BASE_URL, else OpenAI's",
    )
    g.add_argument("--completions", action="store_true", help="the older /completions interface")
    g.add_argument("--teacher-max-tokens", type=int, default=512)
    g.add_argument("--teacher-temperature", type=float, help="sent only if given")
    g.add_argument("--teacher-suffix", default="", help="added to the prompt, e.g. to ask for a "
                   "closing 'So the answer is ..'")  # fmt: skip
    g.add_argument("--token-parameter", choices=("auto", "max_tokens", "max_completion_tokens"),
                   default="auto")  # fmt: skip
    g.add_argument("--two-step", action="store_true", help="ask for the answer in a second request")
    g.add_argument("--concurrency", type=int, default=8)
    g.add_argument("--timeout", type=float, default=120, help="seconds without an answer")
    g.add_argument(
        "--deadline", type=float, default=900, help="seconds per request, retries included"
    )
    g.add_argument("--insecure", action="store_true", help="send the key over http:// as well")
    g = p.add_argument_group("cost")
    g.add_argument("--max-requests", type=int, help="requests sent by this run, retries included")
    g.add_argument("--max-cost", type=float, help="USD, all runs of this folder together")
    g.add_argument("--price-in", type=float, help="USD per million prompt tokens")
    g.add_argument("--price-out", type=float, help="USD per million completion tokens")
    g.add_argument("--dry-run", action="store_true", help="print a prompt and the plan, then stop")
    g.add_argument("--export-batch", help="write the missing requests as an OpenAI batch file")
    g.add_argument("--import-batch", help="take replies from a batch output file")
    g = p.add_argument_group("what is learnt")
    g.add_argument("--collect-only", action="store_true", help="collect and clean, do not train")
    g.add_argument("--keep", choices=("right", "all"), default="right",
                   help="rationales whose own answer is right, or all (default %(default)s)")  # fmt: skip
    add_training_flags(p)
    return p.parse_args(argv)


# --- the student ----------------------------------------------------------------------------------


def pick_student(args) -> tuple[str, str]:
    """(model, method): the SERT checkpoint of this task and seed if there is one, else the raw
    student."""
    name = args.model or tasks.get(args.task).student
    if args.model is None:
        label = model_label(name, find_model(name))
        sert = Path(f"out/{args.task}/{label}/sert/seed{args.seed}")
        if (sert / "last" / "config.json").exists():
            print(f"starting from the SERT checkpoint {sert} (SERT+RD); --model {name} gives RD")
            return str(sert), "sert-rd"
        print(f"no SERT checkpoint at {sert}: starting from the raw student {name} (RD)")
    method = read_sert(find_model(name)).get("method")
    if method in ("finetune", "rd", "sert-rd") and not args.out_dir:
        raise SertError(
            f"--model {name} is a student of {method} already: RD starts from a raw student or from "
            "SERT; choose one of these, or give --out-dir to go on from this one anyway"
        )
    return name, "sert-rd" if method == "sert" else "rd"


# --- collecting -----------------------------------------------------------------------------------


def endpoint(args) -> Endpoint:
    check_flags(args, "teacher_max_tokens", ("teacher_temperature",))
    e = Endpoint(
        model=args.teacher_model,
        base_url=args.base_url,
        max_tokens=args.teacher_max_tokens,
        temperature=args.teacher_temperature,
        token_parameter=args.token_parameter,
        completions=args.completions,
        concurrency=args.concurrency,
        timeout=args.timeout,
        deadline=args.deadline,
        price_in=args.price_in,
        price_out=args.price_out,
        insecure=args.insecure,
    )
    check_url(e)
    return e


def first_ask(q, args) -> Ask:
    text = prompts.question_prompt(q, prompts.COT_SUFFIX) + args.teacher_suffix
    return Ask(q.task, q.id, 0, ({"role": "user", "content": text},))


def second_ask(first: Ask, record: dict, args) -> Ask | None:
    """With --two-step, the request that a rationale leads to: the answer to it. An empty rationale
    and an answer lead to none."""
    said, last = record["text"].strip(), first.messages[-1]["content"]
    if not args.two_step or not said or last.endswith(ASK_ANSWER):
        return None
    if args.completions:
        messages = ({"role": "user", "content": f"{last} {said}\n{ASK_ANSWER}"},)
    else:
        answer = {"role": "user", "content": ASK_ANSWER}
        messages = (*first.messages, {"role": "assistant", "content": said}, answer)
    return Ask(first.task, first.id, first.sample, messages)


def outputs_of(args, questions: list, collection: Collection, e: Endpoint) -> dict[str, Output]:
    """What the teacher has said so far, by question id; with --two-step only whole pairs."""
    outputs = {}
    for q in questions:
        ask = first_ask(q, args)
        reply = collection.replies.get(ask.key(e))
        if reply is None:
            continue
        second, answer = second_ask(ask, reply, args), None
        if second:
            answer = collection.replies.get(second.key(e))
            if answer is None:
                continue
        completion = answer["text"] if answer else None
        outputs[q.id] = Output(reply["text"], completion, reply["finish"], e.model)
    return outputs


def check_readable(args, questions: list, outputs: dict[str, Output]) -> None:
    """Stop early if the teacher's answers can't be read: every further one costs."""
    if args.keep == "all":
        return
    told = [(q, outputs[q.id]) for q in questions if q.id in outputs]
    n = sum(teacher_answer(output, q) is not None for q, output in told)
    if n < len(told) / 2:
        cut = sum(output.finish == "length" for _, output in told)
        raise SertError(
            f"only {n} of the first {len(told)} replies state an answer that can be read ({cut} "
            "were cut off); they are kept. Ask for it with --teacher-suffix ' End with: So the "
            "answer is ..', or use --two-step, or raise --teacher-max-tokens; --keep all goes on"
        )


def missing_asks(args, questions: list, collection: Collection, e: Endpoint) -> list[Ask]:
    """What is to ask now: first requests without a reply, and second ones whose first has one."""
    asks = [first_ask(q, args) for q in questions]
    return missing(collection, asks, e, lambda ask, record: second_ask(ask, record, args))


def ask_teacher(args, questions: list, folder: Path) -> tuple[dict[str, Output], list[str]]:
    """Ask the teacher for what is missing; (outputs by id, why others are missing)."""
    e = endpoint(args)
    collection = Collection(folder / "responses.jsonl").load()
    if args.import_batch:
        asks = missing_asks(args, questions, collection, e)
        import_batch(Path(args.import_batch), asks, e, collection)
    asks = missing_asks(args, questions, collection, e)
    if asks:
        print(f"{len(questions) - len(asks):,} questions have replies, {len(asks):,} are to ask")
    checked = False

    def check() -> None:
        nonlocal checked
        if not checked and len(collection.replies) >= 20:
            outputs = outputs_of(args, questions, collection, e)
            if checked := len(outputs) >= 20:
                check_readable(args, questions, outputs)

    try:
        with tqdm(total=len(asks), unit="reply", disable=not asks) as bar:

            def progress(n: int, note: str) -> None:
                bar.set_postfix_str(note, refresh=bool(note))
                bar.update(n)

            failures = collect(
                collection,
                asks,
                e,
                args.max_requests,
                args.max_cost,
                check,
                progress,
                follow_up=lambda ask, record: second_ask(ask, record, args),
            )
    finally:
        print(f"teacher {collection.summary(e)}")
    return outputs_of(args, questions, collection, e), failures


def print_plan(args, questions: list, folder: Path) -> None:
    """What a collection would ask and cost at most. Sends and writes nothing."""
    e = endpoint(args)
    there = stored_replies(folder / "responses.jsonl")
    firsts = [first_ask(q, args) for q in questions]
    asks = [a for a in firsts if a.key(e) not in there]
    print(f"\nprompt of question {printable(questions[0].id)}, to {e.url()}:")
    for line in first_ask(questions[0], args).messages[0]["content"].split("\n"):
        print(f"  {printable(line)}")
    bounds = [a.most_tokens(e) for a in asks]
    if args.two_step:  # the second request sends the first one and its reply again
        bounds += [(n_in + n_out + len(ASK_ANSWER) + 8, n_out) for n_in, n_out in bounds]
        replied = [(a, there[a.key(e)]) for a in firsts if a.key(e) in there]
        seconds = [second_ask(a, record, args) for a, record in replied]
        bounds += [a.most_tokens(e) for a in seconds if a and a.key(e) not in there]
    n_in, n_out = (sum(b[i] for b in bounds) for i in (0, 1))
    print(
        f"\nplan: {len(bounds):,} requests ({len(questions) - len(asks):,} first replies are "
        f"there), at most {n_in:,} tokens in (a token per byte; English has about 4 bytes) and at "
        f"most {n_out:,} tokens out"
    )
    if (usd := e.usd(n_in, n_out)) is not None:
        print(f"at most {usd:.2f} USD; --max-cost is a hard cap")


# --- OpenAI's Batch API ---------------------------------------------------------------------------


def export_batch(args, questions: list, folder: Path) -> None:
    """The missing requests as a batch file; custom_id is the key of the reply."""
    e, path = endpoint(args), Path(args.export_batch)
    collection = Collection(folder / "responses.jsonl").load()
    url = "/v1/completions" if e.completions else "/v1/chat/completions"
    lines = []
    for a in missing_asks(args, questions, collection, e):
        request = {"method": "POST", "url": url, "body": e.request(list(a.messages))}
        lines.append(to_line({"custom_id": a.key(e), **request}))
    write_atomic(path, lines)
    print(
        f"wrote {len(lines):,} requests to {path}; upload it, then repeat this command with "
        "--import-batch FILE (the batch's output) instead of --export-batch"
    )


def import_batch(path: Path, asks: list[Ask], e: Endpoint, collection: Collection) -> None:
    """Replies of a batch output file, joined by custom_id and read by the rules of live ones;
    lines without a usable reply are counted."""
    by_key = {a.key(e): a for a in asks}
    taken = there = unusable = 0
    for row in read_jsonl(path):
        key = str(row.get("custom_id"))
        if key in collection.replies:
            there += 1
            continue
        try:
            reply = read_reply(row["response"]["body"], e, row["response"].get("request_id"))
            collection.add(key, by_key[key], {**reply, "attempts": 1})
            taken += 1
        except (KeyError, TypeError, AttributeError, Retry):
            unusable += 1
    print(
        f"{path}: {taken:,} replies taken, {there:,} were there, {unusable:,} lines failed or "
        "belong to no missing request"
    )


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    parallel.start()
    if parallel.RANK > 0 and (args.dry_run or args.export_batch or args.collect_only):
        return None  # process 0 asks the teacher alone; the others only train
    questions = tasks.load(args.task, "train", args.data_dir)
    print(describe(questions, "train"))
    if args.limit is not None:
        if args.limit < 1:
            raise SertError("--limit must be at least 1")
        questions, args.limit = questions[: args.limit], None
    check_teacher_flags(args)
    folder = None
    if args.teacher_model:
        # Bought replies are shared by all students of a task unless --out-dir is given.
        name = re.sub(r"[^\w.-]", "-", args.teacher_model)[:80]
        folder = Path(args.out_dir or f"out/{args.task}/teacher-{name}")
        if args.dry_run:
            return print_plan(args, questions, folder)
        if args.export_batch:
            with lock_folder(folder, ".lock-responses"):
                return export_batch(args, questions, folder)
    name, method = pick_student(args)
    student = find_model(name)
    out = Path(
        args.out_dir or f"out/{args.task}/{model_label(name, student)}/{method}/seed{args.seed}"
    )

    # 1, 2. Collect, clean and choose.
    if parallel.RANK == 0:
        collect_records(args, questions, folder, student, out)
    if args.dry_run or args.collect_only:
        return None
    parallel.largest(0)  # the others wait for it
    records = list(read_jsonl(out / "rationales.jsonl"))

    # 3. Train.
    by_id = {q.id: q for q in questions}
    kept = [(by_id[r["id"]], r["rationale"]) for r in records if r["kept"]]
    if not kept:
        raise SertError(f"no rationale was kept; look at {out}/rationales.jsonl, or use --keep all")
    pairs = [(q, *prompts.rd_pair(q, text)) for q, text in kept]
    source = args.teacher_file or args.teacher_model or args.task
    args.out_dir = str(out)
    train_student(args, method, name, pairs, prompts.COT_SUFFIX, source)
    return None


def collect_records(args, questions: list, folder: Path | None, student: Path, out: Path) -> None:
    """The teacher's outputs, cleaned and chosen, into rationales.jsonl; `folder` keeps replies."""
    failures: list[str] = []
    if args.teacher_model:
        with lock_folder(folder, ".lock-responses"):
            outputs, failures = ask_teacher(args, questions, folder)
    elif args.teacher_file:
        outputs, left = read_teacher_file(args.teacher_file, questions)
        for what, n in left.items():
            print(f"{args.teacher_file}: {n:,} outputs for {what} are left out")
    else:
        outputs = program_outputs(questions, tasks.get(args.task).teacher)

    records, counts = rationale_records(questions, outputs, args.keep, fits_context(student))
    print(f"{len(records):,} rationales for {len(questions):,} questions:")
    for what, n in counts.items():
        print(f"  {what:<34}{n:>8,}")
    if args.dry_run:
        return
    save_records(out, records)
    if failures:
        end_with_missing_rows(failures, folder)
    if args.collect_only:
        print(f"wrote {out}/rationales.jsonl")


def save_records(out: Path, records: list[dict]) -> None:
    """Write rationales.jsonl; that of a checkpoint beside it stays what it was trained on."""
    path, text = out / "rationales.jsonl", "".join(map(to_line, records))
    if (out / "settings.json").exists() and path.exists() and path.read_text() != text:
        raise SertError(f"{out} holds a student of other rationales; choose another --out-dir")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def check_teacher_flags(args) -> None:
    if args.teacher_file and args.teacher_model:
        raise SertError("give --teacher-file or --teacher-model, not both")
    if not args.teacher_file and not args.teacher_model and not tasks.get(args.task).teacher:
        raise SertError(
            f"--task {args.task} needs a teacher: --teacher-model NAME (any OpenAI-compatible "
            "endpoint, see --base-url) or --teacher-file FILE"
        )
    if not args.teacher_model:
        asked = ("base_url", "export_batch", "import_batch", "max_requests", "max_cost", "two_step")
        for flag in asked:
            if getattr(args, flag):
                raise SertError(f"--{flag.replace('_', '-')} needs --teacher-model")


def program_outputs(questions: list, teacher: Callable) -> dict[str, Output]:
    """What a task's own teacher writes (tasks.Task.teacher); it is always right."""
    return {q.id: Output(teacher(q), q.write() + ".", "stop", q.task) for q in questions}


def fits_context(student: Path) -> Callable:
    """fits(question, rationale): does its training text fit the student's context?"""
    tokenizer, context = load_tokenizer(student), read_config(student).n_positions

    def fits(q, text: str) -> bool:
        prompt, completion = prompts.rd_pair(q, text)
        return len(tokenizer.encode(prompt)) + len(tokenizer.encode(completion)) <= context

    return fits


def end_with_missing_rows(failures: list[str], folder: Path) -> None:
    """Say what is missing and how to go on; exit status 2."""
    for why in failures[:5]:
        print(f"  missing: {printable(why)}", file=sys.stderr)
    spent = any("--max-cost" in why for why in failures)  # of all runs together
    fix = "Raise --max-cost and repeat" if spent else "Repeat"
    print(
        f"error: {len(failures):,} rationales are missing; replies so far are in {folder}. {fix} "
        "the command to ask for the rest",
        file=sys.stderr,
    )
    raise SystemExit(2)


if __name__ == "__main__":
    run_script(main, parse_args())
