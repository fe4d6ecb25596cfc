"""The programs of the micro-world: its teacher and its judge, which know the facts."""

import re
from typing import NamedTuple

from sert_min.micro.world import FACT_NOTE, FACTS, HOME_NOTES, HOMES, RELATIONS, World, make_world
from sert_min.questions import Question, stem

TEACHER_FACTS = "To begin with, {p} lives in {t}. Now, the {name} of {t} is {v}. "
TEACHER_VERDICT = {  # the test in the question's terms, as in latent paths: another is not learnt
    True: "This was asked: the {name} is indeed {asked} there.",
    False: "This was asked: the {name} is not {asked} there.",
    None: "Among the choices this is {v}.",
}


def teacher_rationale(question: Question) -> str:
    """A right explanation of any question of this world, in sentences that no latent path uses."""
    world, p, name, asked = parse_question(question)
    v = world.value[name, t := world.home[p]]
    text = TEACHER_FACTS + TEACHER_VERDICT[asked and asked == v]
    return text.format(p=p, t=t, name=name, v=v, asked=asked)


class Asked(NamedTuple):
    """What a question asks; `value` is None for five choices."""

    world: World
    person: str
    relation: str
    value: str | None


def pattern(template: str, **slots: str) -> re.Pattern:
    """A wording as a regular expression; its first letter may be of either case."""
    text = re.escape(template.rstrip(".?"))
    for slot, expression in slots.items():
        text = text.replace(re.escape("{" + slot + "}"), expression)
    first = f"(?i:{text[0]})" if template[0].isalpha() else text[0]
    return re.compile(rf"\b{first}{text[1:]}\b")


PERSON, TOWN = r"(?P<p>[A-Z][a-z]+)", r"(?P<t>[A-Z][a-z]+ [A-Z][a-z]+)"
VALUE = {name: f"(?P<v>{'|'.join(r.values)})" for name, r in RELATIONS.items()}
HOME_PATTERNS = [pattern(w, p=PERSON, t=TOWN) for w in HOMES + HOME_NOTES]
FACT_PATTERNS = [(name, pattern(w, name=name, t=TOWN, v=VALUE[name]))
                 for name, r in RELATIONS.items() for w in (*FACTS, FACT_NOTE, r.note)]  # fmt: skip
ASK_PATTERNS = [(name, pattern(w, p=PERSON, v=VALUE[name]))
                for name, r in RELATIONS.items() for w in r.yes_no + r.choice]  # fmt: skip
VERDICT_PATTERNS = {
    name: re.compile(rf"\b(?:(?:[Ss]o|asked:) the {name} is|[Aa]mong the choices this is)"
                     rf"(?P<n> not)?(?: indeed)? {value}\b")
    for name, value in VALUE.items()
}  # fmt: skip


def parse_question(question: Question) -> Asked:
    """Asked of a question of this world; ValueError for any other text."""
    seed = re.match(r"w(\d+)-", question.id)
    for name, ask in ASK_PATTERNS:
        found = ask.match(stem(question.text))
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
    home, value = asked.world.home, asked.world.value
    homes = [(m["p"], m["t"]) for h in HOME_PATTERNS for m in h.finditer(text)]
    values = [(name, m["t"], m["v"]) for name, f in FACT_PATTERNS for m in f.finditer(text)]
    wrong = sum(home.get(p) != t for p, t in homes)
    wrong += sum(value.get((name, t)) != v for name, t, v in values)
    town = next((t for p, t in homes if p == asked.person), None)
    about = {name: v for name, t, v in reversed(values) if t == town}  # the first of each counts
    said = about.get(asked.relation)
    *_, verdict = None, *VERDICT_PATTERNS[asked.relation].finditer(text)
    follows, gives = False, None
    if verdict and asked.value in (None, verdict["v"]):
        v, negated = verdict["v"], bool(verdict["n"])
        follows = said is not None and (v == said) != negated
        gives = ("no" if negated else "yes") if asked.value else None if negated else v
    return {
        "facts": bool(town and about and not wrong),
        "relation": said is not None,
        "verdict": follows,
        "gold": gives == question.write(),
        "home": town is not None,
        "wrong": wrong,
        "stated": len(homes) + len(values),
        "concluded": verdict is not None,
    }


def judge(question: Question, text: str) -> dict[str, float]:
    """Four scores of 0-10 for any text: coherence, relevance, logical consistency, completeness."""
    got, words = check_path(question, text), text.split()
    stated, parts = got["stated"], got["home"] + got["relation"] + got["concluded"]
    distinct = len(set(words)) / max(1, len(words))
    true = 1 - got["wrong"] / stated if stated else 0.0
    return {
        # statements of this world in readable order, not repeated
        "coherence": round(10 * min(1, (stated + got["concluded"]) / 3) * min(1, 2 * distinct), 2),
        # about the person and the attribute that were asked for
        "relevance": 4.0 * got["home"] + 6.0 * got["relation"],
        # nothing false, and a verdict that follows from what was stated
        "logical consistency": 5.0 * true + 5.0 * got["verdict"],
        "completeness": round(10 * parts / 3, 2),  # both facts and the verdict are there
    }
