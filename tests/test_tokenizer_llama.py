"""tokenizer.py on the tokenizers of SmolLM2, Qwen2 and Llama 3, against the package `tokenizers`."""

import json
import random
import unicodedata

import pytest
import tokenizers
from test_tokenizer import AWKWARD, refused
from tokenizers import Regex, pre_tokenizers, processors

from sert_min.io.vocabulary import END, LLAMA3, QWEN2, byte_alphabet
from sert_min.tokenizer import load_tokenizer

TEXTS = ["the man's 1234 cats, isn't it? It's 15% of 20,000!", "a  b\n\n c 7.5\r\n 日本 ½"] * 3
MORE = ["don't I'LL 123456 x", "\r\n \r\n y", "e\u0301 ﬁ Å", "  12 !1", "a\u00a0\u00a01"]
MORE += ["'s 's1'S"]
START = "<|begin_of_text|>"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
FORMS = {
    "smollm2": [pre_tokenizers.Digits(individual_digits=True), BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES_ALONE],
    "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES_ALONE],
}


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """A BPE trained with each pre-tokenizer, and the folder of its tokenizer.json. `qwen2` composes
    Unicode; `llama3` ignores merges, lists every split of a token, and begins a text with a token."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(FORMS[request.param])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    special = [] if request.param == "llama3" else [END, "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(byte_alphabet(), key=byte_alphabet().get)
    how = {"vocab_size": 420, "initial_alphabet": alphabet, "special_tokens": special}
    texts = TEXTS + [t for t in AWKWARD if request.param != "smollm2"]
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**how))
    if request.param == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    folder = tmp_path_factory.mktemp(request.param)
    raw = json.loads(theirs.to_str())
    if request.param == "smollm2":  # bytes without a token, as 21 of SmolLM2's
        for byte in (0xF4, 0xFF):
            raw["model"]["vocab"].pop(next(c for c, b in byte_alphabet().items() if b == byte))
    if request.param == "llama3":
        vocab = raw["model"]["vocab"]
        made = sorted((t for t in vocab if len(t) > 1), key=vocab.get)
        splits = [[t[:i], t[i:]] for t in made for i in range(1, len(t))]
        merges = [pair for pair in splits if {*pair} <= vocab.keys()]
        raw["model"] |= {"ignore_merges": True, "merges": merges}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        raw["added_tokens"] = [dict(id=len(vocab) + i, content=t, special=True, **plain)
                               for i, t in enumerate((START, END, "<|eot_id|>"))]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if request.param == "llama3":
        start = [(START, theirs.token_to_id(START))]
        template = processors.TemplateProcessing(single=f"{START} $A", special_tokens=start)
        theirs.post_processor = processors.Sequence([processors.ByteLevel(), template])
        theirs.save(str(folder / "tokenizer.json"))
    return theirs, folder


def test_ids_equal_tokenizers(pair):
    """Guards splits, composed Unicode, merge priorities that are ids, and a text's first token."""
    theirs, folder = pair
    ours, rng = load_tokenizer(folder), random.Random(0)
    texts = [*TEXTS, *AWKWARD, *MORE]
    texts += ["".join(rng.choices(AWKWARD + MORE, k=5)) for _ in range(300)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.encode_prompt(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text) or not ours.nfc


def test_special_tokens_end_paths_and_are_seen(pair):
    """Guards special tokens that decode to nothing, that text makes, or that nothing ends at."""
    _, folder = pair
    ours = load_tokenizer(folder)
    names = [b.decode() for b in map(ours.to_bytes.get, ours.ends)]
    assert ours.eot == next(i for i in ours.ends if ours.to_bytes[i] == END.encode())
    assert len(names) == 3 and ours.decode(list(ours.ends)) == "".join(names)
    assert [ours.ends[i] for i in ours.ends if i != ours.eot] == ["special"] * 2
    assert not set(ours.encode("".join(names))) & ours.ends.keys()
    assert ours.decode(ours.encode("".join(names))) == "".join(names)
    (usual, *_, other), plain = ours.ends, ours.eot
    for eos, *wanted in (other, other), ([other, usual], other, usual), (5, 5), (None, plain):
        (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
        ours = load_tokenizer(folder)
        assert {i for i, finish in ours.ends.items() if finish == "eos"} == {*wanted}
        assert ours.eot in wanted
    (folder / "config.json").unlink()


def test_what_is_not_computed_is_refused(pair, tmp_path):
    """Guards silent differences: other expressions, tokens behind a text, merges in another order."""
    raw = json.loads((pair[1] / "tokenizer.json").read_text())
    model = raw["model"]
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}
    steps = [split, {"type": "ByteLevel", "use_regex": False}]
    behind = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": END}}]
    changes = [
        ("pre_tokenizer", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}),
        ("post_processor", {"post_processor": {"type": "TemplateProcessing", "single": behind}}),
        ("normalizer", {"normalizer": {"type": "NFKC"}}),
        ("order of the ids", {"model": model | {"merges": model["merges"][::-1]}}),
    ]
    for named, change in changes if model["ignore_merges"] else changes[:3]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw | change))
        assert named in refused(tmp_path)
