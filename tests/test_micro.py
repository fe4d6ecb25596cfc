"""The micro-world and its student."""

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT

from sert_min import answers, patterns, prompts
from sert_min.io.hub import MICRO, read_sert
from sert_min.metrics import greedy
from sert_min.micro import build, measure, program, world
from sert_min.models import load_model
from sert_min.questions import Question
from sert_min.tokenizer import load_tokenizer

SEED = 100
ALL = [q for split in ("train", "test") for q in world.questions(split, SEED)]


@pytest.fixture(scope="module")
def documents():
    return build.corpus(SEED, 30_000)


def test_no_evaluation_question_or_composed_answer_in_the_corpus(documents):
    """Guards: a person in one line with a value, or the name, of a relation that is asked for."""
    questions = {q.text for q in ALL}
    use = world.make_world(SEED).use
    relation_of = {v: name for name, r in world.RELATIONS.items() for v in (name, *r.values)}
    seen = 0
    for document in documents:
        for line in document.split("\n"):
            words = re.findall(r"\w+", line)
            for p in words:
                for name in {relation_of[w] for w in words if w in relation_of}:
                    assert use.get((p, name), "corpus") == "corpus", line
                    seen += (p, name) in use
            assert not any(part.strip() in questions for part in re.split(r"[A-Z]\w+:", line)), line
    assert seen > 10_000  # the test looks at something


@pytest.mark.parametrize("seed", [0, 7, 100])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_balanced(seed, split):
    """Guards: a student that scores by the value, the relation or the letter alone."""
    questions = world.questions(split, seed)
    assert len(questions) == len({q.id for q in questions}) == 400
    assert len({q.text for q in questions}) == 400
    by_value, letters = {}, Counter()
    for q in questions:
        asked = program.parse_question(q)
        if q.choices:
            letters[q.answer] += 1
            assert len(set(q.choices)) == 5
        else:
            by_value.setdefault((asked.relation, asked.value), Counter())[q.answer] += 1
    assert all(abs(n["yes"] - n["no"]) <= 2 for n in by_value.values())
    assert max(letters.values()) - min(letters.values()) <= 4
    n = sum(map(Counter.total, by_value.values()))
    assert 190 <= n <= 210 and abs(sum(c["yes"] for c in by_value.values()) - n / 2) <= 4


def test_the_same_world_in_every_process():
    """Guards: a draw that depends on hash() or on the order of a set."""
    made = "(world.questions('test', 3), build.corpus(3, 300))"
    code = f"from sert_min.micro import build, world\nprint({made})"
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.check_output([sys.executable, "-c", code], text=True, env=env, cwd=ROOT)
    assert other.strip() == repr((world.questions("test", 3), build.corpus(3, 300)))


def test_teacher_is_right_and_speaks_otherwise_than_the_corpus(documents):
    """Guards: a wrong gold label, a teacher that is wrong, or that has nothing new to teach."""
    told = {re.sub(r"[A-Z]\w+", "X", s) for d in documents for s in re.split(r"(?<=\.) ", d)}
    for q in ALL:
        rationale = program.teacher_rationale(q)
        assert set(program.judge(q, rationale).values()) == {10.0}, rationale
        assert program.check_path(q, rationale)["gold"], rationale
        for sentence in re.split(r"(?<=\.) ", rationale):
            assert re.sub(r"[A-Z]\w+", "X", sentence) not in told
        assert patterns.pattern_break(rationale, q) is None
        assert answers.extract_answer(f"{rationale} {prompts.answer_sentence(q)}", q) == q.answer


def scored(q, text):
    return tuple(program.judge(q, text).values())


def test_judge_on_right_wrong_irrelevant_and_incomplete_texts():
    """Guards: a judge that rewards the form and not the facts."""
    q = next(q for q in ALL if q.answer == "no" and program.parse_question(q).relation == "flag")
    a = program.parse_question(q)
    town = a.world.home[a.person]
    true = a.world.value["flag", town]
    wrong_town = next(t for t in world.TOWNS if a.world.value["flag", t] == a.value)
    home, fact = f"{a.person} lives in {town}.", f"The flag of {town} is {true}."
    right = f" {home} {fact} So the flag is not {a.value} there."
    false = f" {a.person} lives in {wrong_town}. The flag of {wrong_town} is {a.value}."
    false += f" So the flag is indeed {a.value} there."  # follows from it
    tree = f" {home} The tree of {town} is {a.world.value['tree', town]}."
    names = ("facts", "relation", "verdict", "gold")
    for text, scores, checks in (
        (right, (10, 10, 10, 10), (True, True, True, True)),
        (right.replace("not", "indeed"), (10, 10, 5, 10), (True, True, False, False)),
        (false, (10, 10, 7.5, 10), (False, True, True, False)),
        (tree, None, (True, False, False, False)),
    ):
        check = program.check_path(q, text)
        assert tuple(bool(check[name]) for name in names) == checks, text
        assert scores is None or scored(q, text) == scores
    assert scored(q, tree)[1] == 4.0
    assert scored(q, f" {home}")[3] == 3.33  # incomplete
    assert scored(q, " No.") == scored(q, "") == scored(q, " Ducks swim in ponds.") == (0, 0, 0, 0)
    assert scored(q, right + right * 5)[0] < 5  # repetitive


@pytest.fixture(scope="module")
def student():
    return load_model(MICRO), load_tokenizer(MICRO)


def test_student_knows_its_facts_and_answers_directly(student):
    """Guards: garbage weights, or a student whose greedy output reasons already."""
    assert sum(f.stat().st_size for f in MICRO.iterdir()) < 6_000_000
    seed = read_sert(MICRO)["settings"]["world_seed"]
    facts, questions = world.make_world(seed), world.questions("test", seed)[:40]
    asked = [Question("micro", p, world.ASK_HOME.format(p=p), facts.home[p])
             for p in world.PEOPLE[::10]]  # fmt: skip
    said = zip(asked, greedy(*student, asked, "", 12))
    known = [text.rstrip(" .").endswith(q.answer) for q, (text, _) in said]
    assert sum(known) >= 0.95 * len(known)
    said = zip(questions, greedy(*student, questions, "", 48))
    assert sum(program.check_path(q, text)["stated"] > 0 for q, (text, _) in said) <= 2


def test_latent_paths_of_the_student_are_right(student):
    """Guards: a student that has the form of reasoning and not its three skills."""
    questions = world.questions("test", read_sert(MICRO)["settings"]["world_seed"])[:16]
    by_id = {q.id: q for q in questions}
    records = measure.sampled(*student, questions, replace(measure.SETTINGS, samples=2))
    kinds = [measure.behaviour(by_id[r["id"]], r["text"]) for r in records]
    paths = [r for r, kind in zip(records, kinds) if kind == "reasoning"]
    assert len({r["id"] for r in paths}) >= 14
    found = [program.check_path(by_id[r["id"]], r["text"]) for r in paths]
    checks = {k: sum(c[k] for c in found) / len(found) for k in measure.CHECKS}
    assert min(checks["facts"], checks["relation"], checks["verdict"]) > 0.85, checks
