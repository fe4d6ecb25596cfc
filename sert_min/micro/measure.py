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
from sert_min.io.hub import read_sert
from sert_min.metrics import grade, greedy
from sert_min.micro import program, world
from sert_min.models import load_model
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


def sampled(model, tokenizer, questions, settings):
    """25 path records with verdicts per question, as sample.py makes them."""
    paths = sample_paths(model, tokenizer, questions, settings)
    return filters.path_records(paths, questions, tokenizer, filters.limits(world.PRESET))


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

    def line(name, found):  # {what: [is it so?]}
        shares = {k: sum(v) / max(1, len(v)) for k, v in found.items()}
        print(f"{name:<34}" + "  ".join(f"{k} {v:.1%}" for k, v in shares.items()))

    def kinds(records):
        found = [behaviour(by_id[r["id"]], r["text"]) for r in records]
        return {kind: [f == kind for f in found] for kind in KINDS}

    def checks(name, records):
        found = [program.check_path(by_id[r["id"]], r["text"]) for r in records]
        line(name, {k: [c[k] for c in found] for k in CHECKS})

    def by_form(name, records, key):
        right = {"yes_no": [], "five": []}
        for r in records:
            right["five" if by_id[r["id"]].choices else "yes_no"].append(r[key] == r["answer"])
        line(name, right)

    print(f"world seed {seed}, {len(test)} test questions (never in the corpus)")
    outputs = answered(model, tokenizer, test)
    line("greedy", kinds(outputs))
    line("25 plain samples", kinds(sampled(model, tokenizer, test, replace(SETTINGS, raw=True))))
    asked = [(world.ASK_HOME.format(p=p), t) for p, t in facts.home.items()]
    asked += [(world.RELATIONS[name].ask.format(t=t), v) for (name, t), v in facts.value.items()]
    asked = [Question("micro", str(i), text, a) for i, (text, a) in enumerate(asked)]
    known = [(r["text"].rstrip(" ."), r["answer"]) for r in answered(model, tokenizer, asked, 16)]
    line("facts known when asked", {"all": [text.endswith(a) for text, a in known]})
    by_form("direct answers right", outputs, "extracted_lenient")
    for epochs in (5, 15):
        tuned = answered(finetuned(model, tokenizer, train, epochs), tokenizer, test)
        by_form(f"  after {epochs} epochs on 400 labels", tuned, "extracted")
    paths = sampled(model, tokenizer, test, SETTINGS)
    shown = kinds(paths)["reasoning"]
    reasoning = [r for r, ok in zip(paths, shown) if ok]
    some = {r["id"] for r in reasoning}
    line("5 x 5 branched samples", {"reasoning": shown, "questions": [i in some for i in by_id]})
    checks("  reasoning paths, right", reasoning)
    checks("selected paths, right", [r for r in paths if r["verdict"] == "selected"])
