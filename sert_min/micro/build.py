"""Builds the micro-world's student from nothing: corpus -> byte-level BPE -> pretraining.

    python -m sert_min.micro build --out DIR     # under 30 minutes on one core

Each document sees only itself and counts its positions from 0, as in a prompt. That matters: "is
this value the one asked for?" is a search for an equal token earlier in the document, and a
neighbour's values in view would spoil it.
"""

import json
import random
import re
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import torch

from sert_min.finetune import loss_sum, n_supervised, pack
from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io.vocabulary import END, PATTERN, byte_alphabet
from sert_min.micro import world
from sert_min.models import save_model
from sert_min.tokenizer import load_tokenizer


def train_bpe(texts: list[str]) -> list[tuple[str, str]]:
    """Merges [(left, right)] in GPT-2's alphabet, the most frequent pair first, until every word
    of the texts that occurs at least 5 times is one token; ties go to the smaller pair."""
    alphabet = {byte: c for c, byte in byte_alphabet().items()}
    counts = Counter(w for text in texts for w in regex.findall(PATTERN, text))
    # a word is a string of symbols with spaces between, as in arXiv 1508.07909
    words = {" ".join(alphabet[b] for b in w.encode()): n for w, n in counts.items() if n >= 5}
    merges = []
    while any(" " in word for word in words):
        pairs = Counter()
        for word, n in words.items():
            for pair in pairwise(word.split()):
                pairs[pair] += n
        merges.append(min(pairs, key=lambda p: (-pairs[p], p)))
        both = re.compile(rf"(?<!\S){re.escape(' '.join(merges[-1]))}(?!\S)")
        words = {both.sub(lambda m: m[0].replace(" ", ""), word): n for word, n in words.items()}
    return merges


def save_bpe(merges: list[tuple[str, str]], folder: Path | str) -> None:
    """vocab.json and merges.txt in GPT-2's format; end-of-text is the last id."""
    tokens = [*byte_alphabet(), *map("".join, merges), END]
    vocab = {token: i for i, token in enumerate(tokens)}
    Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    Path(folder, "merges.txt").write_text("\n".join(lines), "utf-8")


def corpus(world_seed: int, documents: int) -> list[str]:
    """The pretraining documents of a world, in training order."""
    facts, rng = world.make_world(world_seed), random.Random(f"corpus {world_seed} 0")
    return [world.document(facts, rng) for _ in range(documents)]


def pretrain(model, documents, steps, batch):
    """One pass over `documents` (lists of ids, end-of-text included), `batch` of them a step.

    Muon on the blocks' matrices and AdamW on the rest: with AdamW alone the facts were still
    unknown after 1,000 steps (2 % recall), with Muon known after 500 (99 %).
    """
    matrices = [p for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2]
    tables = {"params": [model.wte.weight, model.wpe.weight], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    muon = torch.optim.Muon(matrices, weight_decay=0.02, momentum=0.95)
    adamw = torch.optim.AdamW([tables, vectors], betas=(0.9, 0.98))
    start, total = time.time(), 0.0
    for step in range(steps):
        # warm up over 100 steps, hold, then fall to 2 % over the last three quarters: at the full
        # rate the values of towns were not learnt
        factor = min(1, (step + 1) / 100, 4 / 3 * (steps - step) / steps + 0.02)
        for optimiser, rate in ((muon, 0.02), (adamw, 0.003)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        examples = [(d[:-1], d[1:]) for d in documents[step * batch : (step + 1) * batch]]
        loss = loss_sum(model, pack(examples)) / n_supervised(examples)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        total += loss.item()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}/{steps}  loss {total / 250:.4f}  {time.time() - start:.0f} s")
            total = 0.0


def build(out, world_seed, steps, batch=48):
    """Write the student of a world into folder `out` (Hugging Face form, with sert.json)."""
    start = time.time()
    texts = corpus(world_seed, steps * batch)
    with tempfile.TemporaryDirectory() as folder:
        save_bpe(train_bpe(texts[:60_000]), folder)
        tokenizer = load_tokenizer(Path(folder))
        documents = [tokenizer.encode(text) + [tokenizer.eot] for text in texts]
        # two layers: with four (and one-word towns) labels taught it two facts in one pass
        sizes = dict(n_positions=256, n_embd=160, n_layer=2, n_head=4)
        ends = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
        model = GPT2(GPT2Config(tokenizer.n_vocab, **sizes, **ends)).init_weights_(0)
        print(f"{len(texts):,} documents, {sum(map(len, documents)):,} tokens; vocabulary "
              f"{tokenizer.n_vocab}, {model.n_params():,} parameters")  # fmt: skip
        pretrain(model, documents, steps, batch)
        settings = {"world_seed": world_seed, "steps": steps, "batch": batch, "mix": world.MIX}
        sert = {"method": "pretrain", "task": "micro", "seed": 0, "settings": settings}
        save_model(model, Path(out), Path(folder), sert)
    print(f"built {out} in {time.time() - start:.0f} s")
