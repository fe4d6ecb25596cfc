"""docs/results.md, "A real model": every number of it against the JSON files of the run."""

import re

import pytest
from conftest import ROOT

from sert_min.io.files import read_json
from sert_min.report import console
from sert_min.report.table import NAMES

DOCS = (ROOT / "docs/results.md").read_text().split("## A real model\n")[1].split("\n## ")[0]
RUN = ROOT / "bench/results/smollm2"
TABLE, FUNNEL, DEV = (read_json(RUN / f"{name}.json") for name in ("table", "funnel", "validation"))
TEXTS, KINDS = read_json(RUN / "training_texts.json"), read_json(RUN / "kinds.json")
TASKS = ("strategy_qa", "commonsense_qa")


def ours(task: str, method: str) -> dict:
    return next(r["ours"] for r in TABLE[task]["rows"] if r["method"] == method)


def table(task: str) -> str:
    """The rows of a task as the page has them."""
    lines = []
    for row in TABLE[task]["rows"]:
        m = row["ours"]
        cells = [NAMES[row["method"]], "{:.1f} [{:.1f}, {:.1f}]".format(*m["acc"])]
        for key in ("acc_likelihood", "acc_text", "reasoning", "contradictory"):
            if key != "acc_text" or task == "commonsense_qa":
                cells.append(f"{m[key][0]:.1f}" if key in m else "")
        for key, n in (("fmt", 2), ("len", 0), ("rep", 2)):
            cells.append(f"{m[key][0]:.{n}f}" if key in m else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(task: str, a: str, b: str, metric: str) -> list[float]:
    """(mean, low, high) of a paired difference."""
    return next(r for r in TABLE[task]["differences"] if r["methods"] == [a, b])[metric]


def difference(task: str, a: str, b: str, metric: str, digits: int = 1) -> str:
    """A paired difference as the page writes it."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*interval(task, a, b, metric), d=digits)


def excludes_0(task: str, a: str, b: str, metric: str) -> bool:
    _, low, high = interval(task, a, b, metric)
    return low > 0 or high < 0


@pytest.mark.parametrize("task", TASKS)
def test_tables_and_funnel(task, capsys):
    assert table(task) in DOCS
    if task == "strategy_qa":
        console.print_funnel(FUNNEL[task])
        assert capsys.readouterr().out.strip() in DOCS
    assert all(r["seeds"] == (1 if r["method"] == "base" else 3) for r in TABLE[task]["rows"])


def test_sentences():
    """Guards a sentence that no file bears out, or that goes on after a new run."""
    sqa, csqa = (FUNNEL[task]["counts"]["seen"]["perplexity"] for task in TASKS)
    drops = FUNNEL["strategy_qa"]["counts"]["dropped"]["perplexity"]
    wrong, texts = ([TEXTS[t][key] for t in TASKS] for key in ("state another answer", "texts"))

    def of(method: str, metric: str) -> str:
        return " % and ".join(f"{ours(task, method)[metric][0]:.1f}" for task in TASKS)

    def gaps(a: str, b: str, metric: str = "acc", digits: int = 1) -> str:
        return " and ".join(difference(task, a, b, metric, digits) for task in TASKS)

    share = "{:.1f} [{:.1f}, {:.1f}]"
    dev = {name: share.format(*(100 * x for x in m["acc"])) for name, m in DEV.items()}
    usual = TEXTS["strategy_qa"]["median perplexity"]
    imitative = KINDS["kinds-strategy_qa-smollm2-135m-instruct-4bit"]["Raw SERT"][0]
    said = [
        f"{sqa:,} of 8,000 paths ({sqa / 80:.0f} %) on StrategyQA and {csqa:,} ({csqa / 80:.0f} %) on",
        f"{of('base', 'reasoning')} % of the greedy", f"{of('sert', 'reasoning')} % after",
        f"drops {drops:,} of these {sqa:,} paths ({drops / sqa:.0%}".replace("%", " %"),
        f"{FUNNEL['strategy_qa']['counts']['without_path']} of 320 questions without a path",
        f"{wrong[0]} of the {texts[0]} training texts of StrategyQA and {wrong[1]} of the {texts[1]} of",
        f"{of('sert', 'contradictory')} % of SERT's", f"{of('star', 'contradictory')} % of STaR's",
        f"SERT - Finetune {difference('strategy_qa', 'sert', 'finetune', 'acc')} points",
        f"by likelihood {difference('strategy_qa', 'sert', 'finetune', 'acc_likelihood')}",
        f"SERT - STaR {gaps('sert', 'star')}", f"SERT+RD - RD {gaps('sert-rd', 'rd')}",
        f"Rep {gaps('sert-rd', 'rd', 'rep', 2)}",
        f"SERT+RD - SERT {difference('commonsense_qa', 'sert-rd', 'sert', 'acc')} points",
        f"20 epochs at 3e-4 in batches of 8 reach {dev['paper-settings']} %, the preset {dev['preset']} %",
        f"perplexity is {usual['direct']:.1f}, that of reasoning by form {usual['reasoning']:.1f}",
        f"8,000 paths took {FUNNEL['strategy_qa']['timing']['seconds']} s",
    ]  # fmt: skip
    page = re.sub(r"\s+", " ", DOCS)
    assert not (missing := [s for s in said if s not in page]), missing
    assert excludes_0("strategy_qa", "sert", "finetune", "acc")  # "below"
    assert not excludes_0("strategy_qa", "sert", "finetune", "acc_likelihood")
    near = ("sert", "star", "acc"), ("sert-rd", "rd", "acc"), ("sert-rd", "rd", "rep")
    assert not any(excludes_0(task, *some) for task in TASKS for some in near)  # "no difference"
    assert excludes_0("commonsense_qa", "sert-rd", "sert", "acc")  # "the teacher's rationales"
    assert imitative == 0  # "none imitates the prompt any more"
    low = {m: ours("strategy_qa", m)["acc"][1] for m in NAMES if m != "teacher"}
    assert [m for m in low if low[m] > 52.55] == ["finetune"]
