"""The facts of the micro-world, its questions and its corpus.

People live in towns; every town has one flag colour, tree, sport and fruit. A question asks for
something about the town *where a person lives*, so it needs two facts through a bridge (the town).
A town has a name of two words, and only both together tell its values. With one word, training on
labels taught the student to pass the bridge unwritten (43 % of five choices right, chance 20 %).
"""

import random
from functools import cache
from typing import NamedTuple

from sert_min.questions import CHOICES, LETTERS, Question, with_choices


def names(begin: str, end: str, between: str = "") -> list[str]:
    """Each word of `begin` with each word of `end`."""
    return [a + between + b for a in begin.split() for b in end.split()]


STUDENT_SEED = 7  # world seed of the shipped student
PEOPLE = names("Al Ber Cor Dar El Fin Gar Hal Il Jor Kal Lor Mar Nel Or Pel Ros Sel Tam Vin",
               "a an o in en ia ric ton la da na mon vin let ra sa bert wen dor mi")  # fmt: skip
TOWNS = names("Ash Brook Clay Fern Glen Hart", "Creek Field Ford Hill Lake Mill Ridge Vale", " ")
# Names that no fact is about: puzzles use them to show the form of a verdict without any fact.
STRANGERS = names("Bel Dom Gil Hu Lin Os Pe Qui Sim Tho", "us ette ma ry")
FAR_TOWNS = names("Green West Wood", "Bay Cross Gate Haven", " ")
# What sample.py and train.py use where a flag is left out (tasks.py). Latent paths here have
# 20 to 30 tokens, rep-2 up to 0.36 and, once begun, are nearly certain: perplexity 1.1 to 1.4.
# So the paper's 25 tokens, 0.2 and 5 do not fit.
PRESET = {"min_tokens": 12, "max_rep2": 0.4, "min_perplexity": 1.05,
          "max_new_tokens": 64, "early_reject": False, "epochs": 5}  # fmt: skip


class Relation(NamedTuple):
    """What is particular to one attribute of a town; {p} person, {t} town, {v} value."""

    values: tuple[str, ...]
    yes_no: tuple[str, ...]  # questions about a person's town
    choice: tuple[str, ...]
    ask: str  # one-hop question
    note: str  # one more wording of the fact


# fmt: off
RELATIONS = {
    "flag": Relation(
        ("red", "blue", "green", "white", "black", "yellow", "pink", "purple"),
        ("Is the flag of the town where {p} lives {v}?", "Does {p} live in a town with a {v} flag?"),
        ("What colour is the flag of the town where {p} lives?", "Which colour has the flag where {p} lives?"),
        "What colour is the flag of {t}?", "The town of {t} has a {v} flag."),
    "tree": Relation(
        ("oak", "pine", "maple", "birch", "cedar", "willow", "palm", "beech"),
        ("Is {v} the tree of the town where {p} lives?", "Does {p} live in a town with {v} trees?"),
        ("What is the tree of the town where {p} lives?", "Which tree grows where {p} lives?"),
        "What is the tree of {t}?", "The town of {t} has {v} trees."),
    "sport": Relation(
        ("tennis", "hockey", "rugby", "golf", "cricket", "football", "polo", "rowing"),
        ("Is {v} the sport of the town where {p} lives?", "Does {p} live in a town with a {v} team?"),
        ("What is the sport of the town where {p} lives?", "Which sport is played where {p} lives?"),
        "What is the sport of {t}?", "The town of {t} has a {v} team."),
    "fruit": Relation(
        ("mango", "pear", "plum", "cherry", "peach", "lemon", "melon", "grape"),
        ("Is {v} the fruit of the town where {p} lives?", "Does {p} live in a town with a {v} fair?"),
        ("What is the fruit of the town where {p} lives?", "Which fruit is sold where {p} lives?"),
        "What is the fruit of {t}?", "The town of {t} has a {v} fair."),
}
# fmt: on
ASK_HOME = "Where does {p} live?"
HOMES = ("{p} lives in {t}.", "{p} is from {t}.")  # first sentence of latent reasoning
FACTS = ("The {name} of {t} is {v}.", "In {t} the {name} is {v}.")  # second sentence
# Third sentence. A yes and a no have the same repeated bigrams, of which the filter keeps the path
# with the fewest: with "So the flag is red" it would prefer a wrong no to a right yes.
CLAIM = "So the {name} is {how} {v} there."  # {how}: indeed, not
FINDING = "So the {name} is {v}."  # five choices
HOME_NOTES = ("We know that {p} lives in {t}.", "The home of {p} is {t}.")  # fact documents only
FACT_NOTE = "We see that the {name} of {t} is {v}."


class World(NamedTuple):
    """The facts, and who may be asked what where."""

    home: dict[str, str]  # person -> town
    value: dict[tuple[str, str], str]  # (relation, town) -> value
    use: dict[tuple[str, str], str]  # (person, relation) -> train, test or corpus


@cache
def make_world(seed: int) -> World:
    """The facts of one world: towns equally large, values equally common, roles balanced."""
    rng, people = random.Random(f"world {seed}"), list(PEOPLE)
    rng.shuffle(people)
    home = {p: TOWNS[i % len(TOWNS)] for i, p in enumerate(people)}
    # The eight towns with one first word have all eight values of a relation, so this word, which
    # may be known before the name is written, says nothing about any answer.
    value = {}
    for name, relation in RELATIONS.items():
        for i in range(0, len(TOWNS), 8):
            for t, v in zip(TOWNS[i : i + 8], rng.sample(relation.values, 8)):
                value[name, t] = v
    # Every person is asked about once in train and once in test, under two different relations;
    # the other two relations are the corpus's. All 12 ordered pairs are equally common.
    pairs = [(a, b) for a in RELATIONS for b in RELATIONS if a != b]
    rng.shuffle(people)
    use = {(p, name): "corpus" for p in people for name in RELATIONS}
    for i, p in enumerate(people):
        train, test = pairs[i % len(pairs)]
        use[p, train], use[p, test] = "train", "test"
    return World(home, value, use)


def questions(split: str, world_seed: int = STUDENT_SEED) -> list[Question]:
    """The questions of 'train' or 'test' (400 each): one per held-out person and relation.

    Half are yes/no, half five-choice. Per relation and asked value as many yes as no (up to one);
    letters in turn. So nothing but the facts tells the answer.
    """
    world = make_world(world_seed)
    rng = random.Random(f"questions {world_seed} {split}")
    out = []
    for name, relation in RELATIONS.items():
        truth = {p: world.value[name, world.home[p]] for p in PEOPLE if world.use[p, name] == split}
        people = list(truth)
        rng.shuffle(people)
        # by true value, then dealt in turn to yes, choice, no, choice: every kind gets each value
        people.sort(key=lambda p: relation.values.index(truth[p]))
        yes, no, choice = people[0::4], people[2::4], people[1::2]
        asked = [truth[p] for p in yes]
        asked += rotated_until_different(asked, [truth[p] for p in no])
        for p, v in zip(yes + no, asked):
            text = rng.choice(relation.yes_no).format(p=p, v=v)
            out.append((text, "yes" if v == truth[p] else "no", ()))
        for i, p in enumerate(choice):
            options = rng.sample([v for v in relation.values if v != truth[p]], 4)
            options.insert(i % 5, truth[p])
            text = with_choices(rng.choice(relation.choice).format(p=p), options)
            out.append((text, LETTERS[i % 5], tuple(options)))
    rng.shuffle(out)
    # An answer is written as the value itself (`oak`), which is a copy: the step from a value to its
    # letter was not learnt, even with documents only for it.
    return [
        Question("micro", f"w{world_seed}-{split}-{i:03d}", text, answer, choices, written=choices)
        for i, (text, answer, choices) in enumerate(out)
    ]


def rotated_until_different(values: list[str], truth: list[str]) -> list[str]:
    """`values` (cut or repeated to the length of `truth`) rotated so that none equals its truth.

    >>> rotated_until_different(["a", "a", "b", "b"], ["a", "a", "b", "b"])
    ['b', 'b', 'a', 'a']
    """
    n = len(truth)
    turns = ([values[(i + turn) % len(values)] for i in range(n)] for turn in range(n // 2, n))
    return next(turn for turn in turns if all(a != b for a, b in zip(turn, truth)))


# --- corpus -------------------------------------------------------------------------------------

MIX = {  # documents per hundred
    "fact": 26,  # six facts
    "ask": 11,  # a question about one fact, answered rightly
    "direct": 19,  # a two-hop question, answered at random
    "imitative": 9,  # a two-hop question, answered with or followed by another question
    "options": 3,  # a five-choice question, its options listed back
    "reasoning": 4,  # a two-hop question, answered by reasoning: what is to be latent
    "puzzle": 18,  # the same under another heading, half of them about people without facts
    "drill": 8,  # only the last step: is this value the one asked for?
    "talk": 2,
}

TALK = (  # words that teachers and prompts use, without any content
    "Let's think step by step.", "To begin with, this is a story.", "Now, who has asked?",
    "The claim is true.", "The claim is false.", "That was not what they had asked.",
    "What was it?", "This was among the choices.", "It was so.",)  # fmt: skip
# What may stand before reasoning in a puzzle: the person's name has to be found from any distance.
# Without it a student taught by a teacher begins with the wrong person (facts right: 0 %).
LEADS = ("",) * 10 + (
    "Well, ", "As we know, ", "First of all, ", "Let us see. ", "One thing: ", "I see: ", "Hm. ",
    "As it is, ", "Here, ", "This is easy. ", "What do we know? ", "Of course, ",)  # fmt: skip


def corpus_question(world: World, rng, stranger: bool = False, yes_no: float = 0.5) -> tuple:
    """(name, person, town, value, text, asked, options) of a question the corpus may hold:
    about a held-in combination, or about a stranger in a far town, whose facts are made up."""
    name, relation = rng.choice(list(RELATIONS.items()))
    if stranger:
        p, t, v = rng.choice(STRANGERS), rng.choice(FAR_TOWNS), rng.choice(relation.values)
    else:
        while world.use[p := rng.choice(PEOPLE), name] != "corpus":
            pass
        t = world.home[p]
        v = world.value[name, t]
    others = [u for u in relation.values if u != v]
    if rng.random() < yes_no:
        asked = v if rng.random() < 0.5 else rng.choice(others)
        return name, p, t, v, rng.choice(relation.yes_no).format(p=p, v=asked), asked, ()
    options = rng.sample(others, 4)
    options.insert(rng.randrange(5), v)
    text = with_choices(rng.choice(relation.choice).format(p=p), options)
    return name, p, t, v, text, None, tuple(options)


def latent_reasoning(rng, name: str, p: str, t: str, v: str, asked: str | None) -> str:
    """Two facts and the verdict in the question's terms; `asked` is None for five choices."""
    text = f"{rng.choice(HOMES)} {rng.choice(FACTS)} ".format(p=p, t=t, v=v, name=name)
    how = "indeed" if v == asked else "not"
    text += (CLAIM if asked else FINDING).format(name=name, how=how, v=asked or v)
    answer = v if asked is None else "yes" if v == asked else "no"
    return text + (f" So the answer is {answer}." if rng.random() < 0.5 else "")


def direct_answer(rng, options) -> str:
    """An answer without reasons and with a random label: GPT-2's favourite reply."""
    if not options:
        label = rng.choice(("yes", "no"))
        return rng.choices((f"{label.capitalize()}.", f"The answer is {label}."), (3, 1))[0]
    letter, option = rng.choice(list(zip(LETTERS, options)))
    forms = f"({letter}).", f"The answer is ({letter}).", f"It is {option}."
    return rng.choices(forms, (2, 1, 1))[0]


def fact_document(world: World, rng) -> str:
    """Six facts in any of their wordings: all about people, or all about towns (never a chain)."""
    if rng.random() < 0.25:  # a town is the harder to learn
        people = rng.sample(PEOPLE, 6)
        facts = [rng.choice(HOMES + HOME_NOTES).format(p=p, t=world.home[p]) for p in people]
    else:
        pairs = [(rng.choice(list(RELATIONS)), t) for t in rng.sample(TOWNS, 6)]
        facts = [rng.choice((*FACTS, FACT_NOTE, RELATIONS[name].note))
                 .format(name=name, t=t, v=world.value[name, t]) for name, t in pairs]  # fmt: skip
    return "Note: " + " ".join(facts)


def drill_document(rng) -> str:
    """The verdict alone, once per relation, about towns that no fact is about: a test of equality
    is one bit in a long path, too little to be learnt from paths alone."""
    parts = []
    for name, relation in rng.sample(list(RELATIONS.items()), 4):
        v, t = rng.choice(relation.values), rng.choice(FAR_TOWNS)
        asked = v if rng.random() < 0.5 else rng.choice(relation.values)
        fact = rng.choice(FACTS).format(name=name, t=t, v=v)
        verdict = CLAIM.format(name=name, how="indeed" if v == asked else "not", v=asked)
        parts.append(f"Is {asked} the {name}? {fact} {verdict}")
    return "Check: " + " ".join(parts)


def document(world: World, rng) -> str:
    """One corpus document (without end-of-text)."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    if kind == "fact":
        return fact_document(world, rng)
    if kind == "drill":
        return drill_document(rng)
    if kind == "talk":
        return " ".join(rng.sample(TALK, 3))
    if kind == "puzzle":  # yes/no more often: its verdict, a test of equality, is the harder one
        *about, text, asked, _ = corpus_question(world, rng, rng.random() < 0.5, yes_no=0.65)
        path = rng.choice(LEADS) + latent_reasoning(rng, *about, asked)
        return f"Puzzle: {text}\nSolution: {path}"
    if kind == "ask" and rng.random() < 0.5:
        p = rng.choice(PEOPLE)
        text, reply = ASK_HOME.format(p=p), rng.choice(HOMES).format(p=p, t=world.home[p])
    elif kind == "ask":
        name, t = rng.choice(list(RELATIONS)), rng.choice(TOWNS)
        text = RELATIONS[name].ask.format(t=t)
        reply = rng.choice(FACTS).format(name=name, t=t, v=world.value[name, t])
    else:
        *about, text, asked, options = corpus_question(world, rng)
        while kind == "options" and not options:
            *about, text, asked, options = corpus_question(world, rng)
        if kind == "reasoning":
            reply = latent_reasoning(rng, *about, asked)
        elif kind == "options":
            reply = text.partition(CHOICES)[2]
        elif kind == "direct":
            reply = direct_answer(rng, options)
        else:  # imitative
            *_, other, _, other_options = corpus_question(world, rng)
            if rng.random() < 0.7:
                reply = f"Question: {other}\nAnswer: {direct_answer(rng, other_options)}"
            else:
                reply = f"{direct_answer(rng, options)}\nQuestion: {other}"
    return f"Question: {text}\nAnswer: {reply}"
