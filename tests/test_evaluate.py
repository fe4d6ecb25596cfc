"""metrics.py: intervals against published values, metrics on hand-made records, greedy decoding."""

import math

import pytest
from conftest import make_tiny_model, refuses
from hypothesis import given
from hypothesis import strategies as st

from sert_min import tasks
from sert_min.metrics import grade, greedy, mean_interval, share_interval, summarize
from sert_min.models import load_model
from sert_min.questions import Question
from sert_min.tokenizer import load_tokenizer

YES_NO = Question("strategy_qa", "7", "Is it so?", "yes")
CHOICE = Question("commonsense_qa", "c", "Where? Answer choices: ..", "B", ("sea", "mall", "sky"))


@pytest.mark.parametrize("k, n, low, high", [  # Newcombe 1998, Table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_share_interval_equals_published_values(k, n, low, high):
    p, a, b = share_interval(k, n)
    assert p == k / n and round(a, 4) == low and round(b, 4) == high
    p, a, b = share_interval(n - k, n)  # mirrored
    assert round(1 - b, 4) == low and round(1 - a, 4) == high


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_intervals(k, n):
    """The share lies in its own; those of nothing, and of a mean by hand."""
    p, low, high = share_interval(min(k, n), n)
    assert 0 <= low <= p <= high <= 1
    assert all(map(math.isnan, share_interval(0, 0) + mean_interval([])))
    mean, low, high = mean_interval([1, 2, 3, 4, 5])  # sd 1.5811, standard error 0.7071
    assert mean == 3 and round(high - mean, 4) == round(mean - low, 4) == 1.3859
    assert mean_interval([4])[0] == 4 and all(map(math.isnan, mean_interval([4])[1:]))


@pytest.mark.parametrize("text, finish, ok, reason, extracted", [
    ("Tea is hot. So the answer is yes.", "eos", True, "ok", "yes"),
    ("Tea is hot. So the answer is yes.", "length", False, "does not end", "yes"),
    ("Tea is hot.", "eos", False, "states no answer", None),
    ("So the answer is unknown.", "eos", False, "answer not readable", None),
    ("The answer is no. So the answer is yes.", "eos", False, "states several answers", "yes"),
    ("The answer is yes. So the answer is yes.", "eos", True, "ok", "yes"),
    ("a b " * 30 + "so the answer is yes.", "eos", False, "severely repetitive", "yes"),
    ("So the answer is yes.", None, None, "finish not recorded", "yes"),
    ("", "eos", False, "states no answer", None),
])  # fmt: skip
def test_format_and_its_reason(text, finish, ok, reason, extracted):
    r = grade(YES_NO, text, finish)
    assert (r["format_ok"], r["reason"], r["extracted"]) == (ok, reason, extracted)
    assert r["correct"] == (extracted == "yes")


def test_summary_counts_by_hand():
    """Guards unreadable answers left out of the denominator, and Fmt over unrecorded finishes."""
    r = grade(CHOICE, "the mall the mall So the answer is (B).", "eos")
    assert r["words"] == 9 and r["rep1"] == round(1 - 6 / 9, 5)
    assert r["rep2_words"] == round(1 - 7 / 8, 5)  # `the mall` is there twice
    assert r["extracted"] == r["extracted_lenient"] == "B" and r["correct"]
    texts = ["So the answer is yes.", "So the answer is no.", "hm", "Yes!"]
    questions = [YES_NO] * 3 + [Question("strategy_qa", "8", "Not?", "no")]
    records = [grade(q, t, "eos") for q, t in zip(questions, texts)]
    records[0]["format_ok"] = None
    m = summarize(records, questions)
    assert m["n"] == 4 and m["acc"][0] == 0.25 and m["unparseable"] == 2
    assert m["acc_lenient"][0] == 0.25  # `Yes!` is read there, and wrong
    assert m["fmt"][0] == pytest.approx(1 / 3)
    assert m["len"][0] == 3 and m["rep"][0] == 0
    assert m["majority"] == ("yes", 0.75) and "acc_likelihood" not in m
    weighed = [{"correct": i == 0, "correct_per_token": i < 2} for i in range(4)]
    more = summarize(records, questions, likelihood=weighed, judges={"j": {"parsed": 4}})
    assert more["acc_likelihood"][0] == 0.25 and more["acc_text_token"][0] == 0.5
    assert "acc_text" not in more and more["judges"]["j"]["parsed"] == 4


def questions(*lengths: int) -> list[Question]:
    return [Question("strategy_qa", str(i), "wert " * n, "yes") for i, n in enumerate(lengths)]


def test_greedy_batch_equals_one_by_one_and_stays_in_the_context(tmp_path):
    """Guards padding that is seen and positions that are shifted in a batch of unequal prompts."""
    folder = make_tiny_model(tmp_path / "m", seed=3)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for p in model.parameters():
        p.data *= 4  # far from uniform: no near ties, and outputs that differ
    some = questions(1, 20, 3, 11, 4, 7)
    together = greedy(model, tokenizer, some, "", 20)
    assert together == [greedy(model, tokenizer, [q], "", 20)[0] for q in some]
    assert together == greedy(model, tokenizer, some, "", 20, rows=4)
    assert len(set(together)) > 1
    model = load_model(make_tiny_model(tmp_path / "short", n_positions=64))
    assert greedy(model, tokenizer, questions(5))[0][1] in ("length", "eos")
    told = "question 1 has .* tokens and fills the model's context of 64"
    refuses(told, greedy, model, tokenizer, questions(2, 30))
    assert tasks.get("commonsense_qa").greedy_cap == 512 and tasks.get("micro").greedy_cap == 64
