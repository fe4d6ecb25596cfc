"""Answer likelihood: which answer does a student believe after its own reasoning?

For every possible answer a, we take the log-prob of the sentence ` So the answer is {a}.` behind the
prompt and the student's own greedy reasoning, whose closing answer sentence is taken off. The most
likely sentence is the answer. Nothing has to be parsed, so no output is unreadable.

The options of a question share its context, so each question is one row of the batch: the context
once, then the options one after another. An option sees the context and itself.

    context  c0 c1 c2 | So is yes . | So is no .        positions 0 1 2 | 3 4 5 6 | 3 4 5 6
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import score
from sert_min.answers import strip_answer_sentence
from sert_min.gpt2 import GPT2
from sert_min.io.errors import SertError
from sert_min.models import first_broken
from sert_min.prompts import answer_sentence, question_prompt
from sert_min.questions import Question

ROWS = 16  # questions that are scored together


class Tree(NamedTuple):
    """One question's row: a context of `start` tokens and its options behind it."""

    ids: list[int]
    positions: list[int]
    option: list[int]  # which option a token belongs to; -1 for the context
    start: int
    told: list[
        tuple[int, int, int]
    ]  # of each token of an option: (index that predicts it, id, option)


def make_tree(tokenizer, question: Question, text: str, suffix: str, most: int) -> Tree:
    """The row of an output `text`. The end of the reasoning is cut off so that no option ends behind
    `most` tokens. Context and options are tokenised apart: ` So` starts a word, so nothing merges."""
    prompt = tokenizer.encode_prompt(question_prompt(question, suffix))
    reasoning = strip_answer_sentence(text)[0]
    path = tokenizer.encode(" " + reasoning) if reasoning else []
    options = [tokenizer.encode(f" {answer_sentence(question, a)}") for a in question.answers]
    path = path[: max(0, most - len(prompt) - max(map(len, options)))]
    start = len(prompt) + len(path)
    ids, positions, option, told = prompt + path, list(range(start)), [-1] * start, []
    for i, tokens in enumerate(options):
        for n, token in enumerate(tokens):
            told.append((len(ids) - 1 if n else start - 1, token, i))  # the first: by the context
            ids.append(token)
        positions += range(start, start + len(tokens))
        option += [i] * len(tokens)
    return Tree(ids, positions, option, start, told)


def tree_mask(trees: list[Tree]) -> Tensor:
    """bool [B, 1, T, T]: a token sees the context and its own option, up to itself. Padding sees
    itself only, so that no row of the softmax is empty."""
    T = max(len(tree.ids) for tree in trees)
    option = torch.full((len(trees), T), -2)
    for row, tree in enumerate(trees):
        option[row, : len(tree.ids)] = torch.tensor(tree.option)
    seen = (option[:, None, :] == -1) | (option[:, None, :] == option[:, :, None])
    seen &= torch.ones(T, T, dtype=torch.bool).tril()
    seen &= (option != -2)[:, :, None]
    return (seen | torch.eye(T, dtype=torch.bool))[:, None]


@torch.inference_mode()
def answer_logprobs(
    model: GPT2, tokenizer, questions: list[Question], texts: list[str], suffix: str = ""
) -> list[dict[str, float]]:
    """Per question the log-prob of each answer's sentence behind its output `text`, 4 decimals."""
    device, n_vocab = model.wte.weight.device, min(tokenizer.n_vocab, model.config.vocab_size)
    most, weight = model.config.n_positions, model.head_weight[:n_vocab]
    out = []
    for i in range(0, len(questions), ROWS):
        some = list(zip(questions[i : i + ROWS], texts[i : i + ROWS]))
        trees = [make_tree(tokenizer, q, text, suffix, most) for q, text in some]
        T = max(len(tree.ids) for tree in trees)
        ids, positions = torch.zeros(2, len(trees), T, dtype=torch.long)
        for row, tree in enumerate(trees):
            ids[row, : len(tree.ids)] = torch.tensor(tree.ids)
            positions[row, : len(tree.ids)] = torch.tensor(tree.positions)
        mask = tree_mask(trees).to(device)

        def attend(layer, q, k, v, mask=mask):  # [B, T, H, D]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            given = {"scale": 1.0, "enable_gqa": True}
            return F.scaled_dot_product_attention(q, k, v, mask, **given).transpose(1, 2)

        hidden = model(ids.to(device), positions.to(device), attend)  # [B, T, C]
        told = [(row, *t) for row, tree in enumerate(trees) for t in tree.told]
        rows, at, targets = torch.tensor(told, device=device).T[:3]
        logprobs = score(hidden[rows, at], weight, targets).tolist()
        sums = [[0.0] * len(q.answers) for q, _ in some]
        for (row, _, _, option), logprob in zip(told, logprobs):
            sums[row][option] += logprob
        for tree, (q, _), values in zip(trees, some, sums):
            if not all(map(math.isfinite, values)):
                why = first_broken(model, tree.ids[: tree.start])
                raise SertError(
                    f"question {q.id}: an answer's log-prob is NaN or infinite ({why}); check the "
                    "model's weights, or use --dtype fp32"
                )
            out.append({a: round(v, 4) for a, v in zip(q.answers, values)})
    return out


def likelihood_record(question: Question, logprobs: dict[str, float]) -> dict:
    """One line of likelihood.jsonl; ties go to the first answer."""
    chosen = max(logprobs, key=logprobs.__getitem__)
    about = {"task": question.task, "id": question.id, "answer": question.answer}
    result = {"chosen": chosen, "correct": chosen == question.answer}
    return {**about, "logprobs": logprobs, **result}
