"""The judge: how good is the reasoning in a response? Four scores of 0 to 10 [SERT Table I].

The prompt says what the paper's says, in our words, and asks for the same score lines. The judge is
a model at any OpenAI-compatible endpoint, asked at temperature 0 through the teacher's client: the
same response to the same question is asked once, whoever gave it, so no reply is paid for twice. In
the micro-world a program judges (tasks.Task.judge). An unreadable score is missing, never 0.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sert_min.answers import without_thinking
from sert_min.io import asking, endpoint
from sert_min.io.asking import Collection, Readable
from sert_min.io.endpoint import Ask
from sert_min.io.files import clean_name, read_jsonl, to_line, write_atomic
from sert_min.metrics import mean_interval

# Each is asked for by a question, as in the paper's Table I. A fifth one needs changes in the words
# "four" below, in micro/program.judge and in the panels of figures.plot_ablation; and because it
# changes the prompt, all replies are asked for, and paid, anew.
CRITERIA = {
    "Coherence": "Do its sentences connect, so that it reads as one clear line of thought?",
    "Relevance": "Does it deal with what the question asks, without straying from it?",
    "Logical Consistency": "Does each step follow from the ones before it, without contradiction?",
    "Completeness": "Does it take every step that leads from the question to an answer?",
}
KEYS = tuple(name.lower() for name in CRITERIA)  # of a record's scores
ASKED = "\n".join(f"{i}. {name}: {CRITERIA[name]}\n   Score for {name}: <number>"
                  for i, name in enumerate(CRITERIA, 1))  # fmt: skip
PROMPT = f"""Your task is to assess the quality of the reasoning in a response to a question.

Question:
{{question}}

Response:
{{response}}

Assess the response by four criteria. Give each a score between 0 and 10, where 0 is very poor and \
10 is excellent, on a line of its own, written exactly as shown with a number in place of <number>:
{ASKED}

At the end, give a brief summary of your assessment."""

# What stands between a criterion and its number: Markdown, `(0-10)` and a colon.
_FORM = r"[ \t*_`\"']*(?:\((?:out of|0\s*[-–]|0 to)\s*10\))?[ \t*_`\"']*(?:[:：=]|is\b)"
_SCORES = {
    key: re.compile(r"score\s+for\s+" + key.replace(" ", r"[\s_-]+") + _FORM + r"([^\n]*)", re.I)
    for key in KEYS
}
_NUMBER = re.compile(  # not a score: a range (7-8), a change (6 -> 8), another scale (7/5), 8th
    r"[\s*_`\[({<\"']*(?P<n>[+-]?[0-9]+(?:[.,][0-9]+)?)(?![\w])"
    r"(?:[\s\])}>(*_`]*(?:/|out\s+of)\s*(?P<of>[0-9]+(?:[.,][0-9]+)?))?"
    r"(?![\s*_`]*(?:[-=]*>|-|–|—|[→⇒➜➔⟶⟹]|to\b|or\b)[\s*_`]*[0-9])(?![.,]?[0-9])",
    re.IGNORECASE,
)


def judge_prompt(question: str, response: str) -> str:
    """The request for one response; `question` shows its options."""
    return PROMPT.format(question=question, response=response.strip() or "(empty)")


def parse_scores(reply: str) -> dict[str, float | None]:
    """{criterion: score or None} of any text. Of several lines for a criterion the last one counts,
    unless it only repeats the form; anything but one number from 0 to 10 is a missing score.

    >>> parse_scores("**Score for Coherence:** 7/10\\nScore for Relevance: 11")["coherence"]
    7.0
    """
    scores, reply = {}, without_thinking(reply)  # a draft of the scores doesn't count
    for key, pattern in _SCORES.items():
        said = [rest for rest in pattern.findall(reply) if "<number>" not in rest.lower()]
        m = _NUMBER.match(said[-1]) if said else None
        value, of = (float((s or "10").replace(",", ".")) for s in m.groups()) if m else (-1, 10)
        scores[key] = value if of == 10 and 0 <= value <= 10 else None
    return scores


def mean_score(scores: dict) -> float | None:
    """The mean of the four scores; None if one is missing."""
    return None if None in scores.values() else math.fsum(scores.values()) / len(scores)


# --- who judges -----------------------------------------------------------------------------------


class Judge(NamedTuple):
    """A model at an endpoint, or a program that knows a task's facts."""

    name: str  # of its scores-NAME.jsonl
    program: Callable | None  # (question, text) -> {criterion: score}
    replies: Collection | None = None  # of the model, which all runs of a task share


def choose(args, program: Callable | None) -> Judge | None:
    """The judge model that the flags name, else the task's own `program`, if it has one."""
    if not args.judge_model:
        return Judge("program", program) if program else None
    e, name = endpoint.from_flags(args, "judge"), clean_name(args.judge_model)
    return Judge(name, None, Collection(Path(f"out/{args.task}/judge-{name}"), e))


def make_ask(record: dict) -> Ask:
    """The request for a record's text. Paths of one question that read alike share it."""
    text = judge_prompt(record["question"], record["text"])
    return Ask(record["task"], record["id"], 0, ({"role": "user", "content": text},))


def print_plan(records: list[dict], judge: Judge | None, what: str) -> None:
    """Print what judging would ask and cost at most; a program costs nothing."""
    if judge and judge.replies:
        asking.print_plan(what, judge.replies, map(make_ask, records))


# --- scores of records ----------------------------------------------------------------------------


def write_scores(records: list[dict], questions: dict, judge: Judge | None, out: Path) -> None:
    """Write scores-NAME.jsonl for records that have replies (`questions` by id, for a program)."""
    if judge is None:
        return
    if judge.program:
        scored = [score_record(r, judge.program(questions[r["id"]], r["text"])) for r in records]
    else:
        readable = Readable(
            lambda ask, replies: None not in parse_scores(replies[0]["text"]).values(),
            "hold all four scores",
            "Look at responses.jsonl; choose another --judge-model or a larger --judge-max-tokens",
        )
        asks = list(map(make_ask, records))
        asking.ask_all(judge.replies, asks, readable)
        told = zip(records, map(judge.replies.find, asks))
        scored = [score_record(r, parse_scores(reply["text"])) for r, reply in told if reply]
    write_atomic(out / f"scores-{judge.name}.jsonl", map(to_line, scored))


def score_record(record: dict, scores: dict) -> dict:
    """One line of scores-NAME.jsonl. The scores of a path also name its branch and sample."""
    about = {k: record[k] for k in ("task", "id", "branch", "sample", "verdict") if k in record}
    scores = {k: None if scores[k] is None else round(float(scores[k]), 4) for k in KEYS}
    mean = mean_score(scores)
    return {**about, "scores": scores, "mean": mean and round(mean, 4)}


def summary(scored: list[dict], total: int) -> dict:
    """Mean and interval of each criterion, and how many of `total` responses have all scores."""
    values = {k: [r["scores"][k] for r in scored if r["scores"][k] is not None] for k in KEYS}
    parsed = sum(r["mean"] is not None for r in scored)
    return {k: mean_interval(v) for k, v in values.items()} | {"parsed": parsed, "total": total}


def summaries(folder: Path, total: int) -> dict[str, dict]:
    """judge -> summary, of every scores-NAME.jsonl in a folder."""
    files = sorted(folder.glob("scores-*.jsonl"))
    return {f.stem.removeprefix("scores-"): summary(list(read_jsonl(f)), total) for f in files}
