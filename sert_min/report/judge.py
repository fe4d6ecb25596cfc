"""The judge: how good is the reasoning in a response? Four scores of 0 to 10 [SERT Table I].

The prompt says what the paper's says, in our words, and asks for the same score lines. Any
OpenAI-compatible endpoint judges, at temperature 0 and through the teacher's client, so no reply is
paid for twice: the same response to the same question is asked once, whoever gave it. In the
micro-world a program judges (`micro.judge`). A score that can't be read is missing, never 0.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from sert_min.io.endpoint import Ask, Collection, Endpoint, collect, stored_replies
from sert_min.io.errors import SertError
from sert_min.io.files import lock_folder
from sert_min.metrics import mean_interval

# Each is asked for by a question, as in the paper's Table I. A fifth one also changes the words
# "four" below, micro.judge and the panels of plots.plot_ablation; and as the prompt is another one
# then, all replies are asked for, and paid, anew.
CRITERIA = {
    "Coherence": "Do its sentences connect, so that it reads as one clear line of thought?",
    "Relevance": "Does it deal with what the question asks, without straying from it?",
    "Logical Consistency": "Does each step follow from the ones before it, without contradiction?",
    "Completeness": "Does it take every step that leads from the question to an answer?",
}
KEYS = tuple(name.lower() for name in CRITERIA)  # of a record's scores
ASKED = "\n".join(
    f"{i}. {name}: {asks}\n   Score for {name}: <number>"
    for i, (name, asks) in enumerate(CRITERIA.items(), 1)
)
PROMPT = f"""Your task is to assess the quality of the reasoning in a response to a question.

Question:
{{question}}

Response:
{{response}}

Assess the response by four criteria. Give each a score between 0 and 10, where 0 is very poor and \
10 is excellent, on a line of its own, written exactly as shown with a number in place of <number>:
{ASKED}

At the end, give a brief summary of your assessment."""

# Markdown, `(0-10)` and the colon between the criterion and its number
_FORM = r"[ \t*_`\"']*(?:\((?:out of|0\s*[-–]|0 to)\s*10\))?[ \t*_`\"']*(?::|=|is\b)"
_SCORES = {
    name.lower(): re.compile(
        r"score\s+for\s+" + r"[\s_-]+".join(name.split()) + _FORM + r"(?P<rest>[^\n]*)",
        re.IGNORECASE,
    )
    for name in CRITERIA
}
_NUMBER = re.compile(  # a range (7-8), another scale (7/5) and 8th are no score
    r"[\s*_`\[({<\"']*(?P<n>[+-]?[0-9]+(?:[.,][0-9]+)?)(?![\w])"
    r"(?:[\s\])}>(*_`]*(?:/|out\s+of)\s*(?P<of>[0-9]+(?:[.,][0-9]+)?))?"
    r"(?!\s*(?:-|–|—|to\b|or\b)\s*[0-9])(?![.,]?[0-9])",
    re.IGNORECASE,
)


def judge_prompt(question: str, response: str) -> str:
    """The request for one response; `question` shows its options."""
    return PROMPT.format(question=question, response=response.strip() or "(empty)")


def parse_scores(reply: str) -> dict[str, float | None]:
    """{criterion: score or None} of any text. The last line for a criterion that holds more than
    the form itself counts; what is no single number from 0 to 10 is missing.

    >>> parse_scores("**Score for Coherence:** 7/10\\nScore for Relevance: 11")["coherence"]
    7.0
    """
    scores: dict[str, float | None] = {}
    for key, pattern in _SCORES.items():
        said = [m["rest"] for m in pattern.finditer(reply) if "<number>" not in m["rest"].lower()]
        scores[key] = read_number(said[-1]) if said else None
    return scores


def read_number(text: str) -> float | None:
    """The score that `text` begins with: 7, 7.5, 7,5, **7**, [7], 7/10, 7 out of 10."""
    m = _NUMBER.match(text)
    if not m or (m["of"] and float(m["of"].replace(",", ".")) != 10):
        return None
    value = float(m["n"].replace(",", "."))
    return value if 0 <= value <= 10 else None


def mean_score(scores: dict) -> float | None:
    """The mean of the four scores; None if one is missing."""
    values = [scores.get(key) for key in KEYS]
    return None if None in values else math.fsum(values) / len(values)


SCORED = {  # the form of a line of scores-NAME.jsonl
    "id": str,
    "scores": {key: (float, None) for key in KEYS},
    "mean": (float, None),
}

# --- scores of records ----------------------------------------------------------------------------


def score_record(record: dict, scores: dict) -> dict:
    """One line of scores-NAME.jsonl; branch and sample are those of a path, else missing."""
    names = ("task", "id", "branch", "sample", "verdict")
    rounded = {k: None if scores[k] is None else round(float(scores[k]), 4) for k in KEYS}
    mean = mean_score(rounded)
    return {
        **{k: record[k] for k in names if k in record},
        "scores": rounded,
        "mean": None if mean is None else round(mean, 4),
    }


def make_ask(record: dict) -> Ask:
    """The request for a record's text. Paths of one question that read alike share it."""
    text = judge_prompt(record["question"], record["text"])
    return Ask(record["task"], record["id"], 0, ({"role": "user", "content": text},))


def asks_of(records: Iterable[dict], e: Endpoint) -> dict[str, Ask]:
    """The different requests for records, by key, in order."""
    asks: dict[str, Ask] = {}
    for record in records:
        ask = make_ask(record)
        asks.setdefault(ask.key(e), ask)
    return asks


def ask_judge(
    records: list[dict],
    e: Endpoint,
    folder: Path,
    max_requests: int | None = None,
    max_cost: float | None = None,
) -> tuple[list[dict], list[str]]:
    """(a score record per record that has a reply, why replies are missing); replies are kept in
    `folder`, which all runs of a task share. Stops early if most replies can't be read."""

    with lock_folder(folder, ".lock-responses"):
        collection = Collection(folder / "responses.jsonl").load()
        asks = asks_of(records, e)
        todo = [ask for key, ask in asks.items() if key not in collection.replies]
        if todo:
            print(f"{len(asks) - len(todo):,} responses are judged already, {len(todo):,} to ask")

        checked = False

        def check() -> None:
            nonlocal checked
            there = [collection.replies[key]["text"] for key in asks if key in collection.replies]
            if not checked and len(there) >= 20:
                checked = True
                check_readable(there)

        try:
            with tqdm(total=len(todo), unit="reply", disable=not todo) as bar:

                def progress(n: int, note: str) -> None:
                    bar.set_postfix_str(note, refresh=bool(note))
                    bar.update(n)

                failures = collect(collection, todo, e, max_requests, max_cost, check, progress)
        except SertError as error:  # the client's advice names the teacher's flags
            advice = str(error).replace(
                "leave --teacher-temperature out", "give --judge-temperature none"
            )
            raise SertError(advice.replace("--teacher-max", "--judge-max")) from None
        finally:
            print(f"judge {collection.summary(e)}")
    told = ((r, collection.replies.get(make_ask(r).key(e))) for r in records)
    return [score_record(r, parse_scores(reply["text"])) for r, reply in told if reply], failures


def check_readable(replies: list[str]) -> None:
    """Stop if fewer than half of the first replies hold all four scores: each one costs."""
    n = sum(mean_score(parse_scores(reply)) is not None for reply in replies)
    if n < len(replies) / 2:
        raise SertError(
            f"only {n} of the first {len(replies)} replies hold all four scores; they are kept. "
            "Look at responses.jsonl, choose another --judge-model or a larger --judge-max-tokens"
        )


def program_scores(records: Iterable[dict], questions: dict, judge: Callable) -> list[dict]:
    """Scores by a program that knows the facts (tasks.Task.judge); `questions` by id."""
    return [score_record(r, judge(questions[r["id"]], r["text"])) for r in records]


def plan(records: list[dict], e: Endpoint, folder: Path) -> tuple[int, int, int, int]:
    """(requests, replies that are there, tokens in and out at most) of judging records. Sends and
    writes nothing."""
    asks, there = asks_of(records, e), stored_replies(folder / "responses.jsonl")
    bounds = [ask.most_tokens(e) for key, ask in asks.items() if key not in there]
    n_in, n_out = (sum(b[i] for b in bounds) for i in (0, 1))
    return len(bounds), len(asks) - len(bounds), n_in, n_out


def count_missing(scored: Iterable[dict]) -> Counter:
    """Records and missing scores: `records`, `parsed` (all four) and each criterion's misses."""
    counts: Counter = Counter()
    for r in scored:
        counts["records"] += 1
        counts["parsed"] += r["mean"] is not None
        counts.update(key for key in KEYS if r["scores"][key] is None)
    return counts


def summary(scored: list[dict], total: int) -> dict:
    """Mean and interval of each criterion, and how many of `total` responses have all scores."""
    values = {k: [r["scores"][k] for r in scored if r["scores"][k] is not None] for k in KEYS}
    return {
        **{k: mean_interval(v) for k, v in values.items()},
        "parsed": count_missing(scored)["parsed"],
        "total": total,
    }
