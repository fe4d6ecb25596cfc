"""Answer likelihood: which answer does a student believe after its own reasoning?

For every possible answer a, we take the log-prob of the sentence ` So the answer is {a}.` behind
the prompt and the student's own greedy reasoning, whose closing answer sentence is taken off. The
most likely sentence is the answer. Nothing has to be parsed, so no output is unreadable. A small
model may know the answer but not its letter: so for a question with options we also take, behind
` So the answer is`, the log-prob of each option's *text*, per token and per character (lm-eval
calls the latter acc_norm).

The options of a question share its context, so each question is one row of the batch: the context
once, then the options one after another. An option sees the context and itself.

    context  c0 c1 c2 | So is yes . | So is no .        positions 0 1 2 | 3 4 5 6 | 3 4 5 6
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sert_min.answers import strip_answer_sentence
from sert_min.gpt2 import GPT2
from sert_min.io.errors import SertError, need
from sert_min.kernels import score
from sert_min.models import first_not_finite
from sert_min.prompts import answer_sentence, question_prompt
from sert_min.questions import Question

ROWS = 16  # questions that are scored together


Weighed = list[tuple[float, int]]  # of each answer: its log-prob, and how many tokens it has


class Tree(NamedTuple):
    """One question's row: a context of `start` tokens and its options behind it."""

    ids: list[int]
    positions: list[int]
    option: list[int]  # which option a token belongs to; -1 for the context
    start: int


def make_tree(tokenizer, q: Question, text: str, suffix: str, most: int, by_text=False) -> Tree:
    """The row of an output `text`. The end of the reasoning is cut off so that no option ends
    behind `most` tokens. Context and options are tokenised apart: each starts a word."""
    prompt = tokenizer.encode_prompt(question_prompt(q, suffix))
    reasoning = strip_answer_sentence(text)[0]
    path = tokenizer.encode(" " + reasoning) if reasoning else []
    lead = tokenizer.encode(" So the answer is") if by_text else []
    endings = q.choices if by_text else [answer_sentence(q, answer) for answer in q.answers]
    options = [tokenizer.encode(f" {ending}") for ending in endings]
    n = len(prompt + lead) + max(map(len, options))
    need(n <= most, f"{q.name} has {n} tokens with its longest answer, the model's context is {most}; "
         "leave it out")  # fmt: skip
    context = prompt + path[: most - n] + lead
    start = len(context)
    positions = [*range(start), *(start + i for tokens in options for i in range(len(tokens)))]
    option = [-1] * start + [i for i, tokens in enumerate(options) for _ in tokens]
    return Tree(context + sum(options, []), positions, option, start)


def padded(rows: list[list[int]], fill: int = 0) -> Tensor:
    """[B, T] of rows of several lengths."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def tree_mask(option: Tensor) -> Tensor:
    """bool [B, 1, T, T] of the options [B, T], -2 for padding: a token sees the context and its own
    option, up to itself. Padding sees itself only, so that no row of the softmax is empty."""
    seen = (option[:, None, :] == -1) | (option[:, None, :] == option[:, :, None])
    seen &= (option != -2)[:, :, None]
    return (seen.tril() | torch.eye(option.shape[1], dtype=torch.bool))[:, None]


@torch.inference_mode()
def answer_logprobs(
    model: GPT2, tokenizer, questions: list[Question], texts: list[str], suffix="", by_text=False
) -> list[Weighed]:
    """Per question and answer (log-prob with 4 decimals, tokens) of the answer's sentence behind
    the question's output in `texts`; with `by_text` of its option's text behind ` So the answer
    is`. A log-prob that is not finite is an error."""
    device, n_vocab = model.wte.weight.device, min(tokenizer.n_vocab, model.config.vocab_size)
    most, weight = model.config.n_positions, model.head_weight[:n_vocab]
    found = []
    for i in range(0, len(questions), ROWS):
        some = list(zip(questions[i : i + ROWS], texts[i : i + ROWS]))
        trees = [make_tree(tokenizer, q, text, suffix, most, by_text) for q, text in some]
        ids = padded([tree.ids for tree in trees]).to(device)
        positions = padded([tree.positions for tree in trees]).to(device)
        mask = tree_mask(padded([tree.option for tree in trees], -2)).to(device)

        def attend(layer, q, k, v, mask=mask):  # [B, T, H, D]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=True)
            return out.transpose(1, 2)

        hidden = model(ids, positions, attend)  # [B, T, C]
        # an option's first token is predicted by the context's last, another one by that before it
        told = [(row, t.start - 1 if t.positions[i] == t.start else i - 1, t.ids[i], t.option[i])
                for row, t in enumerate(trees) for i in range(t.start, len(t.ids))]  # fmt: skip
        rows, at, targets = torch.tensor(told, device=device).T[:3]
        logprobs = score(hidden[rows, at], weight, targets).tolist()
        sums = [[(0.0, 0)] * len(q.answers) for q, _ in some]  # of log-probs, and of tokens
        for (row, _, _, option), logprob in zip(told, logprobs):
            total, n = sums[row][option]
            sums[row][option] = total + logprob, n + 1
        for tree, (q, _), values in zip(trees, some, sums):
            if not all(math.isfinite(total) for total, _ in values):
                why = first_not_finite(model, tree.ids[: tree.start])
                why = f"question {q.id}: an answer's log-prob is NaN or infinite ({why}); "
                raise SertError(why + "check the model's weights, or use --dtype fp32")
            found.append([(round(total, 4), n) for total, n in values])
    return found


def weigh_answers(
    model: GPT2, tokenizer, questions: list[Question], texts: list[str], suffix=""
) -> list[dict]:
    """What `answer_logprobs` finds for each question: `sentences`, and `options` by their texts
    where the answers are letters (else [])."""
    found = answer_logprobs(model, tokenizer, questions, texts, suffix)
    lettered = [i for i, q in enumerate(questions) if q.choices and not q.written]
    asked = [questions[i] for i in lettered], [texts[i] for i in lettered]
    options = dict(zip(lettered, answer_logprobs(model, tokenizer, *asked, suffix, by_text=True)))
    return [{"sentences": f, "options": options.get(i, [])} for i, f in enumerate(found)]


def likelihood_record(question: Question, sentences: Weighed, options: Weighed) -> dict:
    """One line of likelihood.jsonl from the log-probs of the answers' sentences and of the options'
    texts (an empty list for yes/no questions); ties go to the first answer."""

    def likeliest(values) -> str:
        return max(zip(question.answers, values), key=lambda pair: pair[1])[0]

    logprobs = [v for v, _ in sentences]
    record = {"task": question.task, "id": question.id, "answer": question.answer}
    record["logprobs"] = dict(zip(question.answers, logprobs))
    record["chosen"] = likeliest(logprobs)
    record["correct"] = record["chosen"] == question.answer
    if options:
        per_token = likeliest(v / n for v, n in options)
        per_character = likeliest(v / len(c) for (v, _), c in zip(options, question.choices))
        record["option_logprobs"] = [v for v, _ in options]
        record["correct_per_token"] = per_token == question.answer
        record["correct_per_character"] = per_character == question.answer
    return record
