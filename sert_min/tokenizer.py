"""Byte-level BPE, built from the model folder's own files with tiktoken as the engine.

Weights and tokenizer come from one folder (io/vocabulary.py reads it). tiktoken's own GPT-2 loader is
not used: it needs the network, and it caches by path, so a model that was rebuilt at the same path
would get the old tokenizer.
"""

import re
import unicodedata
from pathlib import Path

import tiktoken

from sert_min.io.errors import SertError, need
from sert_min.io.files import read_json
from sert_min.io.vocabulary import Vocabulary, read_vocabulary


class Tokenizer:
    """Encoding and decoding for one model. Text from outside never becomes a special token, and a path
    ends where one is drawn."""

    def __init__(self, v: Vocabulary):
        self.eot, self.nfc, self.start = v.eot[0], v.nfc, v.start
        # How a path ends at a special token (the records' `finish`).
        self.ends = dict.fromkeys(v.special.values(), "special") | dict.fromkeys(v.eot, "eos")
        self.to_bytes = {i: token for token, i in v.ids.items()}
        added = {**v.special, **v.words}
        self.to_bytes |= {i: token.encode("utf-8", "replace") for token, i in added.items()}
        self.n_vocab, self.words = max(self.to_bytes) + 1, v.words
        longest_first = sorted(v.words, key=len, reverse=True)
        self._at_words = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        # tiktoken uses ranks as ids. Where the vocabulary numbers tokens otherwise, we translate.
        self._id_of_rank = {rank: v.ids[token] for token, rank in v.ranks.items() if token in v.ids}
        if list(self._id_of_rank.items()) == [(rank, rank) for rank in range(len(v.ranks))]:
            self._id_of_rank = None
        self._bpe = tiktoken.Encoding(
            name="folder", pat_str=v.pattern, mergeable_ranks=v.ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. `<|endoftext|>` in it stays ordinary text; bytes without a token drop."""
        text, ids = unicodedata.normalize("NFC", text) if self.nfc else text, []
        for piece in self._at_words.split(text):
            if piece in self.words:
                ids.append(self.words[piece])
                continue
            ranks, known = self._bpe.encode_ordinary(piece), self._id_of_rank
            ids += ranks if known is None else [known[r] for r in ranks if r in known]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a text."""
        return self.start + self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. Bad UTF-8 becomes U+FFFD, special tokens their names, unknown ids nothing."""
        return b"".join(self.to_bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. All but byte-level BPE is refused."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    eos, size = config.get("eos_token_id"), config.get("vocab_size")
    # GPT-2's 50256 is often left over in the config of a smaller model, which can't draw it.
    ends = [i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int]
    ends = [i for i in ends if not isinstance(size, int) or i < size]
    try:
        tokenizer = Tokenizer(read_vocabulary(folder, ends))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SertError(
            f"{folder}: the tokenizer files are damaged or not byte-level BPE "
            f"({type(e).__name__}: {str(e)[:60]}); download the model again"
        ) from None
    n = tokenizer.n_vocab
    need(
        not isinstance(size, int) or n <= size,
        f"{folder}: the tokenizer has {n} ids, config.json's vocab_size only {size}; use the model's "
        "own tokenizer files",
    )
    return tokenizer
