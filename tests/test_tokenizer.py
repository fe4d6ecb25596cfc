"""tokenizer.py against transformers' GPT2Tokenizer, trained BPEs, any text, and damaged files."""

import json
import random
import re
import shutil

import pytest
import tokenizers
import transformers
from conftest import make_tiny_model, refuses, shared, write_tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from sert_min import tasks
from sert_min.io.vocabulary import END
from sert_min.models import load_model, save_model
from sert_min.tokenizer import load_tokenizer

VOCAB = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"  # names in tiktoken's cache
MERGES_FILE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
IDS = st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 300), max_size=30)
AWKWARD = [
    "", " ", "  ", "\n", "\t\n  x", "a\u2028b\u0085c", "\x00\x7f\xad\u00a0", "é e\u0301 ß",
    "日本語 かな", "🙂👍🏽 flags 🇩🇪", "I'm you'LL we've 'tis", "3.14 1,000 ½ ٣", "#version: 0.2",
    "Question: Is it?\nAnswer:", " yes\r\n\r\n no ", 35 * "a", "Ġ Ċ"]  # fmt: skip


def theirs(folder) -> transformers.GPT2Tokenizer:
    return transformers.GPT2Tokenizer(*(f"{folder}/{n}" for n in ("vocab.json", "merges.txt")))


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_ids_equal_transformers(tmp_path, step):
    """Of the 13,252 real questions (each 20th), bare and as prompts, and of awkward text."""
    splits = [(t, s) for t in ("strategy_qa", "commonsense_qa") for s in ("train", "test")]
    texts = [q.text for split in splits for q in tasks.load(*split, shared("data"))]
    assert len(texts) == 2290 + 9741 + 1221
    texts = texts[::step]
    prompts = [f"Question: {t}\nAnswer:" for t in texts]
    texts = [t.split(" Answer choices: ")[0] for t in texts] + prompts
    texts += AWKWARD + ["".join(random.Random(i).choices(AWKWARD, k=6)) for i in range(400)]
    (tmp_path / "old").mkdir()
    shutil.copy(shared("tiktoken", VOCAB), tmp_path / "old/vocab.json")
    shutil.copy(shared("tiktoken", MERGES_FILE), tmp_path / "old/merges.txt")
    wanted = theirs(tmp_path / "old")(texts)["input_ids"]
    theirs(tmp_path / "old").save_pretrained(tmp_path)  # tokenizer.json alone
    assert not (tmp_path / "merges.txt").exists()
    for folder in (tmp_path / "old", tmp_path):
        ours = load_tokenizer(folder)
        assert (ours.n_vocab, ours.eot) == (50257, 50256)
        for text, ids in zip(texts, wanted):
            assert ours.encode(text) == ids and ours.decode(ids) == text


@given(st.text(st.characters(), max_size=40), IDS)  # lone surrogates too
def test_any_text_makes_the_round_trip_and_any_ids_decode(tokenizer, text, ids):
    """Guards tiktoken's KeyError and OverflowError; a lone surrogate comes back as U+FFFD."""
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    back = tokenizer.decode(tokenizer.encode(text))
    assert back == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("text", [
    " " * 200_000, "the" * 70_000, "\n \n" * 60_000, "^" * 200_000, f"a {END} b{END}",
], ids=str.__len__)  # fmt: skip
def test_long_runs_are_fast_and_the_end_in_text_stays_text(text, tokenizer, small_json):
    """Guards quadratic time (minutes), a backtracking limit, and an end that text injects."""
    for ours in (tokenizer, load_tokenizer(small_json)):
        ids = ours.encode(text)
        assert ours.eot not in ids and ours.decode(ids) == text and ours.decode([ours.eot]) == END


def train_bpe(folder, texts, size, form):
    """An ordinary BPE of the `tokenizers` package, in either form of files."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, min_frequency=1, special_tokens=[END])
    if form == "tokenizer.json":
        bpe.save(str(folder / form))
    else:
        bpe.save_model(str(folder))
    return bpe


@pytest.mark.parametrize("form", ["merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("alphabet", ["ab", "abc ", "aé 日1'"])
def test_trained_bpes_agree_with_transformers(form, alphabet, tmp_path):
    """Guards tiktoken's merging by the joined token, not by the pair, and ranks used as ids."""
    rng = random.Random(alphabet)
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(1500)]
    bpe = train_bpe(tmp_path, texts[:500], 900, form)
    ours = load_tokenizer(tmp_path)
    assert ours.eot == 0 and ours.n_vocab > 500
    for text in texts[500:]:
        assert ours.encode(text) == bpe.encode(text).ids


def test_merges_that_tiktoken_reads_otherwise_are_refused(tmp_path):
    """Guards the one case in which the engines differ: `abc` is a + bc, which no merge allows."""
    for merges in (["b c", "a b", "ab c"], ["a b", "b c", "ab c", "a bc"]):
        write_tiny_tokenizer(tmp_path, list(dict.fromkeys(merges)))
        refuses("never lead to the merge", load_tokenizer, tmp_path)


def refused(folder) -> str:
    return refuses("choose|again|add them", load_tokenizer, folder)


@pytest.fixture(scope="module")
def small_json(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-json")
    train_bpe(folder, ["some words, some more words"], 300, "tokenizer.json")
    return folder


@pytest.mark.parametrize("changes", [
    {"model.type": "WordPiece"},
    {"model.type": "Unigram", "model.vocab": [["a", 0.5]]},
    {"model.byte_fallback": True},
    {"model.end_of_word_suffix": "</w>"},
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}},  # sentencepiece
    {"pre_tokenizer.use_regex": False},
    {"pre_tokenizer.add_prefix_space": True},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}},
])  # fmt: skip
def test_other_tokenizers_are_refused_by_name(changes, small_json, tmp_path):
    """Guards ids that differ silently: everything but GPT-2's byte-level BPE is refused."""
    raw = json.loads((small_json / "tokenizer.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        part, _, key = name.rpartition(".")
        (raw[part] if part else raw)[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert re.search("is not supported.*byte-level BPE", refused(tmp_path))


@pytest.mark.parametrize("name, old, new", [
    *(("vocab.json", None, text) for text in ("", "[1, 2]", "[" * 100_000)),
    ("vocab.json", "}", ""), ("vocab.json", END, "<|end|>"), ("vocab.json", '"he": 256, ', ""),
    *(("vocab.json", '"he": 256', f'"he": {value}') for value in
      ("9999999999999999999999", 2**31, -1, 255, '"256"', "true")),
    *(("merges.txt", "h e\n", text) for text in
      ("h e x\n", "he\n", "h ▁\n", "h  e\n", "", "h e\nq q\n", "h \udcff\n")),
    *(("tokenizer.json", None, text) for text in ("{}", '{"model": 3}', "null", '{"model": {')),
])  # fmt: skip
def test_damaged_files_are_refused(name, old, new, tmp_path):
    """Guards tracebacks, and ids without a meaning, from damaged files."""
    if name != "tokenizer.json":
        write_tiny_tokenizer(tmp_path)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert old is None or old in text
        new = new if old is None else text.replace(old, new)
    (tmp_path / name).write_bytes(new.encode("utf-8", "surrogateescape"))
    refused(tmp_path)


def test_windows_line_ends_missing_files_and_another_model(tmp_path):
    """Guards CRLF of git, somebody else's vocabulary, and an index error in a smaller embedding."""
    folder = make_tiny_model(tmp_path / "m", vocab_size=260)
    refuses("269 ids, config.json's vocab_size only 260", load_tokenizer, folder)
    assert load_tokenizer(make_tiny_model(tmp_path / "padded", vocab_size=320)).n_vocab == 269
    write_tiny_tokenizer(tmp_path)
    wanted = load_tokenizer(tmp_path).encode("the yes")
    merges = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).encode("the yes") == wanted
    (tmp_path / "vocab.json").unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "has neither" in refused(folder)


CHAT = {"<|im_start|>": 269, "<|im_end|>": 270}  # behind the tiny vocabulary
WORDS = {"COVID-19": 269, "<company>": 270, "COVID": 271, "C++": 272, "日本": 273, "New York": 274}
END_IS = {"eos_token": "<|im_end|>"}


def listed(special: bool, tokens: dict, **flags) -> dict:
    """`tokens` as newer files list them."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags
    tokens = {str(i): {"content": t, "special": special, **flags} for t, i in tokens.items()}
    return {"added_tokens_decoder": tokens}


def add_files(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("files, eot", [
    ({"added_tokens": CHAT, "config": {"eos_token_id": 270}}, 270),
    ({"added_tokens": CHAT, "config": {"eos_token_id": [270, 268]}}, 270),
    ({"added_tokens": CHAT, "special_tokens_map": END_IS, "tokenizer_config": END_IS}, 270),
    ({"tokenizer_config": listed(True, CHAT) | {"eos_token": {"content": "<|im_end|>"}}}, 270),
    ({"tokenizer_config": listed(False, {"<|im_start|>": 269}), "added_tokens": CHAT,
      "config": {"eos_token_id": 270, "vocab_size": 271}}, 270),
    ({"added_tokens": CHAT, "config": {"eos_token_id": 50256, "vocab_size": 271}}, 268),
    ({"added_tokens": CHAT, "config": {"eos_token_id": 10}}, 10),  # an ordinary one: "+"
])  # fmt: skip
def test_added_tokens_and_the_end_of_text(files, eot, tmp_path):
    """Guards a ChatML GPT-2, which never ended here, and a training that writes another end."""
    assert write_tiny_tokenizer(tmp_path) == 269
    add_files(tmp_path, **files)
    ours = load_tokenizer(tmp_path)
    assert (ours.eot, ours.ends[eot], ours.n_vocab) == (eot, "eos", 271)
    assert ours.decode([269, 270]) == "<|im_start|><|im_end|>" and 270 in ours.ends
    assert 270 not in ours.encode("<|im_end|>") and 268 in ours.ends


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_added_words_are_cut_out_as_in_transformers(form, tmp_path):
    """Guards other ids than in training, and a path that ends at a word."""
    write_tiny_tokenizer(tmp_path)
    exact = theirs(tmp_path)
    exact.add_tokens(list(WORDS))
    if form == "tokenizer.json":
        exact.save_pretrained(tmp_path)
    elif form == "added_tokens.json":
        add_files(tmp_path, added_tokens=WORDS)
    else:
        add_files(tmp_path, tokenizer_config=listed(False, WORDS, normalized=True))
    ours, rng = load_tokenizer(tmp_path), random.Random(0)
    assert list(ours.ends) == [268]
    pieces = [*WORDS, " ", "the yes", "COVI", "New", "-19s"]
    for text in ["", *WORDS, *("".join(rng.choices(pieces, k=5)) for _ in range(99))]:
        assert ours.encode(text) == exact(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("files, named", [
    ({"tokenizer_config": listed(False, {"<mask>": 269}, lstrip=True)}, r"'<mask>' with \['lstrip'\]"),
    ({"tokenizer_config": listed(False, {"AIDS": 269}, single_word=True)}, "'AIDS' with .*single_word"),
    ({"config": {"eos_token_id": 269, "vocab_size": 271}}, r"eos_token_id \[269\] is no token.*add them"),
    ({"config": {"eos_token_id": [268, 300]}}, r"eos_token_id \[300\] is no token"),
    ({"added_tokens": {"é": 269}}, "one token has two ids"),
    ({"added_tokens": {"xx": 3}}, "two tokens have one id"),
])  # fmt: skip
def test_what_added_tokens_ask_for_is_refused_by_name(files, named, tmp_path):
    write_tiny_tokenizer(tmp_path)
    add_files(tmp_path, **files)
    assert re.search(named, refused(tmp_path))


def test_a_saved_model_keeps_its_end(tmp_path):
    """Guards a folder with two different ends: transformers must end where training did."""
    folder = make_tiny_model(tmp_path / "m", vocab_size=271)
    config = json.loads((folder / "config.json").read_text())
    add_files(folder, added_tokens=CHAT, special_tokens_map=END_IS, tokenizer_config=END_IS)
    for told, kept in ((270, 270), ([268, 270], [268, 270]), (None, 270), (50256, 270)):
        add_files(folder, config=config | {"eos_token_id": told})
        save_model(load_model(folder), tmp_path / "new", folder, {})
        assert json.loads((tmp_path / "new/config.json").read_text())["eos_token_id"] == kept
        assert load_tokenizer(tmp_path / "new").eot == load_tokenizer(folder).eot
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "new").eos_token == "<|im_end|>"
