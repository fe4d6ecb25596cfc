"""report/figures.py: the numbers behind Figures 1, 3 and 4, and pictures that are drawn."""

import json
from unittest.mock import Mock

import pytest
from conftest import refuses

from sert_min.io.files import to_line, write_atomic
from sert_min.report import figures
from sert_min.report.figures import ablation, bin_of, question_shares, token_groups
from sert_min.report.judge import KEYS


def scored(question, mean, branch=0, verdict="kept", sample=0):
    scores = dict.fromkeys(KEYS, mean)
    return {"task": "t", "id": str(question), "branch": branch, "sample": sample,
            "verdict": verdict, "scores": scores, "mean": mean}  # fmt: skip


def test_bins_close_at_ten():
    """Guards a perfect score that falls out of the last bin."""
    assert [bin_of(x) for x in (0, 1.999, 2, 3.9, 4, 6, 7.99, 8, 9, 10)] == [
        0, 0, 1, 1, 2, 3, 3, 4, 4, 4]  # fmt: skip


def test_shares_count_questions_not_outputs():
    """Guards shares of outputs in place of shares of questions with at least one (Fig. 1)."""
    some = [scored(1, 9), scored(1, 9.5), scored(1, 1), scored(2, 3), scored(3, None)]
    assert question_shares(some, "fig1") == [1 / 3, 1 / 3, 0, 0, 1 / 3]
    groups = token_groups(
        "fig1", [scored(1, 9, 0), scored(1, 1, 4), scored(2, 9, 4)], [scored(1, 5)], []
    )
    assert list(groups) == ["Token 0", "Token 4", "Token All", "Raw"]
    assert groups["Token 0"] == [0, 0, 0, 0, 1.0]
    assert groups["Token 4"] == [0.5, 0, 0, 0, 0.5] and groups["Token All"] == [0.5, 0, 0, 0, 1]


def test_kinds_of_paths():
    """Guards a path that only the perplexity or the answer rule drops, which reasons by form, and
    shares of paths in place of shares of questions."""
    verdicts = "pattern:options length repetition perplexity answer kept selected"
    paths = [scored(i % 2, None, i % 5, v) for i, v in enumerate(verdicts.split())]
    kinds = [figures.KINDS[figures.kind_bin(r)] for r in paths]
    assert kinds == ["options", "short", "repetitive", *["reasoning"] * 4]
    groups = token_groups("kinds", paths, [], [])
    assert groups["Token All"] == [0, 0.5, 0, 0.5, 0.5, 1]
    assert groups["Token 1"] == [0, 0, 0, 0.5, 0, 0.5]


def test_ablation_is_nested_and_follows_the_verdicts():
    """Guards a curve that leaves out an earlier rule."""
    verdicts = "pattern:direct pattern:options length repetition perplexity kept selected"
    curves = ablation([scored(i, i, verdict=v) for i, v in enumerate(verdicts.split())])
    assert list(curves) == ["raw", *(f"+ {rule.name}" for rule in figures.RULES if rule.paper)]
    assert [len(c) for c in curves.values()] == [7, 5, 4, 3, 2]
    assert list(ablation([scored(1, 1)])) == list(curves)  # also of rules that drop nothing
    assert list(ablation([*curves["raw"], scored(9, 9, verdict="answer")]))[-1] == "+ answer"
    assert [r["verdict"] for r in curves["+ perplexity"]] == ["kept", "selected"]
    shares = figures.ablation_numbers(curves)["coherence"]["raw"]["shares"]
    assert shares == [0.2857, 0.2857, 0.2857, 0.1429, 0]


def make_runs(folder, early=()):
    """Judged runs as runs/micro.sh leaves them."""

    def run(place, records):
        place.mkdir(parents=True)
        write_atomic(place / "scores-program.jsonl", map(to_line, records))
        write_atomic(place / "settings.json", json.dumps({"early_reject": list(early)}))

    verdicts = ("pattern:direct", "length", "repetition", "perplexity", "selected")
    paths = [scored(q, (q + b * 2) % 11, b, verdicts[b], s)
             for q in range(6) for b in range(5) for s in range(2)]  # fmt: skip
    run(folder / "paths-test/seed0", paths)
    write_atomic(folder / "paths-test/seed0/paths.jsonl", map(to_line, paths))
    run(folder / "paths-raw-test/seed0", [scored(q, 2, -1) for q in range(6)])
    run(folder / "sert/seed0/paths-raw-test", [scored(q, 8, -1) for q in range(6)])
    for method in ("rd", "sert-rd"):
        run(folder / f"{method}/seed0", [scored(q, q, -1) for q in range(6)])


def test_figures_are_drawn_and_numbered(tmp_path, capsys):
    make_runs(tmp_path / "micro/m")
    figures.draw_figures(tmp_path / "micro", tmp_path / "f", "test", None)
    names = sorted(p.stem for p in (tmp_path / "f").glob("*.png"))
    assert names == ["fig1-micro-m", "fig3-micro", "fig4-micro-m", "kinds-micro-m"]
    for name in names:
        assert (tmp_path / "f" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "f/figures.json").read_text())
    assert len(numbers["fig1-micro-m"]) == 8 and numbers["fig1-micro-m"]["Raw SERT"][4] == 1
    assert numbers["fig4-micro-m"]["coherence"]["+ perplexity"]["n"] == 12
    assert numbers["kinds-micro-m"]["Token 4"] == [0, 0, 0, 0, 0, 1.0]
    assert numbers["fig3-micro"]["m"]["rd"]["relevance"] == 2.5
    assert "fig3-micro.png" in capsys.readouterr().out


def test_a_failed_picture_loses_no_result_and_more_rules_have_styles(tmp_path, monkeypatch):
    """Guards numbers that are lost with a picture, and a new rule without a style of its own."""
    make_runs(tmp_path / "m")
    rules = [*figures.RULES, *(figures.RULES[0]._replace(name=f"new{i}") for i in range(4))]
    monkeypatch.setattr(figures, "RULES", rules)
    figures.draw_figures(tmp_path, tmp_path / "f", "test", None)
    numbers = (tmp_path / "f/figures.json").read_bytes()
    assert len(json.loads(numbers)[f"fig4-{tmp_path.name}-m"]["relevance"]) == 9
    (tmp_path / "f/figures.json").unlink()

    monkeypatch.setattr(figures, "plot_tokens", Mock(side_effect=RuntimeError("no fonts here")))
    with pytest.raises(RuntimeError):
        figures.draw_figures(tmp_path, tmp_path / "f", "test", None)
    assert (tmp_path / "f/figures.json").read_bytes() == numbers


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    """Guards a figure of texts that were cut short, and of two judges' scores in one."""
    (tmp_path / "none/sert").mkdir(parents=True)
    make_runs(tmp_path / "early", early=["direct"])
    make_runs(tmp_path / "two")
    write_atomic(tmp_path / "two/paths-test/seed0/scores-other.jsonl", "")
    for name, message in (("none", "nothing under .* is sampled"), ("early", "--no-early-reject"),
                          ("two", "--judge-model")):  # fmt: skip
        refuses(message, figures.draw_figures, tmp_path / name, tmp_path / "f", "test", None)
    figures.draw_figures(tmp_path / "two", tmp_path / "f", "test", "program")
