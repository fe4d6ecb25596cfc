"""What the micro-world's student does before any self-training, measured on held-out questions.

The world is built so that this table looks like the paper's Figure 2 for GPT-2: all four kinds of
output appear, reasoning is latent, single facts are known, two at once are not.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

from sert_min import filters, prompts
from sert_min.finetune import TrainSettings, encode_example, fit
from sert_min.generate import SampleSettings, sample_paths
from sert_min.gpt2 import load_model
from sert_min.io.hub import read_sert
from sert_min.metrics import grade, greedy
from sert_min.micro import program, world
from sert_min.patterns import pattern_break
from sert_min.questions import Question
from sert_min.tokenizer import load_tokenizer

KINDS = ("direct", "imitative", "options", "reasoning", "other")
SETTINGS = SampleSettings(max_new_tokens=world.PRESET["max_new_tokens"])
CHECKS = ("facts", "relation", "verdict", "gold")


def behaviour(question, text):
    """Which of Figure 2's kinds an output is; reasoning states a fact of this world."""
    stated = "reasoning" if program.check_path(question, text)["stated"] else "other"
    return pattern_break(text, question) or stated


def shares(found, of):
    """{x: share of `found` that is x}."""
    return {x: sum(f == x for f in found) / max(1, len(found)) for x in of}


def sampled(model, tokenizer, questions, settings):
    """25 path records with verdicts per question, as sample.py makes them."""
    records, limits = [], filters.limits(world.PRESET)
    for i in range(0, len(questions), 32):
        block = questions[i : i + 32]
        paths = sample_paths(model, tokenizer, block, settings)
        records += filters.path_records(paths, block, tokenizer, limits)
    return records


def answered(model, tokenizer, questions, cap=SETTINGS.max_new_tokens):
    """Prediction records of greedy outputs."""
    outputs = greedy(model, tokenizer, questions, "", cap)
    return [grade(q, text, finish) for q, (text, finish) in zip(questions, outputs)]


def finetuned(model, tokenizer, questions, epochs):
    """A copy of the model, trained on labels as train.py does it."""
    model, names = copy.deepcopy(model), [q.id for q in questions]
    examples = [encode_example(tokenizer, *prompts.finetune_pair(q)) for q in questions]
    with tempfile.TemporaryDirectory() as folder:
        fit(model, examples, names, Path(folder), TrainSettings(epochs=epochs))
    return model


def report(folder, n=200):
    """Print the table of a student, on n test questions."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    seed = read_sert(folder)["settings"]["world_seed"]
    test, train = world.questions("test", seed)[:n], world.questions("train", seed)
    by_id, facts = {q.id: q for q in test}, world.make_world(seed)

    def line(name, shares):
        print(f"{name:<34}" + "  ".join(f"{k} {v:.1%}" for k, v in shares.items()))

    def checks(name, records):
        found = [program.check_path(by_id[r["id"]], r["text"]) for r in records]
        line(name, {k: sum(c[k] for c in found) / max(1, len(found)) for k in CHECKS})

    def by_form(name, records, right):
        forms = [(bool(by_id[r["id"]].choices), right(r)) for r in records]
        parts = {k: [ok for f, ok in forms if f == x] for k, x in (("yes_no", 0), ("five", 1))}
        line(name, {k: sum(part) / max(1, len(part)) for k, part in parts.items()})

    print(f"world seed {seed}, {len(test)} test questions (never in the corpus)")
    outputs, raw = answered(model, tokenizer, test), replace(SETTINGS, raw=True)
    line("greedy", shares([behaviour(by_id[r["id"]], r["text"]) for r in outputs], KINDS))
    plain = sampled(model, tokenizer, test, raw)
    line("25 plain samples", shares([behaviour(by_id[r["id"]], r["text"]) for r in plain], KINDS))
    asked = [(world.ASK_HOME.format(p=p), t) for p, t in facts.home.items()]
    asked += [(world.RELATIONS[name].ask.format(t=t), v) for (name, t), v in facts.value.items()]
    asked = [Question("micro", str(i), text, a) for i, (text, a) in enumerate(asked)]
    known = [
        r["text"].rstrip(" .").endswith(r["answer"]) for r in answered(model, tokenizer, asked, 16)
    ]
    line("facts known when asked", {"all": sum(known) / len(known)})
    by_form("direct answers right", outputs, lambda r: r["extracted_lenient"] == r["answer"])
    for epochs in (5, 15):
        tuned = answered(finetuned(model, tokenizer, train, epochs), tokenizer, test)
        by_form(f"  after {epochs} epochs on 400 labels", tuned, lambda r: r["correct"])
    paths = sampled(model, tokenizer, test, SETTINGS)
    reasoning = [r for r in paths if behaviour(by_id[r["id"]], r["text"]) == "reasoning"]
    some = len({r["id"] for r in reasoning}) / len(test)
    line("5 x 5 branched samples", {"reasoning": len(reasoning) / len(paths), "questions": some})
    checks("  reasoning paths, right", reasoning)
    checks("selected paths, right", [r for r in paths if r["verdict"] == "selected"])
