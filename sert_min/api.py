"""The method from Python, for notebooks and programs of others: what the scripts do, without their
folders, flags and resuming of samples. The names are exported by `sert_min`, whose docstring shows them
at work; errors that you can mend are sert_min.io.errors.SertError."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from sert_min import filters, finetune, generate, metrics, own, prompts
from sert_min.answers import strip_answer_sentence
from sert_min.filters import select
from sert_min.finetune import TrainSettings, encode_example
from sert_min.generate import SampleSettings
from sert_min.gpt2 import GPT2
from sert_min.io.errors import need
from sert_min.io.files import check_settings, lock_folder
from sert_min.io.hub import find_model, weights_hash
from sert_min.io.machine import pick_device
from sert_min.models import load_model, save_model
from sert_min.patterns import EARLY_KINDS
from sert_min.questions import Question
from sert_min.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Question", "SampleSettings", "TrainSettings", "fit", "greedy_answers", "make_question",
           "open_student", "pairs", "read_questions", "sample_paths", "select"]  # fmt: skip
BLOCK = 32  # questions whose paths are decoded together


def open_student(name: str, device: str = "auto") -> tuple[GPT2, Tokenizer]:
    """(model, tokenizer) of a name, a hub id or a folder, as `--model` takes them; in fp32."""
    folder = find_model(name)
    tokenizer, model = load_tokenizer(folder), load_model(folder, pick_device(device))
    tokenizer.folder = folder  # `fit` copies its files
    return model, tokenizer


def make_question(question: str, answer: str, choices=(), id: str = "") -> Question:
    """A question: with `choices` (2 to 26 texts; the answer is a letter or a text), about yes or no, or
    with a number or a text of its own as answer. A ValueError says what is wrong with it."""
    row = {"question": question, "answer": answer, "choices": list(choices), "id": id}
    return own.make_question(row)


def read_questions(file: str, fields: Mapping[str, str] | None = None) -> list[Question]:
    """All questions of a .jsonl or .csv file (own.py); `fields` maps our field names to the file's."""
    return [q for _, q in own.read_questions(str(file), dict(fields or {}), Path(file).stem)]


def sample_paths(
    model: GPT2,
    tokenizer: Tokenizer,
    questions: list[Question],
    settings: SampleSettings | None = None,
    rules: Mapping | None = None,
) -> list[dict]:
    """25 paths a question, as records of paths.jsonl (docs/usage.md) with their verdicts. `rules` are
    limits by flag name ({"min_perplexity": 3}); the paper's stand for those that are left out."""
    known = [rule.flag for rule in filters.RULES]
    need(set(rules or ()) <= set(known), f"rules are limits by name: {', '.join(known)}")
    limits, memory, records = filters.limits(rules or {}), {}, []
    s = (settings or SampleSettings()).check()
    early = [kind for kind in limits["patterns"] if kind in EARLY_KINDS]
    for i in range(0, len(questions), BLOCK):
        block = questions[i : i + BLOCK]
        sampled = generate.sample_paths(
            model, tokenizer, block, s, early_reject=early, memory=memory
        )
        records += filters.path_records(sampled, block, tokenizer, limits)
    return records


def pairs(records: list[dict], questions: list[Question]) -> list[tuple[str, str]]:
    """(prompt, completion) of each selected path: the path without a closing answer of its own, then the
    gold answer [SERT §II-B]."""
    by_id, found = {q.id: q for q in questions}, []
    for r in records:
        text = strip_answer_sentence(r["text"])[0] if r["verdict"] == "selected" else ""
        if text:
            found.append(prompts.sert_pair(by_id[r["id"]], text))
    return found


def fit(
    model: GPT2,
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    out: str | Path,
    settings: TrainSettings | None = None,
) -> None:
    """Train `model` in place on (prompt, completion) pairs and save it as a Hugging Face folder,
    `out`/last. A repeated call continues from the state in `out`; other pairs or settings, or a model
    from another folder, are refused there."""
    s, out = (settings or TrainSettings()).check(), Path(out)
    need(pairs, "there are no pairs: no path passed; give looser rules, {'min_tokens': 9} say")
    examples = [encode_example(tokenizer, *pair) for pair in pairs]
    longest, context = max(len(ids) for ids, _ in examples), model.config.n_positions
    told = f"a pair has {longest} tokens, the model's context is {context}"
    need(longest <= context, f"{told}; leave that pair out")
    data = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    about = {"data": data, "weights": weights_hash(tokenizer.folder), **asdict(s)}
    names = [str(i) for i in range(len(pairs))]
    with lock_folder(out):
        check_settings(out / "settings.json", about, "choose another folder")
        finetune.fit(model.train(), examples, names, out, s)
        save_model(model.eval(), out / "last", tokenizer.folder, {"method": "sert", "data": data})


def greedy_answers(model: GPT2, tokenizer: Tokenizer, questions: list[Question]) -> list[dict]:
    """Greedy outputs, graded: records with text, extracted (the answer that was read), correct, .."""
    outputs = metrics.greedy(model, tokenizer, questions)
    return [metrics.grade(q, *output) for q, output in zip(questions, outputs)]
