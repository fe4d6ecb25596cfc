"""Stage 3 of SERT: distil a teacher's zero-shot chain of thought into the student.

[SERT §II-C] (a) collect a rationale per question with `Question: {q}\\nAnswer: Let's think step by
step.`, (b) train on `.. step by step. {R} So the answer is {a}.`. From a SERT checkpoint that is
SERT+RD, from the raw student RD. The paper's teacher, text-davinci-002, is gone: the teacher is any
OpenAI-compatible endpoint, a file of existing rationales, or, in the micro-world, its generator.

    python distill.py                                    # micro-world, offline
    python distill.py --task strategy_qa --teacher-file davinci.jsonl
    OPENAI_API_KEY=.. python distill.py --task commonsense_qa --teacher-model NAME --dry-run
    python distill.py --task strategy_qa --teacher-model llama3 --base-url http://localhost:11434/v1
"""

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from sert_min import prompts, tasks, teacher
from sert_min.gpt2 import find_model, model_label, read_config, read_sert
from sert_min.rationales import Output, rationale_records, read_teacher_file, teacher_answer
from sert_min.runtime import SertError, printable, run_script
from sert_min.store import lock_folder, read_jsonl, to_line, write_atomic
from sert_min.teacher import Ask, Collection, Endpoint
from sert_min.tokenizer import load_tokenizer
from train import add_training_flags, train_student

ASK_ANSWER = "Therefore, the answer is"  # second request of --two-step, as in zero-shot CoT


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    g = p.add_argument_group("teacher")
    g.add_argument(
        "--teacher-file", help="existing rationales (our records, a zero_shot_cot log, ..)"
    )
    g.add_argument("--teacher-model", help="model name at the endpoint; there is no default")
    g.add_argument("--base-url", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    g.add_argument("--completions", action="store_true", help="the older /completions interface")
    g.add_argument("--teacher-max-tokens", type=int, default=512)
    g.add_argument("--teacher-temperature", type=float, help="sent only if given")
    g.add_argument("--teacher-suffix", default="", help="added to the prompt, e.g. to ask for a "
                   "closing 'So the answer is ..'")  # fmt: skip
    g.add_argument("--token-parameter", choices=("auto", "max_tokens", "max_completion_tokens"),
                   default="auto")  # fmt: skip
    g.add_argument("--two-step", action="store_true", help="ask for the answer in a second request")
    g.add_argument("--concurrency", type=int, default=8)
    g.add_argument("--timeout", type=float, default=120, help="seconds per request")
    g.add_argument("--insecure", action="store_true", help="send the key over http:// as well")
    g = p.add_argument_group("cost")
    g.add_argument("--max-requests", type=int, help="of this run")
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
    name = args.model or tasks.default_model(args.task)
    if args.model is None:
        label = model_label(name, find_model(name))
        sert = Path(f"out/{args.task}/{label}/sert/seed{args.seed}")
        if (sert / "last" / "config.json").exists():
            print(f"starting from the SERT checkpoint {sert} (SERT+RD); --model {name} gives RD")
            return str(sert), "sert-rd"
        print(f"no SERT checkpoint at {sert}: starting from the raw student {name} (RD)")
    method = read_sert(find_model(name)).get("method")
    return name, "sert-rd" if method == "sert" else "rd"


# --- collecting -----------------------------------------------------------------------------------


def endpoint(args) -> Endpoint:
    for flag in ("concurrency", "timeout", "teacher_max_tokens"):
        if not getattr(args, flag) > 0:
            raise SertError(f"--{flag.replace('_', '-')} must be above 0")
    return Endpoint(
        model=args.teacher_model,
        base_url=args.base_url,
        max_tokens=args.teacher_max_tokens,
        temperature=args.teacher_temperature,
        token_parameter=args.token_parameter,
        completions=args.completions,
        concurrency=args.concurrency,
        timeout=args.timeout,
        price_in=args.price_in,
        price_out=args.price_out,
        insecure=args.insecure,
    )


def first_ask(q, args) -> Ask:
    text = prompts.question_prompt(q, prompts.COT_SUFFIX) + args.teacher_suffix
    return Ask(q.task, q.id, 0, ({"role": "user", "content": text},))


def second_ask(q, args, rationale: str) -> Ask:
    """The answer to one's own reasoning, in a request of its own."""
    first = first_ask(q, args).messages[0]
    if args.completions:
        whole = f"{first['content']} {rationale.strip()}\n{ASK_ANSWER}"
        return Ask(q.task, q.id, 0, ({"role": "user", "content": whole},))
    said = {"role": "assistant", "content": rationale}
    return Ask(q.task, q.id, 0, (first, said, {"role": "user", "content": ASK_ANSWER}))


def collect_outputs(args, questions: list, folder: Path) -> tuple[dict[str, Output], list[str]]:
    """Ask the teacher for what is missing; (outputs by id, why others are missing)."""
    e = endpoint(args)
    collection = Collection(folder / "responses.jsonl").load()
    asks = [first_ask(q, args) for q in questions]
    if args.import_batch:
        import_batch(Path(args.import_batch), asks, e, collection)
    missing = [a for a in asks if a.key(e) not in collection.replies]
    if args.export_batch:
        export_batch(Path(args.export_batch), missing, e)
        raise SystemExit(0)
    if missing:
        print(f"{len(asks) - len(missing):,} replies are there, {len(missing):,} to ask for")
    by_id = {q.id: q for q in questions}

    def readable(replies: list[dict]) -> None:
        """Stop early if the teacher's answers can't be read: every further one costs."""
        if args.two_step or len(replies) < 20 or len(replies) >= 20 + e.concurrency:
            return
        outputs = [Output(r["text"], None, r["finish"], "") for r in replies[:20]]
        n = sum(teacher_answer(o, by_id[r["id"]]) is not None for o, r in zip(outputs, replies))
        if n < 10:
            raise SertError(
                f"only {n} of the first 20 replies state an answer that can be read; they are "
                "kept. Ask for it with --teacher-suffix ' End with: So the answer is ..', or use "
                "--two-step, or raise --teacher-max-tokens"
            )

    failures = run_asks(collection, asks, e, args, readable, "rationale")
    outputs: dict[str, Output] = {}
    if args.two_step:
        replied = [(q, collection.replies.get(first_ask(q, args).key(e))) for q in questions]
        seconds = {q.id: second_ask(q, args, r["text"]) for q, r in replied if r}
        failures += run_asks(collection, list(seconds.values()), e, args, lambda r: None, "answer")
    for q in questions:
        reply = collection.replies.get(first_ask(q, args).key(e))
        if reply is None:
            continue
        completion = None
        if args.two_step:
            answer = collection.replies.get(seconds[q.id].key(e))
            if answer is None:
                continue
            completion = answer["text"]
        outputs[q.id] = Output(reply["text"], completion, reply["finish"], e.model)
    u, cost = collection.usage, collection.usage.cost(e)
    print(
        f"teacher {e.model}: {u.requests:,} replies, {u.tokens_in:,} tokens in, {u.tokens_out:,} out"
        + (f", {cost:.4f} USD" if cost is not None else "; give --price-in and --price-out for USD")
    )
    return outputs, failures


def run_asks(collection, asks: list, e: Endpoint, args, check, unit: str) -> list[str]:
    missing = sum(a.key(e) not in collection.replies for a in asks)
    with tqdm(total=missing, unit=unit, disable=not missing) as bar:
        return teacher.collect(
            collection, asks, e, args.max_requests, args.max_cost, check, bar.update
        )


def print_plan(args, questions: list, folder: Path) -> None:
    """What a collection would ask and cost at most."""
    e = endpoint(args)
    path = folder / "responses.jsonl"
    replies = Collection(path).load().replies if path.exists() else {}
    asks = [a for a in (first_ask(q, args) for q in questions) if a.key(e) not in replies]
    print(f"\nprompt of question {questions[0].id}, to {e.url()}:")
    print(printable_lines(first_ask(questions[0], args).messages[0]["content"]))
    n = len(asks) * (2 if args.two_step else 1)
    sent = sum(len(m["content"].encode()) for a in asks for m in a.messages) // 4
    print(
        f"\nplan: {n:,} requests ({len(questions) - len(asks):,} replies are there), about "
        f"{sent:,} tokens in, at most {n * args.teacher_max_tokens:,} tokens out"
    )
    if e.price_in is not None and e.price_out is not None:
        most = sum(teacher.request_cost(a, e) for a in asks) * (2 if args.two_step else 1)
        print(f"at most {most:.2f} USD (a token per byte sent, full replies)")


def printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def export_batch(path: Path, asks: list[Ask], e: Endpoint) -> None:
    """The missing requests in OpenAI's Batch API form; custom_id is the key of the reply."""
    url = "/v1/completions" if e.completions else "/v1/chat/completions"
    lines = (
        to_line({"custom_id": a.key(e), "method": "POST", "url": url, "body": e.request(list(a.messages))})
        for a in asks
    )  # fmt: skip
    write_atomic(path, lines)
    print(f"wrote {len(asks):,} requests to {path}; upload it, then --import-batch the output file")


def import_batch(path: Path, asks: list[Ask], e: Endpoint, collection: Collection) -> None:
    """Replies of a batch output file, joined by custom_id; failed or foreign lines are counted."""
    by_key = {a.key(e): a for a in asks}
    taken = skipped = 0
    for row in read_jsonl(path):
        ask = by_key.get(row.get("custom_id"))
        try:
            body = row["response"]["body"]
            choice = body["choices"][0]
            text = choice["text"] if e.completions else choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if ask is None or not isinstance(text, str):
            skipped += 1
            continue
        if row["custom_id"] in collection.replies:
            continue
        usage = body.get("usage") or {}
        collection.add(
            {
                "key": row["custom_id"],
                "task": ask.task,
                "id": ask.id,
                "sample": ask.sample,
                "text": text,
                "finish": choice.get("finish_reason"),
                "usage": {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")},
                "returned_model": body.get("model"),
                "request_id": row.get("id"),
                "attempts": 1,
            }
        )
        taken += 1
    print(f"{path}: {taken:,} replies taken, {skipped:,} lines without a usable reply")


# --- the run --------------------------------------------------------------------------------------


def main(args) -> None:
    questions = tasks.load(args.task, "train", args.data_dir)
    print(tasks.describe(questions, "train"))
    if args.limit is not None:
        questions, args.limit = questions[: max(1, args.limit)], None
    if args.teacher_file and args.teacher_model:
        raise SertError("give --teacher-file or --teacher-model, not both")
    if not args.teacher_file and not args.teacher_model and args.task != "micro":
        raise SertError(
            f"--task {args.task} needs a teacher: --teacher-model NAME (any OpenAI-compatible "
            "endpoint, see --base-url) or --teacher-file FILE"
        )
    name, method = pick_student(args)
    student = find_model(name)
    label = model_label(name, student)
    out = Path(args.out_dir or f"out/{args.task}/{label}/{method}/seed{args.seed}")

    # 1. Collect: bought replies are shared by all students of a task unless --out-dir is given.
    folder, failures = out, []
    if args.teacher_model and not args.out_dir:
        folder = Path(f"out/{args.task}/teacher-" + re.sub(r"[^\w.-]", "-", args.teacher_model))
    if args.dry_run and args.teacher_model:
        return print_plan(args, questions, folder)
    if args.teacher_file:
        outputs = read_teacher_file(Path(args.teacher_file), questions)
    elif args.teacher_model:
        with lock_folder(folder, ".lock-responses"):
            outputs, failures = collect_outputs(args, questions, folder)
    else:
        from sert_min import micro

        outputs = {
            q.id: Output(micro.teacher_rationale(q), prompts.answer_text(q) + ".", "stop", "micro")
            for q in questions
        }

    # 2. Clean and choose.
    tokenizer, context = load_tokenizer(student), read_config(student).n_positions

    def fits(q, text: str) -> bool:
        prompt, completion = prompts.rd_pair(q, text)
        return len(tokenizer.encode(prompt)) + len(tokenizer.encode(completion)) <= context

    records, counts = rationale_records(questions, outputs, args.keep, fits)
    print(f"{len(records):,} rationales for {len(questions):,} questions:")
    for what, n in counts.items():
        print(f"  {what:<34}{n:>8,}")
    if args.dry_run:
        return None
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "rationales.jsonl", map(to_line, records))
    if failures:
        for why in failures[:5]:
            print(f"  missing: {printable(why)}", file=sys.stderr)
        raise SertError(
            f"{len(failures):,} rationales are missing; replies so far are in {folder}. "
            "Repeat the command to ask for the rest"
        )
    if args.collect_only:
        print(f"wrote {out}/rationales.jsonl")
        return None

    # 3. Train.
    by_id = {q.id: q for q in questions}
    pairs = [
        (by_id[r["id"]], *prompts.rd_pair(by_id[r["id"]], r["rationale"]))
        for r in records
        if r["kept"]
    ]
    if not pairs:
        raise SertError("no rationale was kept; look at rationales.jsonl, or use --keep all")
    source = args.teacher_file or args.teacher_model or "micro"
    args.out_dir = str(out)
    train_student(args, method, name, pairs, prompts.COT_SUFFIX, str(source))
    return None


if __name__ == "__main__":
    run_script(main, parse_args())
