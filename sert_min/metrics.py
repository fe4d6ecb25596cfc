"""Greedy outputs of a student, and the paper's metrics with 95 % intervals [SERT §III-A].

    Acc   the extracted answer equals the gold one (strict, the headline; lenient beside it)
    Fmt   share of outputs that end by themselves, state exactly one answer and do not loop
    Len   words of the whole output            Rep   1 - distinct words / words

The paper gives no formula for Fmt and no unit for Len; these are our readings. An output from which
no answer can be extracted counts as wrong; its answer is never guessed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sert_min.answers import extract_answer, extract_lenient, leading_answer, stated_answers
from sert_min.filters import rep2
from sert_min.generate import GREEDY, Progress, sample_block, silent
from sert_min.gpt2 import GPT2
from sert_min.io.errors import need
from sert_min.prompts import question_prompt
from sert_min.questions import Question, majority

MAX_LOOP = 0.5  # rep-2 over words above which an output counts as severely repetitive


def greedy(
    model: GPT2,
    tokenizer,
    questions: list[Question],
    suffix: str = "",
    max_new_tokens: int = 512,
    rows: int = 64,
    progress: Progress = silent,
    memory: dict | None = None,
) -> list[tuple[str, str]]:
    """(text, finish) of each question's greedy output. Blocks of `rows` questions are decoded
    together; `max_new_tokens` shrinks to what a block's longest prompt leaves of the context.
    `memory` as in sample_block: with one dict for many calls, a GPU's graphs are captured once."""
    outputs, memory = [], {} if memory is None else memory
    for i in range(0, len(questions), rows):
        block = questions[i : i + rows]
        prompts = [tokenizer.encode_prompt(question_prompt(q, suffix)) for q in block]
        room = model.config.n_positions - max(map(len, prompts))
        names, longest = [q.name for q in block], max(prompts, key=len)
        told = f"{names[prompts.index(longest)]} has {len(longest)} tokens and fills the model's context"
        need(room > 0, f"{told} of {model.config.n_positions}; leave it out")
        s = replace(GREEDY, max_new_tokens=min(max_new_tokens, room), rows=len(block))
        drawn = sample_block(model, tokenizer, prompts, names, s, None, progress, memory)
        outputs += [(tokenizer.decode(row.token_ids), row.finish) for row in drawn]
    return outputs


def grade(question: Question, text: str, finish: str | None) -> dict:
    """The prediction record of an output: what it answers, whether that is right, and its form.
    `finish` is "eos" if the output ended by itself, None if that was not recorded."""
    words, stated = text.split(), set(stated_answers(text, question))
    extracted, loop = extract_answer(text, question), rep2(words)
    faults = (
        ("finish not recorded", finish is None),
        ("does not end", finish != "eos"),
        ("states no answer", not stated),
        ("answer not readable", stated == {None}),
        ("states several answers", len(stated) > 1),
        ("severely repetitive", loop > MAX_LOOP),
    )
    reason = next((fault for fault, found in faults if found), "ok")
    return {
        "task": question.task,
        "id": question.id,
        "question": question.text,
        "answer": question.answer,
        "text": text,
        "extracted": extracted,
        "extracted_lenient": extract_lenient(text, question),
        "correct": extracted == question.answer,
        "finish": finish,
        "format_ok": None if finish is None else reason == "ok",
        "reason": reason,
        "words": len(words),
        "rep1": round(1 - len(set(words)) / len(words), 5) if words else 0.0,
        "rep2_words": round(loop, 5),
    }


def share_interval(k: int, n: int) -> tuple[float, float, float]:
    """(share, low, high): Wilson's 95 % score interval of k out of n (Wilson 1927)."""
    if n == 0:
        return math.nan, math.nan, math.nan
    z, p = 1.959964, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # rounding


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval of a mean, normal approximation; one value has none."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = 1.959964 * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def summarize(
    records: list[dict],
    questions: list[Question],
    reasoning: Sequence[bool] = (),
    likelihood: Sequence[dict] = (),
    judges: dict | None = None,
) -> dict:
    """The metrics of prediction records, each as (value, low, high), and the plain counts; also of
    `reasoning` (does an output reason by form?, filters.reasons), `likelihood` (records of
    likelihood.jsonl) and `judges` (name -> summary)."""
    n = len(records)
    formats = [r["format_ok"] for r in records if r["format_ok"] is not None]
    lenient = sum(r["extracted_lenient"] == r["answer"] for r in records)
    begun = [leading_answer(r["text"], q) for q, r in zip(questions, records)]
    turned = sum(None not in (a, r["extracted"]) and a != r["extracted"]
                 for a, r in zip(begun, records))  # fmt: skip
    metrics = {
        "n": n,
        "acc": share_interval(sum(r["correct"] for r in records), n),
        "acc_lenient": share_interval(lenient, n),
        "unparseable": sum(r["extracted"] is None for r in records),
        "contradictory": share_interval(turned, n),  # begins with another answer than it ends with
        "fmt": share_interval(sum(formats), len(formats)),
        "len": mean_interval([r["words"] for r in records]),
        "rep": mean_interval([r["rep1"] for r in records]),
        "majority": majority(questions),
        "reasons": dict(Counter(r["reason"] for r in records).most_common()),
    }
    if reasoning:
        metrics["reasoning"] = share_interval(sum(reasoning), n)
    by = {"": "acc_likelihood", "_per_token": "acc_text_token", "_per_character": "acc_text"}
    for how, name in by.items():
        if right := [r[f"correct{how}"] for r in likelihood if f"correct{how}" in r]:
            metrics[name] = share_interval(sum(right), len(right))
    return metrics | ({"judges": judges} if judges else {})


def without_nan(value):
    """`value` in the form that JSON can hold: None stands for NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
