"""The vocabulary of a model folder: tokenizer.json, or GPT-2's older merges.txt and vocab.json.

Known are the byte-level BPEs of GPT-2, SmolLM2, Qwen2 and Llama 3. What is not computed here is refused
by name. Tokens that merges can't make are *special*: end-of-text, or a chat's `<|im_start|>`.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from sert_min.io.errors import need

END = "<|endoftext|>"
# How a text is split into words, inside which tokens are merged. GPT-2's way: contractions, words,
# numbers, other runs, white space (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# SmolLM2's: each digit apart, then GPT-2's way, for which a digit ends the text before it.
DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
# Qwen2's and Llama 3's, as they stand in their tokenizer.json; numbers of one digit, or up to three.
QWEN2 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
OFF = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")  # in tokenizer.json


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, as {character: byte}: bytes that print as
    themselves, then the others moved up behind U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Vocabulary(NamedTuple):
    """What the files say."""

    ranks: dict[bytes, int]  # the merge priority of each ordinary token
    ids: dict[bytes, int]  # its id in the model; single bytes may have none
    words: dict[str, int]  # ids of added words (`COVID-19`), which are cut out of a text first
    special: dict[str, int]  # ids of the special tokens
    eot: list[int]  # those of end-of-text; the first is what training writes
    pattern: str  # how a text is split into words
    nfc: bool  # is it brought into Unicode's composed form first?
    start: list[int]  # ids that stand before every prompt (Llama 3 has one)


def read_vocabulary(folder: Path, ends: list) -> Vocabulary:
    """The vocabulary from the files that `folder` has. `ends` are the ids of end-of-text; without any
    tokenizer_config.json names it. Damaged files are a ValueError or the like."""
    alphabet, told = byte_alphabet(), read_optional(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        vocab, added, merged, pattern, nfc, start = read_tokenizer_json(folder / "tokenizer.json")
    else:
        paths = [folder / "vocab.json", folder / "merges.txt"]
        there = all(path.exists() for path in paths)
        need(there, f"{folder} has neither tokenizer.json nor merges.txt + vocab.json; add them")
        vocab, merges = read_optional(paths[0]), paths[1].read_text("utf-8-sig")
        merged = merge([m for m in merges.split("\n") if m and not m.startswith("#version")])
        added, pattern, nfc, start = read_added(folder, told), PATTERN, False, ()
        need(alphabet.keys() <= vocab.keys(), "a byte has no token", ValueError)
    added = [t for t in added if t["content"]]
    same = all(vocab.get(t["content"], t["id"]) == t["id"] for t in added)
    need(same, "one token has two ids", ValueError)
    vocab |= {t["content"]: t["id"] for t in added}
    small = all(type(i) is int and 0 <= i < 2**24 for i in vocab.values())
    need(small, "an id is not a small whole number", ValueError)
    need(len(set(vocab.values())) == len(vocab), "two tokens have one id", ValueError)
    # Merge priority: single bytes in the alphabet's order, then what merges make.
    tokens = {bytes(alphabet[c] for c in token): token for token in (*alphabet, *merged)}
    ranks = {as_bytes: rank for rank, as_bytes in enumerate(tokens)}
    ids = {b: vocab[token] for b, token in tokens.items() if token in vocab or len(b) > 1}
    none = [i for i in ends if i not in vocab.values()]
    need(not none, f"{folder}: config.json's eos_token_id {none} is no token of the tokenizer files; "
         "add them (added_tokens.json, say), or set it to the token that ends a text")  # fmt: skip
    end = told.get("eos_token")
    names = [end.get("content") if isinstance(end, dict) else end, END]
    eot = ends or [vocab[name] for name in names if name in vocab][:1]
    need(eot, f"{folder}: config.json names no eos_token_id, and there is no {END}; set it to the token "
         "that ends a text, or choose another model")  # fmt: skip
    words = {t["content"]: t["id"] for t in added if not t.get("special") and t["id"] not in eot}
    for t in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if t.get(flag)]
        need(not flags or t["content"] not in words, f"{folder}: the added word {t['content']!r} with "
             f"{flags} is not supported; choose a model without it")  # fmt: skip
    ordinary = {*ids.values(), *words.values()}
    special = {token: i for token, i in vocab.items() if i not in ordinary}
    start = [vocab[token] for token in start]
    return Vocabulary(ranks, ids, words, special, eot, pattern, nfc, start)


def read_optional(path: Path) -> dict:
    return json.loads(path.read_text("utf-8-sig")) if path.exists() else {}


def read_added(folder: Path, told: dict) -> list[dict]:
    """The tokens that were added to merges.txt and vocab.json, as tokenizer.json lists them. `told` is
    tokenizer_config.json; older ones list none, and then a token is special if a file names it so."""
    listed = [{**t, "id": int(i)} for i, t in (told.get("added_tokens_decoder") or {}).items()]
    roles = json.dumps([told, read_optional(folder / "special_tokens_map.json")])
    for token, i in read_optional(folder / "added_tokens.json").items():
        if i not in [t["id"] for t in listed]:
            special = json.dumps(token) in roles or re.fullmatch(r"<\|.*\|>", token)
            listed.append({"content": token, "id": i, "special": special})
    return listed


def read_tokenizer_json(path: Path) -> tuple:
    """(token ids, added tokens, what merges make by priority, pattern, nfc, start) of the file."""
    raw = json.loads(path.read_text("utf-8-sig"))
    model, normalizer = raw["model"], (raw.get("normalizer") or {}).get("type")
    pattern, start = split_pattern(raw.get("pre_tokenizer") or {}), start_tokens(raw)
    for name, value, fine in (
        ("model.type", model.get("type"), model.get("type") == "BPE"),
        ("normalizer", normalizer, normalizer in (None, "NFC")),
        ("pre_tokenizer", raw.get("pre_tokenizer"), pattern),
        ("post_processor", raw.get("post_processor"), start is not None),
        *((f"model.{name}", model.get(name), not model.get(name)) for name in OFF),
    ):
        need(fine, f"{path}: {name} {str(value)[:60]!r} is not supported; choose a model with the "
             "byte-level BPE of GPT-2, SmolLM2, Qwen2 or Llama 3")  # fmt: skip
    vocab, added = model["vocab"], raw.get("added_tokens", [])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not model.get("ignore_merges"):
        merged = merge(merges)
    else:  # as Llama 3: a token's id is its priority
        by_id = sorted(vocab.keys() - {t["content"] for t in added}, key=vocab.__getitem__)
        merged = [token for token in by_id if len(token) > 1]
        made = [vocab[m.replace(" ", "")] for m in merges]
        need(made == sorted(made), "the merges are not in the order of the ids", ValueError)
    return vocab, added, merged, pattern, normalizer == "NFC", start


def split_pattern(pre: dict) -> str:
    """The regular expression for tokenizer.json's pre_tokenizer; "" if that is none of ours."""
    *first, last = pre.get("pretokenizers", [pre])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ""
    match first, last.get("use_regex", True):
        case [], True:
            return PATTERN
        case [{"type": "Digits", "individual_digits": True}], True:
            return DIGITS
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": found}} as one], False:
            return found if found in (QWEN2, LLAMA3) and not one.get("invert") else ""
    return ""


def start_tokens(raw: dict) -> tuple[str, ...] | None:
    """The tokens that tokenizer.json's post_processor sets before a text; None if it does more."""
    post = raw.get("post_processor")
    start: tuple[str, ...] = ()
    for step in post.get("processors", [post]) if post else ():
        if step["type"] == "TemplateProcessing" and "Sequence" in step["single"][-1]:
            start += tuple(piece["SpecialToken"]["id"] for piece in step["single"][:-1])
        elif step["type"] != "ByteLevel":
            return None
    return start


def merge(merges: list[str]) -> list[str]:
    """The tokens that merge lines "a b" make. Lists for which tiktoken gives other ids than Hugging
    Face are refused.

    tiktoken joins neighbours if their concatenation is a token, Hugging Face if this very pair is a
    merge. The two agree if every token, split by the merges, ends in its own pair. BPE training gives
    only such lists; lists that were edited by hand may not be."""
    pairs = [tuple(m.split(" ")) for m in merges]
    need(all(len(pair) == 2 for pair in pairs), "a merge line is not a pair", ValueError)
    rank = {pair: i for i, pair in enumerate(pairs)}
    for left, right in pairs:
        parts = list(left + right)
        while len(parts) > 2:
            ranks = [rank.get(pair, len(rank)) for pair in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == len(rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        told = f"the other merges never lead to the merge {left} {right}"
        need(parts == [left, right], told, ValueError)
    return [left + right for left, right in pairs]
