"""Byte-level BPE, built from the model folder's own files with tiktoken as the engine.

Weights and tokenizer come from one folder: tokenizer.json, or GPT-2's older merges.txt and vocab.json.
tiktoken's own GPT-2 loader is not used: it needs the network, and it caches by path, so a model that was
rebuilt at the same path would get the old tokenizer.

Tokens that merges can't make are *special* (end-of-text, or a chat's `<|im_start|>`). Text from outside
never becomes one of them, whatever tokenizer.json says, and a path ends where one is drawn.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tiktoken

from sert_min.io.errors import SertError, need
from sert_min.io.files import read_json

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


class Tokenizer:
    """Encoding and decoding for one model. Text from outside never becomes a special token."""

    def __init__(
        self,
        ranks: dict[bytes, int],
        ids: dict[bytes, int],
        special: dict[str, int],
        eot: list[int],
        pattern: str = PATTERN,
        nfc: bool = False,
        start: Sequence[int] = (),
    ):
        """`ranks` hold the merge priority of each token, `ids` the model's id (usually the same; single
        bytes may have none). `eot` are the ids of end-of-text among the `special` ones; the first is
        what training writes. With `nfc` texts are brought into Unicode's composed form. `start` are
        the ids that stand before every prompt (Llama 3 has one)."""
        self.eot, self.nfc, self.start = eot[0], nfc, list(start)
        # How a path ends at a special token (the records' `finish`).
        self.ends = dict.fromkeys(special.values(), "special") | dict.fromkeys(eot, "eos")
        self.n_vocab = max(*ids.values(), *self.ends) + 1
        self.to_bytes = {i: token for token, i in ids.items()}
        self.to_bytes |= {i: token.encode("utf-8", "replace") for token, i in special.items()}
        # tiktoken uses ranks as ids. Where the vocabulary numbers tokens otherwise, we translate.
        self._id_of_rank = {rank: ids[token] for token, rank in ranks.items() if token in ids}
        if list(self._id_of_rank.items()) == [(rank, rank) for rank in range(len(ranks))]:
            self._id_of_rank = None
        self._bpe = tiktoken.Encoding(
            name="folder", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; `<|endoftext|>` inside it stays ordinary text, and bytes without a
        token are left out."""
        ranks = self._bpe.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        known = self._id_of_rank
        return ranks if known is None else [known[r] for r in ranks if r in known]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a text."""
        return self.start + self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, special tokens their names, and ids
        without a token nothing."""
        return b"".join(self.to_bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")


# --- files ----------------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """What the files say."""

    ids: dict[str, int]  # of all tokens
    merged: list[str]  # the tokens that merges make, in order of priority
    pattern: str = PATTERN
    nfc: bool = False
    start: tuple[str, ...] = ()


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary from the files that `folder` has."""
    if (folder / "tokenizer.json").exists():
        return read_tokenizer_json(folder)
    if not ((folder / "merges.txt").exists() and (folder / "vocab.json").exists()):
        raise SertError(
            f"{folder} has neither tokenizer.json nor merges.txt + vocab.json; add them"
        )
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    if not byte_alphabet().keys() <= vocab.keys():
        raise ValueError("a byte has no token")
    return Vocabulary(vocab, joined([m for m in lines if m and not m.startswith("#version")]))


def read_tokenizer_json(folder: Path) -> Vocabulary:
    """The vocabulary in tokenizer.json; what we do not compute is refused by name."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, normalizer = raw["model"], (raw.get("normalizer") or {}).get("type")
    pattern = split_pattern(raw.get("pre_tokenizer") or {})
    start = start_tokens(raw.get("post_processor"))
    for name, value, fine in (
        ("model.type", model.get("type"), model.get("type") == "BPE"),
        ("normalizer", normalizer, normalizer in (None, "NFC")),
        ("pre_tokenizer", raw.get("pre_tokenizer"), pattern),
        ("post_processor", raw.get("post_processor"), start is not None),
        *((f"model.{name}", model.get(name), not model.get(name)) for name in OFF),
    ):
        need(
            fine,
            f"{folder}/tokenizer.json: {name} {str(value)[:60]!r} is not supported; choose a model "
            "with the byte-level BPE of GPT-2, SmolLM2, Qwen2 or Llama 3",
        )
    added = {t["content"]: t["id"] for t in raw.get("added_tokens", [])}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not model.get("ignore_merges"):
        merged = joined(merges)
    else:  # as Llama 3: a token's id is its priority
        by_id = sorted(model["vocab"].keys() - added.keys(), key=model["vocab"].__getitem__)
        merged = [token for token in by_id if len(token) > 1]
        made = [model["vocab"][m.replace(" ", "")] for m in merges]
        if made != sorted(made):
            raise ValueError("the merges are not in the order of the ids")
    return Vocabulary({**model["vocab"], **added}, merged, pattern, normalizer == "NFC", start)


def split_pattern(pre: dict) -> str:
    """The regular expression for tokenizer.json's pre_tokenizer; "" if that is none of ours."""
    match pre.get("pretokenizers", [pre]):
        case [*first, {"type": "ByteLevel"} as last] if not last.get("add_prefix_space"):
            match first, last.get("use_regex", True):
                case [], True:
                    return PATTERN
                case [{"type": "Digits", "individual_digits": True}], True:
                    return DIGITS
                case [
                    {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} as split
                ], False:
                    return regex if regex in (QWEN2, LLAMA3) and not split.get("invert") else ""
    return ""


def start_tokens(post: dict | None) -> tuple[str, ...] | None:
    """The tokens that tokenizer.json's post_processor sets before a text; None if it does more."""
    start: tuple[str, ...] = ()
    for step in (post or {}).get("processors", [post] if post else []):
        if step["type"] == "TemplateProcessing" and "Sequence" in step["single"][-1]:
            start += tuple(piece["SpecialToken"]["id"] for piece in step["single"][:-1])
        elif step["type"] != "ByteLevel":
            return None
    return start


def joined(merges: list[str]) -> list[str]:
    """The tokens that merge lines "a b" make."""
    if any(m.count(" ") != 1 for m in merges):
        raise ValueError("a merge line is not a pair")
    check_merges(merges)
    return [m.replace(" ", "") for m in merges]


def check_merges(merges: list[str]) -> None:
    """Refuse merge lists for which tiktoken gives other ids than Hugging Face.

    tiktoken joins neighbours if their concatenation is a token, Hugging Face if this very pair is a
    merge. The two agree if every token, split by the merges, ends in its own pair. BPE training gives
    only such lists; lists that were edited by hand may not be."""
    pairs = [tuple(m.split(" ")) for m in merges]
    rank = {pair: i for i, pair in enumerate(pairs)}
    for left, right in pairs:
        parts = list(left + right)
        while len(parts) > 2:
            ranks = [rank.get(pair, len(rank)) for pair in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == len(rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if parts != [left, right]:
            raise ValueError(f"the other merges never lead to the merge {left} {right}")


def end_ids(folder: Path, special: dict[str, int]) -> list[int]:
    """The ids of end-of-text: config.json's, if they are special tokens, else <|endoftext|>'s."""
    path = folder / "config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    found = [i for i in (found if isinstance(found, list) else [found]) if i in special.values()]
    return found or [special[END]]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. All but byte-level BPE is refused."""
    try:
        vocab, merged, pattern, nfc, start = read_vocabulary(folder)
        alphabet = byte_alphabet()
        if not all(type(i) is int and 0 <= i < 2**24 for i in vocab.values()):
            raise ValueError("an id is not a small whole number")
        if len(set(vocab.values())) < len(vocab):
            raise ValueError("two tokens have one id")
        # Merge priority: single bytes in the alphabet's order, then what merges make.
        ranks = {
            bytes(alphabet[c] for c in token): i for i, token in enumerate([*alphabet, *merged])
        }
        ids = {bytes([byte]): vocab[c] for c, byte in alphabet.items() if c in vocab}
        ids |= {bytes(alphabet[c] for c in token): vocab[token] for token in merged}
        ordinary = set(ids.values())
        special = {t: i for t, i in vocab.items() if i not in ordinary}
        eot, start = end_ids(folder, special), [vocab[token] for token in start]
        tokenizer = Tokenizer(ranks, ids, special, eot, pattern, nfc, start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SertError(
            f"{folder}: the tokenizer files are damaged or not byte-level BPE "
            f"({type(e).__name__}: {str(e)[:60]}); download the model again"
        ) from None
    if (folder / "config.json").exists():
        size = read_json(folder / "config.json").get("vocab_size", tokenizer.n_vocab)
        if isinstance(size, int) and size < tokenizer.n_vocab:
            raise SertError(
                f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, config.json's vocab_size "
                f"only {size}; use the model's own tokenizer files"
            )
    return tokenizer
