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

import sert_min.io.early  # noqa: F401  (first: it makes one line of what fails below)

# isort: split
import argparse
from collections.abc import Callable
from pathlib import Path

from sert_min import prompts, tasks, teachers
from sert_min.finetune import encode_example
from sert_min.io import asking, parallel
from sert_min.io.errors import command, need, printable, printable_lines, run_script
from sert_min.io.files import clean_name, read_jsonl, to_line, write_atomic
from sert_min.models import read_config
from sert_min.questions import Question, describe
from sert_min.rationales import Output, rationale_records
from sert_min.report import console
from sert_min.script import Student, add_flags, check_counts, open_student, parse, parser
from sert_min.teacher_files import read_teacher_file
from sert_min.tokenizer import load_tokenizer
from train import add_training_flags, options, prepare, train_student


def parse_args(argv=None) -> argparse.Namespace:
    p = parser(__doc__)
    # fmt: off
    g = p.add_argument_group("teacher")
    teachers.add_flags(g)
    g = p.add_argument_group("what is learnt")
    g.add_argument("--keep", choices=("right", "all"), default="right", help="by their answers")
    g.add_argument("--per-question", type=int, metavar="M",
                   help="at most M rationales per question")
    g.add_argument("--go-on", action="store_true", help="even if most answers can't be read")
    g.add_argument("--allow-missing", action="store_true", help="train although replies are missing")
    g.add_argument("--collect-only", action="store_true", help="collect and clean, do not train")
    # fmt: on
    add_flags(g, "--dry-run")
    add_training_flags(p)
    return parse(p, argv)


def main(args) -> None:
    parallel.start()
    if parallel.RANK > 0 and (args.dry_run or args.collect_only):
        return None  # process 0 asks the teacher alone; the others only train
    check_counts(args, "limit", "per_question", "teacher_samples")
    teacher = teachers.from_flags(args)
    questions = tasks.load(args.task, "train", args.data_dir)
    print(describe(questions, "train"))
    questions = questions[: args.limit]
    if teacher and args.dry_run:
        asks, url = [ask for q in questions for ask in teacher.asks(q)], teacher.replies.e.url()
        told = "\n".join(printable_lines(m["content"]) for m in asks[0].messages)
        print(f"\nprompt of {printable(questions[0].name)}, to {url}:\n{told}\n")
        return asking.print_plan("plan", teacher.replies, asks)
    student, method, o = None, "", None
    if args.collect_only:  # there is no student: the rationales go to the teacher's replies
        name = clean_name(args.teacher_file or "program")
        out = teacher.replies.folder if teacher else Path(f"out/{args.task}/teacher-{name}")
        out = Path(args.out_dir or out)
    else:
        student, method = pick_student(args)
        o = options(args, student.label)
        out = Path(o.out_dir or f"out/{o.task}/{student.label}/{method}/seed{o.s.seed}")
    path = out / "rationales.jsonl"
    if args.allow_missing and (out / "settings.json").exists() and path.exists():
        # What was missing when this student was first trained stays left out.
        frozen = {r["id"] for r in read_jsonl(path)}
        questions = [q for q in questions if q.id in frozen]
    if parallel.RANK == 0:
        records = collect(args, teacher, questions, out, student and fits_in(student))
        if args.dry_run:
            return None
        save_records(out, records)
        if not args.allow_missing:
            asking.end_if_missing(teacher and teacher.replies)
    if args.collect_only:
        more = "the same command without --collect-only trains a student on them"
        return print(f"wrote {path}\nnext: {more}")
    parallel.largest(0)  # the other processes wait here for the rationales

    by_id = {q.id: q for q in questions}
    kept = [r for r in read_jsonl(path) if r["kept"]]
    need(kept, f"no rationale was kept; look at {path}, or use --keep all")
    pairs = [(by_id[r["id"]], *prompts.rd_pair(by_id[r["id"]], r["rationale"])) for r in kept]
    about = {"source": args.teacher_file or args.teacher_model or o.task}
    o = o._replace(out_dir=str(out), limit=None)  # the questions were limited, not the examples
    train_student(prepare(student, method, pairs, prompts.COT_SUFFIX, about, o))
    if parallel.RANK == 0:
        if not (teacher or args.teacher_file):
            print("this teacher, a program, speaks in sentences that the student never used: after "
                  "SERT, the student's accuracy falls (docs/results.md). A teacher helps where it "
                  "knows more")  # fmt: skip
        task = tasks.flags(args.task)
        print(f"next: {command('evaluate.py', task, model=out, data_dir=args.data_dir)}")
    return None


def collect(args, teacher, questions: list[Question], out: Path, fits) -> list[dict]:
    """The records of rationales.jsonl: collect the outputs of the teacher for each question, clean
    them, choose those to learn from, and print all counts."""
    if teacher:
        stop_early = args.keep == "right" and not args.go_on
        outputs = teachers.ask(teacher, questions, out, stop_early)
    elif args.teacher_file:
        found, left = read_teacher_file(args.teacher_file, questions)
        outputs = {name: [output] for name, output in found.items()}
        console.print_counts(f"outputs in {args.teacher_file} that are left out", left)
    else:
        outputs = program_outputs(questions, tasks.get(args.task).teacher)
    records, counts = rationale_records(questions, outputs, args.keep, fits, args.per_question)
    console.print_counts(f"{len(records):,} rationales for {len(questions):,} questions", counts)
    console.print_rationales(records)
    return records


def fits_in(student: Student) -> Callable[[Question, str], bool]:
    """(question, rationale) -> can the student's context hold the training text?"""
    tokenizer, c = load_tokenizer(student.folder), read_config(student.folder)

    def fits(q: Question, rationale: str) -> bool:
        return len(encode_example(tokenizer, *prompts.rd_pair(q, rationale))[0]) <= c.n_positions

    return fits


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
    fresh = before not in ("finetune", "star", "rd", "sert-rd")
    need(args.out_dir or fresh, f"--model {student.name} was trained by {before} already: "
         "distillation starts from a raw student or from SERT; choose one of these, or give "
         "--out-dir")  # fmt: skip
    return student, "sert-rd" if before == "sert" else "rd"


def save_records(out: Path, records: list[dict]) -> None:
    """Write rationales.jsonl. One that a checkpoint beside it was trained on is never changed."""
    path, text = out / "rationales.jsonl", "".join(map(to_line, records))
    same = not (out / "settings.json").exists() or not path.exists() or path.read_text() == text
    need(same, f"{out} holds a student of other rationales; choose another --out-dir (no reply is "
         "asked for again)")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def program_outputs(questions: list[Question], teacher: Callable) -> dict[str, list[Output]]:
    """What a task's own teacher writes; its answers are always right."""
    return {q.id: [Output(teacher(q), q.write() + ".", "stop", q.task)] for q in questions}


if __name__ == "__main__":
    run_script(main, parse_args)
