"""Pictures from the JSONL files: training curve, Figures 1, 3, 4 of the paper, kinds of paths.

Importing this file imports matplotlib, which takes a second: scripts do so only when they draw.
"""

import json
import os
from collections import defaultdict
from itertools import cycle, product
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # draws without a screen; a notebook's shell names its own
import matplotlib.pyplot as plt

from sert_min.filters import RULES
from sert_min.io.errors import need
from sert_min.io.files import clean_name, folders_in, read_jsonl, stored_settings, write_atomic
from sert_min.report.judge import KEYS, summary

# Okabe and Ito's colours: told apart with any colour vision, and by lightness in print.
ORANGE, SKY, GREEN, BLUE, RED, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#8C8C8C")  # fmt: skip
INK = "#333333"
TOKENS = ("#DCE9F5", "#BFD8EC", "#9CC3E1", "#78ADD4", "#5596C6")  # Token 0..4, a family
BARS = dict(zip((f"Token {b}" for b in range(5)), TOKENS)) | {
    "Token All": BLUE, "Raw": GREY, "Raw SERT": ORANGE}  # fmt: skip
# Fig. 4's curves. Later marks are smaller: where curves lie on one another, all marks show.
STYLES = (("--", "o", GREY, 9), ("-", "s", SKY, 8.5), ("-", "^", GREEN, 7.5), ("-", "D", ORANGE, 5),
          ("-", "v", RED, 3.5), ("-", "P", BLUE, 3))  # fmt: skip
SIZES = ("gpt2", "gpt2-medium", "gpt2-large")  # Fig. 3's panels in the paper's order
plt.rcdefaults()  # no matplotlibrc, with LaTeX for example, has a say
plt.rcParams.update({
    "figure.constrained_layout.use": True, "savefig.dpi": 150, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#AAAAAA",
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "#E8E8E8", "axes.titlelocation": "left",
})  # fmt: skip


def save(fig, png: Path, title: str = "", **legend) -> None:
    """Put a title over all panels and the legend of the first below, then write and close a figure.
    The file holds no version and no date, so that equal data gives equal bytes."""
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=12)
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", **legend)
    png.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(png, metadata={"Software": None})
    plt.close(fig)


def plot_training(metrics: Path, png: Path, title: str) -> None:
    """The loss of each step with a centred mean over a fortieth of the run, and with --holdout the
    validation loss of each epoch."""
    records = list(read_jsonl(metrics))
    epochs = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    x, y = zip(*((r["step"], r["loss"]) for r in records if "loss" in r))
    half = max(1, len(y) // 80)
    smooth = [sum(w) / len(w) for w in (y[max(0, i - half) : i + half + 1] for i in range(len(y)))]
    fig, ax = plt.subplots(figsize=(7, 3.6))
    ax.plot(x, y, color=SKY, linewidth=0.7, label="each batch")
    ax.plot(x, smooth, color=BLUE, linewidth=1.8, label=f"mean of {2 * half + 1} steps")
    if epochs:
        ax.plot(*zip(*epochs), "o-", color=RED, markersize=4, label="validation")
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None), title=title)
    ax.legend()
    save(fig, png)


# --- Figures 1, 3, 4 of the paper -----------------------------------------------------------------
#
# Read from scores-JUDGE.jsonl beside paths.jsonl and predictions.jsonl.

WHERE = {  # what is drawn -> its folders under a model's; the first one that holds some counts
    "paths": "paths-{split}/seed*",  # branched samples: Token 0..4, Token All, and all of Fig. 4
    "raw": "paths-raw-{split}/seed*",  # plain samples: Raw
    "raw sert": "sert/seed*/paths-raw-{split}",  # those of the self-trained student: Raw SERT
    "sert-rd": "sert-rd/seed*",  # greedy outputs: Fig. 3
    "rd": "rd/seed*",
}
BINS = ("0–2", "2–4", "4–6", "6–8", "8–10")  # [0,2) [2,4) [4,6) [6,8) [8,10]
KINDS = ("imitative", "options", "direct", "short", "repetitive", "reasoning")


def bin_of(score: float | None) -> int | None:
    """Which of the five bins a score from 0 to 10 falls into; None if it is missing.

    >>> [bin_of(x) for x in (0, 1.99, 2, 8, 10, None)]
    [0, 0, 1, 4, 4, None]
    """
    return None if score is None else min(int(score // 2), 4)


def kind_bin(r: dict) -> int:
    """The kind of a path by its form, as an index of KINDS: what the first three rules drop, and
    the rest, which reasons by form (true or not)."""
    name = r["verdict"].removeprefix("pattern:")
    name = {"length": "short", "repetition": "repetitive"}.get(name, name)
    return KINDS.index(name if name in KINDS else "reasoning")


TOKEN_FIGURES = {  # figure -> (bins, what they tell apart, what the axis says)
    "fig1": (BINS, "output of a quality", "mean of the four judge scores"),
    "kinds": (KINDS, "path of a kind", "kind of path, by its form"),
}


def question_shares(paths: list[dict], figure: str) -> list[float]:
    """Per bin of a figure the share of questions with at least one path in it; None is no bin."""
    n_bins, bins = len(TOKEN_FIGURES[figure][0]), defaultdict(set)
    for r in paths:
        bins[r["id"]].add(kind_bin(r) if figure == "kinds" else bin_of(r["mean"]))
    return [sum(b in found for found in bins.values()) / len(bins) for b in range(n_bins)]


def token_groups(figure: str, paths: list, raw: list, raw_sert: list) -> dict[str, list[float]]:
    """The eight bars of each bin: name -> shares per bin; samples that are missing have no bar."""
    groups = {f"Token {b}": [r for r in paths if r["branch"] == b] for b in range(5)}
    groups |= {"Token All": paths, "Raw": raw, "Raw SERT": raw_sert}
    return {name: question_shares(some, figure) for name, some in groups.items() if some}


def ablation(scored: list[dict]) -> dict[str, list[dict]]:
    """Fig. 4's curves: what is left as the rules are switched on one by one. A verdict names the
    first rule that a path broke, so one set of samples serves all curves. A rule that the paper
    lacks has one only if it dropped some."""
    left, curves = list(scored), {"raw": scored}
    for rule in RULES:
        n, left = len(left), [r for r in left if r["verdict"].split(":")[0] != rule.name]
        if rule.paper or len(left) < n:
            curves[f"+ {rule.name}"] = left
    return curves


def ablation_numbers(curves: dict[str, list[dict]]) -> dict:
    """Fig. 4's numbers: criterion -> curve -> mean, n and share per bin of the scores, if any."""
    numbers: dict[str, dict] = defaultdict(dict)
    for key, (name, some) in product(KEYS, curves.items()):
        if values := [r["scores"][key] for r in some if r["scores"][key] is not None]:
            n, bins = len(values), list(map(bin_of, values))
            shares = [round(bins.count(b) / n, 4) for b in range(5)]
            numbers[key][name] = {"mean": round(sum(values) / n, 4), "n": n, "shares": shares}
    return numbers


def all_paths(model: Path, folders: str) -> list[dict]:
    """The records of the first paths.jsonl in `folders` (a glob under `model`)."""
    files = sorted(model.glob(f"{folders}/paths.jsonl"))[:1]
    return [{k: r[k] for k in ("id", "branch", "verdict")} for f in files for r in read_jsonl(f)]


def scores(model: Path, folders: str, judge: str | None) -> list[dict]:
    """The score records of the first of `folders` (a glob under `model`) that has some. `judge`
    says whose; texts that early rejection cut short are refused."""
    for folder in sorted(model.glob(folders)):
        found = sorted(folder.glob(f"scores-{clean_name(judge) if judge else '*'}.jsonl"))
        need(len(found) < 2, f"{folder} has scores of several judges; choose with --judge-model")
        if found and (records := list(read_jsonl(found[0]))):
            early = stored_settings(folder / "settings.json").get("early_reject")
            need(not early, f"{folder} was sampled with early rejection: its texts are cut short, "
                 "and a figure of their scores would be wrong; sample with --no-early-reject into "
                 "another folder")  # fmt: skip
            return records
    return []


def draw_figures(top: Path, out: Path, split: str, judge: str | None) -> None:
    """Write the numbers of all figures that the files under `top` allow to figures.json in `out`,
    then draw them; print what is missing for the others."""
    where = {what: folders.format(split=split) for what, folders in WHERE.items()}
    pictures: dict[str, tuple] = {}  # name -> (its numbers, the function that draws it, arguments)
    criteria = defaultdict(dict)  # task -> model -> method -> criterion -> (mean, low, high)
    for model in folders_in(top):
        if not any((model / k).is_dir() for k in (f"paths-{split}", "rd", "sert")):
            continue
        task, name = model.parent.name or "task", model.name
        title = name if name == task else f"{task}, {name}"
        ending = title.replace(", ", "-")
        found = {what: scores(model, folders, judge) for what, folders in where.items()}
        judged = [found[what] for what in ("paths", "raw", "raw sert")]
        sampled = [all_paths(model, where[what]) for what in ("paths", "raw", "raw sert")]
        for figure, some in (("kinds", sampled), ("fig1", judged)):
            if some[0] and (some[1] or figure == "kinds"):
                groups = token_groups(figure, *some)
                about = f"{title}, {len({r['id'] for r in some[0]})} questions"
                pictures[f"{figure}-{ending}"] = groups, plot_tokens, (about, groups, figure)
        if found["paths"]:
            numbers = ablation_numbers(curves := ablation(found["paths"]))
            pictures[f"fig4-{ending}"] = numbers, plot_ablation, (title, numbers, curves)
        if found["sert-rd"] and found["rd"]:
            criteria[task][name] = {m: summary(found[m], 0) for m in ("sert-rd", "rd")}
        if missing := [folders for what, folders in where.items() if not found[what]]:
            print(f"{model}: no judged {', '.join(missing)}; what needs them is left out")
    for task, by_model in criteria.items():
        order = sorted(by_model, key=lambda m: ([*SIZES, m].index(m), m))  # other models come last
        by_model = {model: by_model[model] for model in order}
        means = {name: {m: {k: round(of[k][0], 4) for k in KEYS} for m, of in both.items()}
                 for name, both in by_model.items()}  # fmt: skip
        pictures[f"fig3-{task}"] = means, plot_criteria, (task, by_model)
    need(pictures, f"nothing under {top} is sampled or judged; run sample.py --split {split}, "
         "evaluate.py --paths on its paths.jsonl and evaluate.py on SERT+RD and RD checkpoints "
         "first")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    numbers = {name: picture[0] for name, picture in pictures.items()}
    write_atomic(out / "figures.json", json.dumps(numbers, indent=1) + "\n")
    for name, (_, plot, arguments) in pictures.items():
        plot(out / f"{name}.png", *arguments)
    print("\n".join(f"wrote {out / name}.png" for name in pictures))


def plot_tokens(png: Path, title: str, groups: dict[str, list[float]], figure: str) -> None:
    """Fig. 1, or the kinds of paths: a bar per group and bin, as high as the share of questions."""
    bins, thing, what = TOKEN_FIGURES[figure]
    fig, ax = plt.subplots(figsize=(11, 4.6))
    width = 0.86 / 8
    for name, shares in groups.items():
        of = list(BARS).index(name)
        gap = 0.02 if of >= 5 else 0  # sets the bars of all samples apart from those of a branch
        x = [b + (of - 3.5) * width + gap for b in range(len(bins))]
        bars = ax.bar(x, shares, width * 0.92, color=BARS[name], label=name)
        if of >= 5:
            ax.bar_label(bars, [f"{v:.2f}" if v else "" for v in shares], fontsize=6, padding=2)
    ax.set_xticks(range(len(bins)), bins)
    ax.set_xlabel(f"{what} (Token 0 to 4: a question's samples of that branch; the others: all)")
    ax.set(ylabel="share of questions", ylim=(0, 1.08))
    title = f"Questions with at least one {thing}: {title}"
    save(fig, png, title, ncols=8, fontsize=9.5, columnspacing=1.5, handlelength=1.2)


def plot_criteria(png: Path, title: str, by_model: dict[str, dict[str, dict]]) -> None:
    """Fig. 3: mean and interval of each criterion's scores, SERT+RD and RD; a panel per model."""
    n = len(by_model)
    fig, axes = plt.subplots(1, n, figsize=(1.2 + 4.4 * n, 4), sharey=True, squeeze=False)
    styles = (("sert-rd", "SERT+RD", BLUE, -0.2), ("rd", "RD", ORANGE, 0.2))
    for ax, (model, both) in zip(axes[0], by_model.items()):
        for method, label, color, side in styles:
            values = [both[method][key] for key in KEYS]
            means, *spans = zip(*((m, m - low, high - m) for m, low, high in values))
            x = [i + side for i in range(len(KEYS))]
            bars = ax.bar(x, means, 0.36, color=color, label=label, yerr=spans, ecolor=INK)
            ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        ax.set_xticks(range(len(KEYS)), [key.replace(" ", "\n") for key in KEYS], fontsize=9)
        ax.set_title(model, fontsize=10.5)
    axes[0, 0].set_ylabel("mean judge score")
    save(fig, png, f"Reasoning of greedy outputs: {title}", ncols=2)


def plot_ablation(png: Path, title: str, numbers: dict, curves: dict[str, list[dict]]) -> None:
    """Fig. 4: the distribution of each criterion's scores (`numbers`) as the rules are switched on
    one by one (`curves`); a panel per criterion."""
    styles = dict(zip(curves, cycle(STYLES)))
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 6.6), sharex=True, sharey=True)
    for ax, key in zip(axes.flat, KEYS, strict=True):
        for name, found in numbers.get(key, {}).items():
            line, marker, color, size = styles[name]
            ax.plot(range(5), found["shares"], line, marker=marker, color=color, linewidth=1.7,
                    markersize=size, label=f"{name} ({len(curves[name]):,} paths)")  # fmt: skip
        means = " → ".join(f"{v['mean']:.1f}" for v in numbers.get(key, {}).values())
        ax.set_title(f"{key}    mean {means}", fontsize=10 if len(curves) < 6 else 8)
        ax.set_xticks(range(5), BINS)
    plt.setp(axes[1], xlabel="judge score")
    plt.setp(axes[:, 0], ylabel="share of paths")
    title = f"Each rule includes the ones before it: {title}"
    save(fig, png, title, ncols=5, fontsize=8.5, columnspacing=1.2)
