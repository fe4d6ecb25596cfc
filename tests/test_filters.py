"""The filter rules: labelled strings, numbers by hand, and what early rejection stands on."""

import argparse
import math

import pytest
from conftest import read_from, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from sert_min import filters, patterns
from sert_min.patterns import broken_kinds, earliest, pattern_break, pattern_breaks
from sert_min.questions import Question
from sert_min.report import console
from sert_min.tokenizer import load_tokenizer

CHOICES = ("bank", "library", "department store", "mall", "new york")
FIVE = Question("commonsense_qa", "q", "Where is a revolving door of use?", "A", CHOICES)
YES_NO = Question("strategy_qa", "7", "Would a pear sink in water?", "no")
OPEN = {"patterns": (), "min_tokens": 0, "max_rep2": 1.0, "min_perplexity": 0.0}
ALL = {"patterns": patterns.PATTERN_KINDS}

LABELLED = {  # question -> the verdict on a finished path -> such paths
    FIVE: {
        "imitative": [" The bank.\n\nQuestion: Where do people keep money?\nAnswer: In a bank.",
                      " Question: bank, library, mall"],  # of several kinds the earliest decides
        "options": [" (A) bank, (B) library, (C) department store, (D) mall, (E) new york",
                    " bank, library, mall\nQuestion: What?",  # of several kinds the earliest
                    # by label
                    " (B) or (C)", " (a) bank\n(b) library\n", " A. bank\nB. library\nC. mall",
                    " (A) a school, (B) a church, (C) a park. I would choose the church.",
                    " 1. bank 2. library",
                    # by text
                    " bank, library, department store, mall, new york", " bank library mall",
                    " It could be a bank, a library or a mall, and we must choose.",
                    " The options are bank and library. The first fits.",
                    ' "bank", "library", "mall"', " Department  Store / New York / Mall",
                    " Bank. Library. Mall. New York."],
        "direct": [" The answer is a library.", " (B)", " D: mall", " New York",
                   " The best answer is option C."],
        None: [" People carry money in and out, and the guards watch the door. So a bank.",
               " Questions: none. It keeps the heat in, which a bank wants.",
               " (B) library (B) library (B) library", " A riverbank, library or mallard.",
               " (A) is safe. People bring money there every day of the week. (B) is not.",
               " There is a door in every bank or library where people come and go.",
               " A library is quiet. A bank is not. A mall is too large for such a door.",
               " The bank, the bank, the bank.", " A bank is a place where people keep money",
               " The answer is (B) because it is quiet there.", ""],
    },
    YES_NO: {
        "imitative": [" No.\n\nQuestion: Would a stone sink?", " My Answer: no, since it floats."],
        "options": [" (A) sinks, (B) floats", " Yes/No. It floats.",
                    ' It is a simple "yes" or "no" thing.'],
        "direct": [" No", ' So the answer is probably "no".'],
        None: [" The question is how dense it is. The answer depends on water.", " North",
               " Yes, no doubt, since it is light and a light thing floats.",
               " No. It is less dense than water."],
    },
}  # fmt: skip


@read_from(LABELLED)
def test_labelled_strings(question, text, answer):
    """Guards the definitions: prose that names options must stay, lists must go."""
    assert pattern_break(text, question) == answer


def test_a_text_at_the_end_is_not_yet_a_word():
    """Guards early rejection of `mallard` at `mall`: only an ended text confirms the last word; and
    U+FFFD at a cut inside a letter being taken for the end of `mall`."""
    text = " bank, library, mall"
    assert pattern_breaks(text, FIVE, final=False) == {}
    assert pattern_breaks(text, FIVE) == {"options": len(text)}
    assert pattern_breaks(text + " x", FIVE, final=False) == {"options": len(text) + 1}
    assert pattern_breaks(text + "ard", FIVE) == {}
    assert pattern_breaks(" No.", YES_NO, final=False) == {}  # a second sentence may come
    half = [text.encode(), "é".encode()[:1], "é".encode()[1:]]
    assert not broken_kinds(half[:2], FIVE, final=False) and not broken_kinds(half, FIVE)


def test_ties_in_one_token_go_by_kind():
    """Guards a verdict that depends on characters inside a token, which a sampler never sees, and a
    kind that is off but still hides another behind it."""
    tokens = [b" bank,", b" library,", b" mall Question:"]
    assert broken_kinds(tokens, FIVE) == {"imitative": 2, "options": 2}
    assert earliest(broken_kinds(tokens, FIVE), patterns.PATTERN_KINDS) == "imitative"
    assert pattern_break(patterns.decode(tokens), FIVE) == "options"
    text = " Question: bank, library, mall"
    assert pattern_break(text, FIVE, ("options", "direct")) == "options"


PIECES = st.sampled_from(
    ["bank", "library", "department store", "department", " store", "mall", "new york", "yes", "no",
     "(A)", "(b)", "(C", ")", "A.", "B)", "Question", ":", "Answer:", "Question:", "the", " a ", " ",
     "\n", ", ", ". ", ".", "!", " or ", " and ", "/", "-", '"', "’", "is", "é", "—", "s", "1.",
     "The answer is ", "options are "])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=60)
OTHER = ("bus stop", "bus", "library", "stop", "yes (A)")
EMPTY = Question("x", "s", "", "A", ("",) * 5)
QUESTIONS = st.sampled_from([FIVE, YES_NO, Question("commonsense_qa", "r", "", "A", OTHER), EMPTY])


@settings(max_examples=250)
@given(TEXTS, TEXTS, QUESTIONS)
def test_a_break_is_never_mended_and_comes_as_early_as_possible(text, more, question):
    """Guards early rejection: a row that was stopped must be one that the full text drops too, for
    the same kind at the same place; and a place behind the character that made it certain."""
    found = pattern_breaks(text, question, final=False)
    longer = pattern_breaks(text + more, question, final=False)
    final = pattern_breaks(text + more, question)
    for kind, end in found.items():
        assert longer[kind] == final[kind] == end
        assert pattern_breaks(text[:end], question, final=False)[kind] == end
        assert kind not in pattern_breaks(text[: end - 1], question, final=False)


@settings(max_examples=200)
@given(TEXTS, QUESTIONS, st.lists(st.integers(1, 6), max_size=60))
def test_broken_kinds_equal_looking_after_every_token(text, question, sizes):
    """Guards the map from characters to tokens, with letters split over tokens."""
    data, tokens = text.encode("utf-8", "surrogatepass"), []
    for size in sizes + [len(data)]:
        if data:
            tokens.append(data[:size])
            data = data[size:]
    first: dict[str, int] = {}
    for n in range(1, len(tokens) + 1):
        for kind in pattern_breaks(patterns.decode(tokens[:n]), question, final=False):
            first.setdefault(kind, n - 1)
    assert broken_kinds(tokens, question, final=False) == first
    final = broken_kinds(tokens, question)
    assert {kind: final[kind] for kind in first} == first


@pytest.mark.parametrize("text, end", [
    (" It| rains|.| So| we", 3),
    (" It| rains|.| So|.", 5),
    (' He| said| "|no|."| Then', 5),  # the closing quote belongs to it
    (" It| costs| 3|.|5| now", 6),  # no white space after the full stop
    (" no| sentence", 2),  # none: stays whole
    (" Why|?|!|\n|\n|Be", 3),
    (" One|. Two|. Thr", 3),  # the token that holds the end is kept whole
])  # fmt: skip
def test_trim_to_sentence(text, end):
    """Guards cutting one token short or long; a branch token in front is no sentence of the path."""
    tokens = text.encode().split(b"|")
    assert filters.trim_to_sentence(tokens, 0) == end
    assert filters.trim_to_sentence([b".", *tokens], 1) == end + 1


def test_rep2_and_perplexity_by_hand():
    """Guards counting tokens (or words) for bigrams, the sign, the log base, and the empty path."""
    assert filters.rep2([]) == filters.rep2([5]) == filters.rep2([1, 2, 3]) == 0.0
    assert filters.rep2([1, 1, 1, 1]) == pytest.approx(2 / 3)  # 11 11 11
    assert filters.rep2([1, 2, 1, 2, 3, 4]) == 0.2  # not above 0.2, though 1 - 4/5 rounds below
    assert filters.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert filters.perplexity([]) is None and math.isfinite(filters.perplexity([-1e6]))


def verdict(words, finish="eos", start=0, logprobs=None, question=FIVE, **limits):
    """What the rules say of a path whose tokens are `words`; rules without a limit here are off."""
    tokens, ids = [w.encode() for w in words], [words.index(w) for w in words]
    record = {"token_ids": ids, "logprobs": logprobs or [-2.0] * len(words)}
    record |= {"path_start": start, "finish": finish}
    return filters.verdict(record, tokens, question, {**OPEN, **limits})


def test_rules_go_in_order():
    """Guards the funnel's counts: the first rule that fails names the verdict."""
    bad = [" Question:"] + [" x"] * 5
    limits = ALL | {"min_tokens": 25, "max_rep2": 0.2, "min_perplexity": 50.0}
    for flag, found in zip(OPEN, ("pattern:imitative", "length", "repetition", "perplexity")):
        assert verdict(bad, **limits)["verdict"] == found
        limits[flag] = OPEN[flag]
    assert verdict(bad, **limits)["verdict"] == "kept"


def test_thresholds_are_inclusive():
    """Guards `drop above` and `drop below` turning into `at`."""
    words, p = [" a", " b", " a", " b", " c", " d"], {"logprobs": [-1.0] * 6}  # rep-2 exactly 0.2
    at = {"min_tokens": 6, "max_rep2": 0.2, "min_perplexity": math.e}
    assert verdict(words, **p, **at)["verdict"] == "kept"
    assert verdict(words, **p, **at | {"min_tokens": 7})["verdict"] == "length"
    assert verdict(words, **p, **at | {"max_rep2": 0.19})["verdict"] == "repetition"
    got = verdict(words, **p, **at | {"min_perplexity": 2.72})
    assert got["verdict"] == "perplexity" and got["perplexity"] == pytest.approx(math.e)
    assert got["rep2"] == 0.2


def test_end_of_text_branch_counts_in_perplexity_only():
    """Guards an end-of-text branch token in text, length or rep-2, or missing in perplexity."""
    path = {"start": 1, "logprobs": [-6.0, -1.0, -2.0]}
    got = verdict(["<|endoftext|>", " a", " b"], **path, min_tokens=2)
    assert got["verdict"] == "kept" and got["text"] == " a b" and got["path_end"] == 3
    assert got["perplexity"] == pytest.approx(math.exp(3.0))
    assert verdict(["<|endoftext|>", " a", " b"], **path, min_tokens=3)["verdict"] == "length"
    assert verdict([" x", " x", " x"], start=1)["rep2"] == 0.0


@pytest.mark.parametrize("finish, last", [("length", " Question:"), ("special", "<|im_start|>")])
def test_a_path_is_trimmed_but_patterns_see_all_of_it(finish, last):
    """Guards early rejection and filtering giving two verdicts, a chat's `<|im_start|>` in the text or
    without a verdict of its own, and statistics of dropped tokens."""
    words, p = [" It", " is", ".", last], {"logprobs": [-1.0, -1.0, -1.0, -9.0]}
    got = verdict(words, finish, **p, min_tokens=3)
    assert got["path_end"] == 3 and got["text"] == " It is." and got["verdict"] == "kept"
    assert got["perplexity"] == pytest.approx(math.e)
    assert verdict(words, finish, **p, min_tokens=4)["verdict"] == "length"
    assert verdict(words, "eos", **p)["path_end"] == 4
    assert verdict(words, finish, **p, **ALL)["verdict"] == "pattern:imitative"


def test_rejected_paths():
    """Guards `direct` or an end-of-text boundary on a stopped path, and patterns that pass it."""
    words, two = [" bank,", " library,", " mall", " x"], {"patterns": ("options", "direct")}
    assert verdict(words, "rejected", **two)["verdict"] == "pattern:options"
    refuses("--no-early-reject", verdict, words, "rejected", patterns=("imitative",))
    refuses("--no-early-reject", verdict, [" No."], "rejected", question=YES_NO, **two)
    assert verdict([" No."], question=YES_NO, **two)["verdict"] == "pattern:direct"


def test_a_special_token_is_imitative_only_if_no_rule_is_earlier():
    """Guards the order of the kinds behind a chat's `<|im_start|>`."""
    words = [" (A)", " (B)", " Question:", "<|im_start|>"]
    assert verdict(words, "special", **ALL)["verdict"] == "pattern:options"
    got = verdict([" No.", "<|im_start|>"], "special", question=YES_NO, **ALL)
    assert got["verdict"] == "pattern:direct"


@pytest.mark.parametrize("words, finish", [([], "eos"), (["<|im_start|>"], "special")])
def test_an_empty_path_never_passes(words, finish):
    """Guards exp of nothing, and selecting nothing with all rules off; one token passes then."""
    assert verdict([" a"])["verdict"] == "kept"
    got = verdict(words, finish)
    assert (got["text"], got["perplexity"], got["verdict"]) == ("", None, "length")


@pytest.mark.parametrize(
    "flag, wrong",
    [("patterns", "option"), ("patterns", ""), ("patterns", "none,direct"), ("min_tokens", -1),
     ("max_rep2", 1.5), ("max_rep2", float("nan")), ("min_perplexity", float("inf"))],
)  # fmt: skip
def test_limits_are_checked(flag, wrong):
    """Guards a limit that silently passes everything (NaN compares false, a kind is misspelt)."""
    refuses(f"--{flag.replace('_', '-')}", filters.limits, {}, {flag: wrong})


def test_limits_are_flags_before_preset_before_paper():
    """Guards a flag of 0 that counts as left out, and a preset that wins over a flag."""
    p = argparse.ArgumentParser()
    filters.add_flags(p)
    flags = vars(p.parse_args(["--min-tokens", "0", "--patterns", "direct, imitative"]))
    got = filters.limits({"min_tokens": 12, "max_rep2": 0.4}, flags)
    want = {"patterns": ("imitative", "direct"), "min_tokens": 0, "max_rep2": 0.4}
    default = {rule.flag: rule.limit for rule in filters.RULES}
    assert got == default | want | {"min_perplexity": 5.0, "answer": "any"}
    paper = {**ALL, "min_tokens": 25, "max_rep2": 0.2, "min_perplexity": 5.0, "answer": "any"}
    assert filters.limits({}) == default | paper
    told = "--answer takes any, consistent, right, not 'gold'"
    refuses(told, filters.limits, {}, {"answer": "gold"})
    assert filters.limits({}, {"patterns": "none"})["patterns"] == ()


def record(id, branch, sample, rep2, verdict="kept"):
    found = {"rep2": rep2, "verdict": verdict}
    return {"task": "t", "id": id, "branch": branch, "sample": sample, **found}


def test_select():
    """Guards ties, dropped paths being chosen, and a second run over selected records."""
    ties = [record("1", 2, 0, 0.1), record("1", 0, 3, 0.1), record("1", 0, 1, 0.1)]  # the last one
    records = [*ties, record("1", 0, 0, 0.0, "length"), record("2", 0, 0, 0.3),
               record("2", 4, 4, 0.2), record("3", 0, 0, 0.0, "pattern:direct")]  # fmt: skip
    got = filters.select(records)
    assert [i for i, r in enumerate(got) if r["verdict"] == "selected"] == [2, 5]
    assert [got[i]["verdict"] for i in (0, 3, 6)] == ["kept", "length", "pattern:direct"]
    assert filters.select(got) == got


def test_the_funnel_adds_up(capsys, monkeypatch, tmp_path):
    """Guards a funnel whose steps do not add up, and a verdict that no rule gives."""
    verdicts = "selected kept pattern:options pattern:direct length repetition perplexity answer"
    records = [record(str(i // 2), 0, i, 0.0, v) for i, v in enumerate(verdicts.split())]
    c = filters.Funnel(records).counts()
    assert (c["paths"], c["passed"], c["selected"]) == (8, 2, 1)
    want = {"pattern": 8, "length": 6, "repetition": 5, "perplexity": 4, "answer": 3}
    assert c["seen"] | want == c["seen"]
    assert c["dropped"]["pattern"] == 2 and c["dropped"]["pattern:options"] == 1
    console.print_funnel({"rules": filters.limits({}), "counts": c})
    shown = capsys.readouterr().out
    assert "8        2   25.0%   drop imitative, options, direct" in shown
    assert "2 of 8 paths passed; 1 of 4 questions have a selected path, 3 have none" in shown
    counts = c | {"selected": 0, "dropped": c["dropped"] | {"length": 3, "pattern": 4}}
    counts["seen"] = c["seen"] | {"pattern": 8, "length": 3}
    shares = {"rules": filters.limits({}), "counts": counts}
    monkeypatch.setattr(console, "measures", lambda records, rule: [5, 6, 7])
    console.print_hint(tmp_path, shares, early=True)  # length takes fewer than pattern, but all
    assert "length dropped 3 of the 3 paths" in capsys.readouterr().out
    refuses("no verdict 'rude'", filters.Funnel([record("1", 0, 0, 0.0, "rude")]).counts)


@pytest.mark.parametrize("text, stated", [
    ("Pears have 60 % of water's density. They float.", "none"),
    ("No, pears are dense. They sink.", "right"),
    ("**No**. So the answer is no.", "right"),
    ("Pears float. So the answer is yes.", "wrong"),
    ("No, pears are dense. So the answer is yes.", "wrong"),  # it contradicts itself
    ("Yes, they float. So the answer is no.", "wrong"),
    ("Some say yes. No longer than a day do they float.", "none"),
])  # fmt: skip
def test_the_answer_that_a_path_states(text, stated):
    """Guards the poison of a real model: a path that begins with the wrong word and gets the right
    answer appended teaches contradiction."""
    path = filters.Path([], [], text, {}, YES_NO)
    assert filters.answers_stated(text, YES_NO) == stated
    (rule,) = (rule for rule in filters.RULES if rule.name == "answer")
    dropped = [x for x in filters.DROPPED if filters.first_broken(path, {"answer": x}, [rule])]
    drops = {"none": ["right"], "right": [], "wrong": ["consistent", "right"]}[stated]
    assert sorted(dropped) == drops


def test_reasoning_is_told_from_answers_and_loops(tiny_model_folder):
    """Guards a garbage loop that counts as reasoning because it breaks no pattern."""
    tokenizer, limits = load_tokenizer(tiny_model_folder), filters.limits({"min_tokens": 12})
    answer = " So the answer is no."
    reasoning = " A pear has less weight than the water of its size, which lifts it." + answer
    assert filters.reasons(YES_NO, reasoning, tokenizer, limits)
    for text in (answer, " yes." + answer, " " + "S" * 60, ""):
        assert not filters.reasons(YES_NO, text, tokenizer, limits), text
