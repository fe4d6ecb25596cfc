"""The programs of the micro-world: its teacher and its judge, which know the facts."""

import re
from dataclasses import dataclass

from sert_min.micro.world import (
    FACT_NOTE,
    FACTS,
    HOME_NOTES,
    HOMES,
    RELATIONS,
    World,
    make_world,
)
from sert_min.questions import CHOICES, Question

# --- teacher and judge --------------------------------------------------------------------------

TEACHER_HOME = "To begin with, {p} lives in {t}."
TEACHER_FACT = "Now, the {name} of {t} is {v}."
TEACHER_VERDICT = {  # the test in the question's terms, as in latent paths: another is not learnt
    True: "This was asked: the {name} is indeed {asked} there.",
    False: "This was asked: the {name} is not {asked} there.",
    None: "Among the choices this is {v}.",
}


def teacher_rationale(question: Question) -> str:
    """A right explanation of any question of this world, in sentences that no latent path uses."""
    asked = parse_question(question)
    p, t = asked.person, asked.world.home[asked.person]
    v = asked.world.value[asked.relation, t]
    sentences = TEACHER_HOME, TEACHER_FACT, TEACHER_VERDICT[asked.value and asked.value == v]
    return " ".join(sentences).format(p=p, t=t, name=asked.relation, v=v, asked=asked.value)


@dataclass(frozen=True)
class Asked:
    """What a question asks; `value` is None for five choices."""

    world: World
    person: str
    relation: str
    value: str | None


def pattern(template: str, **slots: str) -> re.Pattern:
    """A wording as a regular expression; its first letter may be of either case."""
    text = re.escape(template.rstrip("."))
    for slot, expression in slots.items():
        text = text.replace(re.escape("{" + slot + "}"), expression)
    if template[0].isalpha():
        text = f"[{text[0]}{text[0].swapcase()}]" + text[1:]
    return re.compile(r"\b" + text + r"\b")


PERSON, TOWN = r"(?P<p>[A-Z][a-z]+)", r"(?P<t>[A-Z][a-z]+ [A-Z][a-z]+)"


def patterns() -> tuple[list, dict, dict, dict]:
    """Regular expressions: home statements; per relation fact statements, verdicts, questions."""
    homes = [pattern(w, p=PERSON, t=TOWN) for w in HOMES + HOME_NOTES]
    facts, verdicts, asks = {}, {}, {}
    for name, r in RELATIONS.items():
        v = f"(?P<v>{'|'.join(r.values)})"
        facts[name] = [pattern(w, name=name, t=TOWN, v=v) for w in (*FACTS, FACT_NOTE, r.note)]
        verdicts[name] = [
            re.compile(rf"\b(?:[Ss]o|asked:) the {name} is(?P<n> not)?(?: indeed)? {v}\b"),
            re.compile(rf"\b[Aa]mong the choices this is(?P<n> not)? {v}\b"),
        ]
        asks[name] = [pattern(w[:-1], p=PERSON, v=v) for w in r.yes_no + r.choice]
    return homes, facts, verdicts, asks


HOME_PATTERNS, FACT_PATTERNS, VERDICT_PATTERNS, ASK_PATTERNS = patterns()


def parse_question(question: Question) -> Asked:
    """Asked of a question of this world; ValueError for any other text."""
    seed = re.match(r"w(\d+)-", question.id)
    for name, asks in ASK_PATTERNS.items():
        for ask in asks:
            found = ask.match(question.text.partition(CHOICES)[0])
            if found and seed:
                return Asked(make_world(int(seed[1])), found["p"], name, found.groupdict().get("v"))
    raise ValueError(f"not a question of the micro-world: {question.id!r} {question.text!r}")


def check_path(question: Question, text: str) -> dict:
    """What a text states, checked: facts, relation, verdict, gold (bool) and the counts behind.

    facts: it states the person's home and the value of that town, and nothing false about it.
    relation: the attribute it states of the town is the one asked for.
    verdict: its last verdict follows from the value that it states itself (right or wrong).
    gold: the verdict is there and gives the gold answer.
    """
    asked = parse_question(question)
    world, home = asked.world, asked.world.home
    homes = [(m["p"], m["t"]) for h in HOME_PATTERNS for m in h.finditer(text)]
    values = [
        (name, m["t"], m["v"])
        for name, group in FACT_PATTERNS.items()
        for f in group
        for m in f.finditer(text)
    ]
    wrong = sum(home.get(p) != t for p, t in homes)
    wrong += sum(world.value.get((name, t)) != v for name, t, v in values)
    town = next((t for p, t in homes if p == asked.person), None)
    about = [(name, v) for name, t, v in values if t == town]
    said = next((v for name, v in about if name == asked.relation), None)
    verdicts = [m for v in VERDICT_PATTERNS[asked.relation] for m in v.finditer(text)]
    verdict = max(verdicts, key=lambda m: m.start(), default=None)
    consistent = gives = None
    if verdict:
        negated = verdict["n"] is not None
        about_value = verdict.groupdict().get("v", asked.value)
        consistent = said is not None and (about_value == said) != negated
        if asked.value:
            consistent = consistent and about_value == asked.value
            gives = ("no" if negated else "yes") if about_value == asked.value else None
        else:
            gives = None if negated else about_value
    return {
        "facts": bool(town and about and not wrong),
        "relation": said is not None,
        "verdict": bool(consistent),
        "gold": gives == question.write(),
        "home": town is not None,
        "wrong": wrong,
        "stated": len(homes) + len(values),
        "concluded": verdict is not None,
    }


def judge(question: Question, text: str) -> dict[str, float]:
    """Four scores of 0-10 for any text: coherence, relevance, logical consistency, completeness."""
    got = check_path(question, text)
    words = text.split()
    distinct = len(set(words)) / len(words) if words else 0.0
    stated = got["stated"]
    return {
        # statements of this world in readable order, not repeated
        "coherence": round(10 * min(1, (stated + got["concluded"]) / 3) * min(1, 2 * distinct), 2),
        # about the person and the attribute that were asked for
        "relevance": 4.0 * got["home"] + 6.0 * got["relation"],
        # nothing false, and a verdict that follows from what was stated
        "logical consistency": (5.0 * (1 - got["wrong"] / stated) + 5.0 * got["verdict"])
        if stated
        else 0.0,
        # both facts and the verdict are there
        "completeness": round(10 * (got["home"] + got["relation"] + got["concluded"]) / 3, 2),
    }
