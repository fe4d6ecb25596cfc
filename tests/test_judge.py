"""report/judge.py: the prompt's form, a parser that never invents a score, replies bought once."""

from pathlib import Path

import pytest
from conftest import refuses, start
from fake_server import FakeServer, ok

import evaluate
from sert_min.io.files import read_jsonl, to_line, write_atomic
from sert_min.micro import program, world
from sert_min.report import judge
from sert_min.report.judge import CRITERIA, KEYS, judge_prompt, mean_score, parse_scores

pytestmark = pytest.mark.usefixtures("empty_folder", "keyed")
REPLY = "\n".join(f"Score for {name}: {i}" for i, name in enumerate(CRITERIA, 5)) + "\nFine."
READ = {  # text behind `Score for Coherence` -> the score that is read
    ": 7": 7, ":7.5": 7.5, ": 7,5": 7.5, ": 0": 0, ": 10.": 10, ":** 8": 8, "**: 8": 8, ": **8**": 8,
    ": [8]": 8, ": <8>": 8, ": 8/10": 8, ": **8**/10": 8, ": 8 out of 10.": 8, ": 8 (out of 10)": 8,
    " (0-10): 8": 8, " = 8": 8, " is 8": 8, ": 8 - it flows": 8, ": 8, because": 8,
    "：8": 8, ": 8 -> good": 8}  # fmt: skip
MISSING = (  # out of range, another scale, a range, no number
    ": 11", ": -3", ": 85", ": 4/5", ": 4 (out of 5)", ": 7-8", ": 7 to 8", ": 7 or 8", ": 6 -> 8",
    ": **6** → **8**", ": 8th", ": 1e1", ": N/A", ": <number>", ":", "",
    f": {'9' * 500}", ": seven")  # fmt: skip


def test_the_prompt_asks_what_the_paper_asks():
    """Guards options or a criterion lost from the prompt, and braces in a response."""
    text = judge_prompt("Where? Answer choices: (A) sea, (B) mall", " {so} it is. ")
    assert "(A) sea, (B) mall" in text and "\n{so} it is.\n" in text
    for name in ("Coherence", "Relevance", "Logical Consistency", "Completeness"):
        assert f"Score for {name}: <number>" in text and CRITERIA[name].endswith("?")
    assert "between 0 and 10" in text and "summary" in text.splitlines()[-1]
    assert tuple(program.judge(world.questions("test")[0], "hm")) == KEYS
    assert set(parse_scores(text).values()) == {None}, "a judge that echoes the form gave no score"


@pytest.mark.parametrize("said, score", [*READ.items(), *((said, None) for said in MISSING)])
def test_forms_of_a_score(said, score):
    assert parse_scores(f"Well.\n- score for COHERENCE{said}\nmore")["coherence"] == score


def test_thinking_is_no_score():
    """Guards the draft scores of a reasoning judge, taken where its reply was cut in the thinking."""
    draft = REPLY.replace("7", "1")
    assert mean_score(parse_scores(f"<think>{draft}</think>{REPLY}")) == 6.5
    for mark in ("<think>", "[THINK]", "<|channel|>analysis<|message|>"):
        assert set(parse_scores(mark + draft).values()) == {None}


def test_the_last_line_counts_and_a_missing_score_is_missing():
    """Guards a failed parse that counts as 0 (habit of several evaluation codes)."""
    text = "Score for Relevance: 3\nScore for Logical  Consistency: 4\nScore for Relevance: 6"
    scores = parse_scores(text)
    assert list(scores.values()) == [None, 6, 4, None]  # in the order of KEYS
    assert mean_score(scores) is None and mean_score(parse_scores(REPLY)) == 6.5
    scored = [judge.score_record({"id": "1"}, parse_scores(t)) for t in (text, REPLY, "")]
    found = judge.summary(scored, 3)
    assert (found["parsed"], found["total"]) == (1, 3)
    assert found["coherence"][0] == 5 and found["relevance"][0] == 6  # 6 and 6, not 6, 6 and 0


def predictions(n: int) -> list[dict]:
    about = {"task": "strategy_qa", "answer": "yes"}
    texts = [f"Reason {i % 8}. So the answer is yes." for i in range(n)]
    return [about | {"id": str(i), "question": f"Is {i}?", "text": t} for i, t in enumerate(texts)]


def run(server, rows, *more):
    write_atomic("predictions.jsonl", map(to_line, rows))
    flags = ["--predictions", "predictions.jsonl", "--task", "strategy_qa", "--judge-model", "j/m"]
    start(evaluate, *flags, "--base-url", server.url, *more)
    path = Path("scores-j-m.jsonl")
    return list(read_jsonl(path)) if path.exists() else []


def test_judging_is_planned_capped_and_paid_once(capsys):
    """Guards a plan that sends something, a cap that loses what came, and paying a text twice."""
    with FakeServer(answer=lambda b: ok("no idea" if "Is 3?" in str(b) else REPLY)) as server:
        prices = "--price-in", 1, "--price-out", 2
        assert run(server, predictions(10), "--dry-run", *prices) == [] == server.bodies
        said = capsys.readouterr().out
        assert "10 judge requests (0 replies are there)" in said and "5,120 out; at most" in said
        with pytest.raises(SystemExit) as end:
            run(server, predictions(10), "--max-requests", 4)
        assert end.value.code == 2 and len(server.bodies) == 4
        assert len(list(read_jsonl("scores-j-m.jsonl"))) == 4
        assert "6 judge replies are missing" in capsys.readouterr().err
        scored = run(server, predictions(10))
        assert run(server, predictions(10)) == scored and len(server.bodies) == 10
        twice = [r | {"answer": a} for r in predictions(12)[2:] for a in ("yes", "no")]
        run(server, twice, "--out-dir", "other", "--max-requests", 5)
        assert len(server.bodies) == 12
    assert all(b["temperature"] == 0 and b["max_tokens"] == 512 for b in server.bodies)
    assert [r["mean"] for r in scored] == [6.5] * 3 + [None] + [6.5] * 6
    assert "all four scores of 9 of 10 responses" in capsys.readouterr().out


def test_a_judge_that_ignores_the_form_is_stopped_early():
    """Guards 17,000 paid replies that hold no score."""
    with FakeServer(ok("I like it.")) as server:
        for first, most in (("20", 40), ("..", 60)):  # nor are 20 more bought by repeating
            told = f"only 0 of the first {first} replies hold all four scores"
            refuses(told, run, server, predictions(60))
            assert len(server.bodies) < most


def test_the_micro_world_has_a_program_judge(tmp_path):
    """Guards the stand-in: good reasoning scores high, an empty text 0, nothing is sent."""
    q = next(q for q in world.questions("test") if not q.choices)
    about = {"task": "micro", "id": q.id, "question": q.text, "answer": q.answer, "branch": 2}
    texts = [program.teacher_rationale(q), "", "Yes."]
    rows = [{**about, "sample": i, "verdict": "kept", "text": t} for i, t in enumerate(texts)]
    write_atomic("paths.jsonl", map(to_line, rows))
    start(evaluate, "--paths", "paths.jsonl")
    good, empty, direct = read_jsonl("scores-program.jsonl")
    assert good["mean"] > 9 and empty["mean"] == 0 and direct["mean"] < 3
    assert (good["branch"], good["sample"], good["verdict"]) == (2, 0, "kept")
