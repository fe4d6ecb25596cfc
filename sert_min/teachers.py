"""Teachers at OpenAI-compatible endpoints: their flags, prompts and replies (io/asking.py asks)."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from sert_min import prompts, tasks
from sert_min.answers import plain_answer
from sert_min.io import asking, endpoint
from sert_min.io.asking import Collection
from sert_min.io.endpoint import Ask
from sert_min.io.errors import need
from sert_min.io.files import clean_name, read_jsonl
from sert_min.questions import Question, stem
from sert_min.rationales import Output, teacher_answer

ANSWER_TOKENS = 64  # of the reply to the second request of --two-step


def add_flags(group) -> None:
    # fmt: off
    group.add_argument("--teacher-file", help="existing rationales: davinci (a public log), a .log "
                       "of zero_shot_cot, distilling-step-by-step's folder, or .jsonl (docs/usage.md)")
    endpoint.add_flags(group, "teacher")
    group.add_argument("--teacher-suffix", default="",
                       help="added to the prompt, e.g. to ask for an answer")
    group.add_argument("--two-step", action="store_true",
                       help="ask for the answer in a second request")
    group.add_argument("--shots", metavar="FILE", help="worked examples that go before each question: "
                       "JSONL with question, rationale, answer")
    group.add_argument("--teacher-samples", type=int, default=1, metavar="N", help="replies per "
                       "question (above 1: give --teacher-temperature)")
    group.add_argument("--teacher-dir", help="where replies lie (default: out/TASK/teacher-NAME)")
    # fmt: on


class Teacher(NamedTuple):
    """A teacher at an endpoint, and how it is asked."""

    replies: Collection
    suffix: str  # added to the prompt
    two_step: bool  # ask for the answer in a second request
    shots: tuple[dict, ...]  # worked examples, as messages
    samples: int  # replies per question

    def asks(self, q: Question) -> list[Ask]:
        """The requests for rationales."""
        text = prompts.question_prompt(q, prompts.COT_SUFFIX) + self.suffix
        messages = (*self.shots, {"role": "user", "content": text})
        trigger, e = prompts.answer_trigger(q), self.replies.e
        then = partial(ask_answer, trigger, e.completions) if self.two_step else None
        return [Ask(q.task, q.id, i, messages, then=then) for i in range(self.samples)]

    def output(self, replies: list[dict]) -> Output:
        """The output that one reply or, with --two-step, two replies make."""
        first, answer = replies[0], replies[1]["text"] if len(replies) > 1 else None
        return Output(first["text"], answer, first.get("finish"), self.replies.e.model)


def ask_answer(trigger: str, completions: bool, ask: Ask, said: str) -> Ask | None:
    """The request for the answer that follows a rationale, if that is not empty."""
    last, said = ask.messages[-1]["content"], said.strip()
    if not said:
        return None
    answer = {"role": "user", "content": trigger}
    messages = (*ask.messages, {"role": "assistant", "content": said}, answer)
    if completions:
        whole = {"role": "user", "content": f"{last} {said}\n{trigger}"}
        messages = (*ask.messages[:-1], whole)
    return Ask(ask.task, ask.id, ask.sample, messages, ANSWER_TOKENS)


def from_flags(args) -> Teacher | None:
    """The teacher that the flags name; None if it is a file or the task's program."""
    file, model = args.teacher_file, args.teacher_model
    need(not (file and model), "give --teacher-file or --teacher-model, not both")
    need(file or model or tasks.get(args.task).teacher,
         f"{tasks.flags(args.task)} needs a teacher: --teacher-model NAME (any OpenAI-compatible "
         "endpoint, see --base-url) or --teacher-file FILE")  # fmt: skip
    if not model:
        for flag in ("base_url", "system_prompt", "extra_body", "extra_header", "max_requests",
                     "max_cost", "teacher_suffix", "two_step", "shots", "teacher_dir"):  # fmt: skip
            need(not getattr(args, flag), f"--{flag.replace('_', '-')} needs --teacher-model")
        need(args.teacher_samples == 1, "--teacher-samples needs --teacher-model")
        return None
    e, n = endpoint.from_flags(args, "teacher"), args.teacher_samples
    need(n == 1 or e.temperature, "--teacher-samples above 1 needs a --teacher-temperature above "
         "0: without one all replies to a question would be alike")  # fmt: skip
    # The replies are shared by all students of a task. Earlier versions stored them in --out-dir.
    default = Path(f"out/{args.task}/teacher-{clean_name(model)}")
    others = default, Path(args.out_dir or default)
    replies = Collection(Path(args.teacher_dir or default), e, *others)
    shots = read_shots(args) if args.shots else ()
    return Teacher(replies, args.teacher_suffix, args.two_step, shots, n)


def read_shots(args) -> tuple[dict, ...]:
    """The worked examples of --shots as messages. A question of the task itself is refused: the
    teacher would see its answer, or a test question's."""
    form, messages, seen = dict.fromkeys(("question", "rationale", "answer"), str), [], set()
    for split in ("train", "test"):
        seen |= {plain_answer(stem(q.text)) for q in tasks.load(args.task, split, args.data_dir)}
    for number, row in enumerate(read_jsonl(args.shots, form), 1):
        new = plain_answer(stem(row["question"])) not in seen
        need(new, f"{args.shots} example {number} is a question of this task; take another one")
        asked = f"Question: {row['question'].strip()}\nAnswer:{prompts.COT_SUFFIX}"
        told = f"{row['rationale'].strip()} So the answer is {row['answer'].strip()}."
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    need(messages, f"{args.shots} holds no examples")
    return tuple(messages)


def ask(
    teacher: Teacher, questions: list[Question], out: Path, stop_early: bool
) -> dict[str, list[Output]]:
    """The outputs by question id; what is missing is asked for. `out` may hold replies of an
    earlier version; `stop_early` ends a collection of replies that can't be read."""
    teacher.replies.others += (out,)
    asks, by_id = [a for q in questions for a in teacher.asks(q)], {q.id: q for q in questions}
    advice = "--teacher-suffix ' End with: So the answer is ..' asks for all replies again; "
    advice += "" if teacher.two_step else "--two-step only adds a request for the answer; "
    advice += "a larger --teacher-max-tokens asks for those again that were cut off; "
    advice += "--go-on keeps those with a right answer, --keep all all of them"

    def test(ask: Ask, replies: list[dict]) -> bool:
        return teacher_answer(teacher.output(replies), by_id[ask.id]) is not None

    readable = asking.Readable(test, "state an answer that can be read", advice)
    asking.ask_all(teacher.replies, asks, readable if stop_early else None)
    outputs: dict[str, list[Output]] = {}
    for ask in asks:
        replies, now = teacher.replies.walk(ask)
        if not now:
            outputs.setdefault(ask.id, []).append(teacher.output(replies))
    return outputs
