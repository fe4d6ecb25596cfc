"""Stage 3 of SERT: distil a teacher's zero-shot chain of thought into the student.

[SERT §II-C] (a) Collect a rationale per question with `Question: {q}\\nAnswer: Let's think step by
step.` (b) Train on `.. step by step. {R} So the answer is {a}.` Starting from a SERT checkpoint
gives SERT+RD, from the raw student RD. The paper's teacher, text-davinci-002, was shut down: ours is
any OpenAI-compatible endpoint, a file of rationales, or, in the micro-world, a program.

    python distill.py                                    # micro-world, offline
    python distill.py --task strategy_qa --teacher-file davinci   # the paper's teacher, public log
    OPENAI_API_KEY=.. python distill.py --task commonsense_qa --teacher-model NAME --dry-run
    python distill.py --task strategy_qa --teacher-model llama3 --base-url http://localhost:11434/v1
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sert_min import prompts, tasks
from sert_min.io import endpoint, parallel
from sert_min.io.endpoint import Ask, Endpoint
from sert_min.io.errors import need, printable, printable_lines, run_script
from sert_min.io.files import clean_name, read_jsonl, to_line, write_atomic
from sert_min.models import read_config
from sert_min.questions import Question, describe
from sert_min.rationales import Output, rationale_records, teacher_answer
from sert_min.report import console
from sert_min.script import Student, add_flags, open_student, parse, parser
from sert_min.teacher_files import read_teacher_file
from sert_min.tokenizer import load_tokenizer
from train import add_training_flags, options, prepare, train_student

ASK_ANSWER = "Therefore, the answer is"  # the second request of --two-step, as in zero-shot CoT


def parse_args(argv=None) -> argparse.Namespace:
    p = parser(__doc__)
    # fmt: off
    g = p.add_argument_group("teacher")
    g.add_argument("--teacher-file", help="existing rationales: davinci (a public log), a .log of "
                   "zero_shot_cot, distilling-step-by-step's folder, or .jsonl (docs/usage.md)")
    endpoint.add_flags(g, "teacher")
    g.add_argument("--teacher-suffix", default="", help="added to the prompt, e.g. to ask for an answer")
    g.add_argument("--two-step", action="store_true", help="ask for the answer in a second request")
    g = p.add_argument_group("what is learnt")
    g.add_argument("--keep", choices=("right", "all"), default="right", help="by their answers")
    g.add_argument("--collect-only", action="store_true", help="collect and clean, do not train")
    # fmt: on
    add_flags(g, "--dry-run")
    add_training_flags(p)
    return parse(p, argv)


def main(args) -> None:
    parallel.start()
    if parallel.RANK > 0 and (args.dry_run or args.collect_only):
        return None  # process 0 asks the teacher alone; the others only train
    teacher = teacher_from_flags(args)
    questions = tasks.load(args.task, "train", args.data_dir)
    print(describe(questions, "train"))
    questions = questions[: args.limit]
    if teacher and args.dry_run:
        asks = [teacher.ask(q) for q in questions]
        e, prompt = teacher.endpoint, printable_lines(asks[0].messages[0]["content"])
        print(f"\nprompt of question {printable(asks[0].id)}, to {e.url()}:\n{prompt}\n")
        return endpoint.print_plan("plan", teacher.folder, asks, e, teacher.ask_answer)
    student, method = pick_student(args)
    o = options(args, student.label)
    out = Path(o.out_dir or f"out/{o.task}/{student.label}/{method}/seed{o.s.seed}")

    if parallel.RANK == 0:
        # 1. Collect an output of the teacher for each question.
        failures: list[str] = []
        if teacher:
            outputs, failures = ask_teacher(teacher, questions, args.keep)
        elif args.teacher_file:
            outputs, left = read_teacher_file(args.teacher_file, questions)
            console.print_counts(f"outputs in {args.teacher_file} that are left out", left)
        else:
            outputs = program_outputs(questions, tasks.get(o.task).teacher)

        # 2. Clean the outputs and choose those to learn from.
        encode, c = load_tokenizer(student.folder).encode, read_config(student.folder)

        def fits(q: Question, rationale: str) -> bool:
            return sum(len(encode(text)) for text in prompts.rd_pair(q, rationale)) <= c.n_positions

        records, counts = rationale_records(questions, outputs, args.keep, fits)
        title = f"{len(records):,} rationales for {len(questions):,} questions"
        console.print_counts(title, counts)
        if args.dry_run:
            return None
        save_records(out, records)
        endpoint.end_if_missing(failures, "teacher", teacher.folder if teacher else out)
    if args.collect_only:
        return print(f"wrote {out}/rationales.jsonl")
    parallel.largest(0)  # the other processes wait here for the rationales

    # 3. Train on the chosen ones.
    by_id = {q.id: q for q in questions}
    kept = [r for r in read_jsonl(out / "rationales.jsonl") if r["kept"]]
    need(kept, f"no rationale was kept; look at {out}/rationales.jsonl, or use --keep all")
    pairs = [(by_id[r["id"]], *prompts.rd_pair(by_id[r["id"]], r["rationale"])) for r in kept]
    about = {"source": args.teacher_file or args.teacher_model or o.task}
    o = o._replace(out_dir=str(out), limit=None)  # the questions were limited, not the examples
    return train_student(prepare(student, method, pairs, prompts.COT_SUFFIX, about, o))


def pick_student(args) -> tuple[Student, str]:
    """(student, method): without --model the SERT checkpoint of this task and seed if there is one,
    else the task's raw student."""
    name, task = args.model, args.task
    student = open_student(name, task)
    sert = Path(f"out/{task}/{student.label}/sert/seed{args.seed}")
    if name is None and (sert / "last" / "config.json").exists():
        print(f"starting from the SERT checkpoint {sert} (SERT+RD)")
        student = open_student(str(sert), task)
    elif name is None:
        print(f"no SERT checkpoint at {sert}: starting from the raw student {student.name} (RD)")
    before = student.sert.get("method")
    need(
        args.out_dir or before not in ("finetune", "star", "rd", "sert-rd"),
        f"--model {student.name} was trained by {before} already: distillation starts from a raw "
        "student or from SERT; choose one of these, or give --out-dir",
    )
    return student, "sert-rd" if before == "sert" else "rd"


def save_records(out: Path, records: list[dict]) -> None:
    """Write rationales.jsonl. One that a checkpoint beside it was trained on is never changed."""
    path, text = out / "rationales.jsonl", "".join(map(to_line, records))
    same = not (out / "settings.json").exists() or not path.exists() or path.read_text() == text
    need(same, f"{out} holds a student of other rationales; choose another --out-dir")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


# --- teachers -------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """A teacher at an endpoint, and how it is asked."""

    endpoint: Endpoint
    folder: Path  # of its replies
    suffix: str  # added to the prompt
    two_step: bool  # ask for the answer in a second request

    def ask(self, q: Question) -> Ask:
        """The request for a rationale."""
        text = prompts.question_prompt(q, prompts.COT_SUFFIX) + self.suffix
        return Ask(q.task, q.id, 0, ({"role": "user", "content": text},))

    def ask_answer(self, ask: Ask, record: dict) -> Ask | None:
        """With --two-step the request for the answer that follows a rationale, if it is not empty."""
        said, last = record["text"].strip(), ask.messages[-1]["content"]
        if not self.two_step or not said or last.endswith(ASK_ANSWER):
            return None
        answer = {"role": "user", "content": ASK_ANSWER}
        messages = (*ask.messages, {"role": "assistant", "content": said}, answer)
        if self.endpoint.completions:
            messages = ({"role": "user", "content": f"{last} {said}\n{ASK_ANSWER}"},)
        return Ask(ask.task, ask.id, ask.sample, messages)

    def output(self, replies: list[dict]) -> Output:
        """The output that one reply or, with --two-step, two replies make."""
        first, answer = replies[0], replies[1]["text"] if len(replies) > 1 else None
        return Output(first["text"], answer, first.get("finish"), self.endpoint.model)


def teacher_from_flags(args) -> Teacher | None:
    """The teacher that the flags name; None if it is a file or the task's program."""
    file, model = args.teacher_file, args.teacher_model
    need(not (file and model), "give --teacher-file or --teacher-model, not both")
    need(
        file or model or tasks.get(args.task).teacher,
        f"{tasks.flags(args.task)} needs a teacher: --teacher-model NAME (any OpenAI-compatible "
        "endpoint, see --base-url) or --teacher-file FILE",
    )
    if not model:
        for flag in ("base_url", "max_requests", "max_cost", "two_step"):
            need(not getattr(args, flag), f"--{flag.replace('_', '-')} needs --teacher-model")
        return None
    # The replies are shared by all students of a task unless --out-dir is given.
    folder = args.out_dir or f"out/{args.task}/teacher-{clean_name(model)}"
    e = endpoint.from_flags(args, "teacher")
    return Teacher(e, Path(folder), args.teacher_suffix, args.two_step)


def ask_teacher(teacher: Teacher, questions: list[Question], keep: str) -> tuple[dict, list[str]]:
    """Ask for what is missing; (outputs by question id, why others are missing)."""
    asks, by_id = [teacher.ask(q) for q in questions], {q.id: q for q in questions}
    readable = endpoint.Readable(
        lambda ask, replies: teacher_answer(teacher.output(replies), by_id[ask.id]) is not None,
        "state an answer that can be read",
        "Ask for it with --teacher-suffix ' End with: So the answer is ..' or --two-step, or raise "
        "--teacher-max-tokens; --keep all goes on",
    )
    wanted = readable if keep == "right" else None
    e, follow_up = teacher.endpoint, teacher.ask_answer
    collection, failures = endpoint.ask_all(teacher.folder, asks, e, wanted, follow_up)
    walks = ((ask, *collection.walk(ask)) for ask in asks)
    return {ask.id: teacher.output(replies) for ask, replies, now in walks if not now}, failures


def program_outputs(questions: list[Question], teacher: Callable) -> dict[str, Output]:
    """What a task's own teacher writes; its answers are always right."""
    return {q.id: Output(teacher(q), q.write() + ".", "stop", q.task) for q in questions}


if __name__ == "__main__":
    run_script(main, parse_args())
