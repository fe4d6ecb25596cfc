"""Byte-level BPE of GPT-2, built from the model folder's own files with tiktoken as the engine.

Weights and tokenizer come from one folder: merges.txt and vocab.json, or tokenizer.json (which newer
versions of transformers write alone). tiktoken's own GPT-2 loader is not used: it needs the network, and
it caches by path, so a model that was rebuilt at the same path would get the old tokenizer.
"""

import json
from pathlib import Path

import tiktoken

from sert_min.io.errors import SertError
from sert_min.io.files import read_json

END = "<|endoftext|>"
# GPT-2's pre-tokeniser: contractions, words, numbers, other runs, white space
# (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, as {character: byte}: bytes that print as
    themselves, then the others moved up behind U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Tokenizer:
    """Encoding and decoding for one model. Text from outside never becomes a special token."""

    def __init__(self, ranks: dict[bytes, int], ids: dict[bytes, int], eot: int):
        """`ranks` hold the merge priority of each token, `ids` the model's id (usually the same)."""
        self.eot = eot
        self.n_vocab = max(*ids.values(), eot) + 1
        self.to_bytes = {i: token for token, i in ids.items()} | {eot: END.encode()}
        # tiktoken uses ranks as ids. Where the vocabulary numbers tokens otherwise, we translate.
        self._id_of_rank = {rank: ids[token] for token, rank in ranks.items()}
        if all(rank == i for rank, i in self._id_of_rank.items()):
            self._id_of_rank = None
        self._bpe = tiktoken.Encoding(
            name="gpt2-folder", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; `<|endoftext|>` inside it stays ordinary text."""
        ranks = self._bpe.encode_ordinary(text)
        return ranks if self._id_of_rank is None else [self._id_of_rank[r] for r in ranks]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return b"".join(self.to_bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")


def read_tokenizer_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary {token: id} and merge lines "a b" from the files that `folder` has."""
    if (folder / "merges.txt").exists() and (folder / "vocab.json").exists():
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return vocab, [m for m in lines if m and not m.startswith("#version")]
    if not (folder / "tokenizer.json").exists():
        raise SertError(
            f"{folder} has neither merges.txt + vocab.json nor tokenizer.json; add them"
        )
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, pre = raw["model"], raw.get("pre_tokenizer") or {}
    if pre.get("type") == "Sequence" and len(pre["pretokenizers"]) == 1:
        pre = pre["pretokenizers"][0]
    options = {  # what GPT-2's tokenizer leaves at these values
        "model.type": (model.get("type"), "BPE"),
        "model.ignore_merges": (model.get("ignore_merges") or False, False),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or "", ""),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or "", ""),
        "normalizer": (raw.get("normalizer"), None),
        "pre_tokenizer.type": (pre.get("type"), "ByteLevel"),
        "pre_tokenizer.use_regex": (pre.get("use_regex", True), True),
        "pre_tokenizer.add_prefix_space": (pre.get("add_prefix_space", False), False),
    }
    for name, (value, wanted) in options.items():
        if value != wanted:
            raise SertError(
                f"{folder}/tokenizer.json: {name} is {str(value)[:60]!r}, GPT-2's byte-level BPE has "
                f"{wanted!r}; choose a GPT-2 model"
            )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    added = {t["content"]: t["id"] for t in raw.get("added_tokens", [])}
    return {**model["vocab"], **added}, merges


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


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. All but byte-level BPE with <|endoftext|> is refused."""
    try:
        vocab, merges = read_tokenizer_files(folder)
        alphabet = byte_alphabet()
        # Merge priority: single bytes in the alphabet's order, then one rank per merge line.
        if any(m.count(" ") != 1 for m in merges):
            raise ValueError("a merge line is not a pair")
        check_merges(merges)
        tokens = list(alphabet) + [m.replace(" ", "") for m in merges]
        as_bytes = [bytes(alphabet[c] for c in token) for token in tokens]
        if not all(type(i) is int and 0 <= i < 2**24 for i in vocab.values()):
            raise ValueError("an id is not a small whole number")
        if len(set(vocab.values())) < len(vocab):
            raise ValueError("two tokens have one id")
        ids = {b: vocab[token] for b, token in zip(as_bytes, tokens)}
        ranks = {token: rank for rank, token in enumerate(as_bytes)}
        tokenizer = Tokenizer(ranks, ids, vocab[END])
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
