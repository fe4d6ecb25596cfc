"""What the micro-world's student does before any self-training, measured on held-out questions.

    python -m sert_min.micro report [--model DIR] [--questions 200] [--world-seed N]

The world is built so that this table looks like the paper's Figure 2 for GPT-2: all four kinds of
output appear, reasoning is latent, single facts are known, two at once are not.
"""

import copy
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from sert_min import filters, patterns, prompts
from sert_min.finetune import TrainSettings, encode_example, fit
from sert_min.generate import SampleSettings, sample_paths
from sert_min.io.hub import read_sert
from sert_min.metrics import grade, greedy
from sert_min.micro import program, world
from sert_min.models import load_model
from sert_min.questions import Question
from sert_min.tokenizer import load_tokenizer

KINDS = ("direct", "imitative", "options", "reasoning", "other")
SETTINGS = SampleSettings(max_new_tokens=world.PRESET["max_new_tokens"])
LIMITS = filters.limits(world.PRESET)


def behaviour(question, text):
    """Which of Figure 2's kinds an output is; reasoning states a fact of this world."""
    broken = patterns.pattern_break(text, question)
    if broken:
        return broken
    return "reasoning" if program.check_path(question, text)["stated"] else "other"


def sampled(model, tokenizer, questions, settings):
    """25 path records with verdicts per question, as sample.py makes them."""
    records = []
    for i in range(0, len(questions), 32):
        block = questions[i : i + 32]
        paths = sample_paths(model, tokenizer, block, settings)
        records += filters.path_records(paths, block, tokenizer, LIMITS)
    return records


def recall(model, tokenizer, facts):
    """Share of the facts (homes, town values) that the student states rightly when asked."""
    asked = [(world.ASK_HOME.format(p=p), t) for p, t in facts.home.items()]
    asked += [(world.RELATIONS[name].ask.format(t=t), v) for (name, t), v in facts.value.items()]
    questions = [Question("micro", str(i), text, t) for i, (text, t) in enumerate(asked)]
    outputs = greedy(model, tokenizer, questions, "", 16)
    right = [text.rstrip(" .").endswith(q.answer) for q, (text, _) in zip(questions, outputs)]
    n = len(facts.home)
    return sum(right[:n]) / n, sum(right[n:]) / (len(right) - n)


def finetuned(model, tokenizer, pairs, epochs):
    """A copy of the model, trained on (prompt, completion) pairs as train.py does it."""
    model, names = copy.deepcopy(model), [str(i) for i in range(len(pairs))]
    examples = [encode_example(tokenizer, *pair) for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        fit(model, examples, names, Path(folder), TrainSettings(epochs=epochs))
    return model


def accuracy(model, tokenizer, questions, by="correct"):
    """Shares right of yes/no and five-choice questions, greedy, read strictly or leniently."""
    outputs = greedy(model, tokenizer, questions, "", SETTINGS.max_new_tokens)
    records = [grade(q, text, finish) for q, (text, finish) in zip(questions, outputs)]
    right = [r["correct"] if by == "correct" else r["extracted_lenient"] == r["answer"]
             for r in records]  # fmt: skip
    parts = [[ok for ok, q in zip(right, questions) if bool(q.choices) == form] for form in (0, 1)]
    return [sum(part) / len(part) for part in parts]


def path_checks(by_id, records):
    """Shares of records with right facts, the relation asked for, a verdict that follows, gold."""
    checks = [program.check_path(by_id[r["id"]], r["text"]) for r in records]
    n = max(1, len(checks))
    return {k: sum(c[k] for c in checks) / n for k in ("facts", "relation", "verdict", "gold")}


def report(folder, n=200, world_seed=None, epochs=(5, 15), log=print):
    """Log the table line by line; returns its numbers as a flat dictionary of shares."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    seed = read_sert(folder)["settings"]["world_seed"] if world_seed is None else world_seed
    test, train = (world.questions(split, seed) for split in ("test", "train"))
    test = test[:n]
    by_id = {q.id: q for q in [*test, *train]}
    out = {}

    def line(name, **shares):
        out.update({f"{name.strip()}: {k}": v for k, v in shares.items()})
        log(f"{name:<34}" + "  ".join(f"{k} {v:.1%}" for k, v in shares.items()))

    log(f"world seed {seed}, {len(test)} test questions (never in the corpus)")
    outputs = greedy(model, tokenizer, test, "", SETTINGS.max_new_tokens)
    line("greedy", **shares(behaviour(q, text) for q, (text, _) in zip(test, outputs)))
    raw = sampled(model, tokenizer, test, replace(SETTINGS, raw=True))
    line("25 plain samples", **shares(behaviour(by_id[r["id"]], r["text"]) for r in raw))
    home, value = recall(model, tokenizer, world.make_world(seed))
    line("facts known when asked", homes=home, values=value)
    yes_no, choice = accuracy(model, tokenizer, test, "lenient")
    line("direct answers right", yes_no=yes_no, five_choice=choice)
    for e in epochs:
        tuned = finetuned(model, tokenizer, [prompts.finetune_pair(q) for q in train], e)
        yes_no, choice = accuracy(tuned, tokenizer, test)
        line(f"  after {e} epochs on 400 labels", yes_no=yes_no, five_choice=choice)
    paths = sampled(model, tokenizer, test, SETTINGS)
    reasoning = [r for r in paths if behaviour(by_id[r["id"]], r["text"]) == "reasoning"]
    line("5 x 5 branched samples", reasoning=len(reasoning) / len(paths),
         questions_with_any=len({r["id"] for r in reasoning}) / len(test))  # fmt: skip
    line("  reasoning paths, right", **path_checks(by_id, reasoning))
    for form, name in ((False, "yes/no"), (True, "five-choice")):
        part = [r for r in reasoning if bool(by_id[r["id"]].choices) == form]
        line(f"    {name}", **path_checks(by_id, part))
    selected = [r for r in paths if r["verdict"] == "selected"]
    true = [r for r in selected if behaviour(by_id[r["id"]], r["text"]) == "reasoning"]
    line("selected", questions=len(selected) / len(test), reasoning=len(true) / len(selected))
    line("  selected paths, right", **path_checks(by_id, selected))
    return out


def shares(kinds):
    """Share of each kind, in the order of KINDS."""
    counts = Counter(kinds)
    return {k: counts[k] / counts.total() for k in KINDS}
