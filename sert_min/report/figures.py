"""Pictures from the JSONL files: the training curve, and Figures 1, 3, 4 of the paper."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from sert_min.filters import RULES
from sert_min.io.errors import SertError
from sert_min.io.files import read_json, read_jsonl, write_atomic
from sert_min.metrics import mean_interval
from sert_min.report.judge import KEYS, SCORED


def plot_training(metrics: Path, png: Path, title: str) -> None:
    """Loss of each step with a centred mean over a fortieth of the run and, with --holdout, the
    validation loss and, below, the validation accuracy of each epoch."""

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(read_jsonl(metrics))
    steps = [r for r in records if "loss" in r]
    epochs = [r for r in records if "validation_loss" in r]
    x, y = [r["step"] for r in steps], [r["loss"] for r in steps]
    half = max(1, len(y) // 80)
    smooth = [sum(w) / len(w) for w in (y[max(0, i - half) : i + half + 1] for i in range(len(y)))]

    fig, axes = plt.subplots(
        2 if epochs else 1,
        figsize=(7, 5 if epochs else 3.6),
        layout="constrained",
        sharex=True,
        squeeze=False,
        height_ratios=[2.2, 1] if epochs else None,
    )
    top, bottom = axes[0, 0], axes[-1, 0]
    top.plot(x, y, color="#a9c3dc", linewidth=0.7, label="each batch")
    top.plot(x, smooth, color="#1f4e79", linewidth=1.8, label=f"mean of {2 * half + 1} steps")
    top.set(ylabel="loss (nats per token)", ylim=(0, None))
    top.set_title(title, loc="left")
    if epochs:
        at, green = [r["step"] for r in epochs], "#4f7f2a"
        losses = [r["validation_loss"] for r in epochs]
        top.plot(at, losses, "o-", color="#c0504d", markersize=4, label="validation")
        bottom.plot(at, [r["validation_acc"] for r in epochs], "s-", color=green, markersize=4)
        bottom.set(ylabel="validation accuracy", ylim=(0, 1))
    bottom.set_xlabel("step")
    top.legend(frameon=False)
    for ax in axes[:, 0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
    fig.savefig(png, dpi=130)
    plt.close(fig)


# --- Figures 1, 3, 4 of the paper -----------------------------------------------------------------
#
# Read from scores-JUDGE.jsonl beside paths.jsonl and predictions.jsonl. Under a model's folder:
#   paths-SPLIT/seedN              branched samples: Token 0..4, Token All, and all of Fig. 4
#   paths-raw-SPLIT/seedN          plain samples: Raw
#   sert/seedN/paths-raw-SPLIT     plain samples of the self-trained student: Raw SERT
#   {rd,sert-rd}/seedN             greedy outputs: Fig. 3

BINS = ("0–2", "2–4", "4–6", "6–8", "8–10")  # [0,2) [2,4) [4,6) [6,8) [8,10]
# Okabe and Ito's colours, told apart with any colour vision, and by lightness in print
ORANGE, SKY, GREEN, BLUE, RED, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#8C8C8C")  # fmt: skip
TOKENS = ("#DCE9F5", "#BFD8EC", "#9CC3E1", "#78ADD4", "#5596C6")  # Token 0..4, a family
INK = "#333333"


def bin_of(score: float) -> int:
    """Which of the five bins a score from 0 to 10 falls into.

    >>> [bin_of(x) for x in (0, 1.99, 2, 8, 10)]
    [0, 0, 1, 4, 4]
    """
    return min(int(score // 2), 4)


def question_shares(scored: Iterable[dict]) -> list[float]:
    """Per bin the share of questions with at least one output in it, by the mean of the four
    scores (Fig. 1); outputs with a missing score count for nothing."""
    bins: dict[str, set[int]] = {}
    for r in scored:
        found = bins.setdefault(r["id"], set())
        if r["mean"] is not None:
            found.add(bin_of(r["mean"]))
    return [sum(b in found for found in bins.values()) / max(1, len(bins)) for b in range(5)]


def token_groups(paths: list[dict], raw: list[dict], raw_sert: list[dict]) -> dict:
    """Fig. 1's eight bars: name -> shares per bin; samples that are not there have no bar."""
    groups = {f"Token {b}": [r for r in paths if r["branch"] == b] for b in range(5)}
    groups |= {"Token All": paths, "Raw": raw, "Raw SERT": raw_sert}
    return {name: question_shares(some) for name, some in groups.items() if some}


def ablation(scored: list[dict]) -> dict[str, list[dict]]:
    """Fig. 4's curves: what is left when the rules are switched on one by one. The rules ran in
    this order and a verdict names the first that a path broke, so the same samples serve all."""
    left, curves = list(scored), {"raw": scored}
    for rule in RULES:
        left = [r for r in left if r["verdict"].split(":")[0] != rule]
        curves[f"+ {rule}"] = left
    return curves


def score_shares(scored: Iterable[dict], key: str) -> list[float]:
    """Per bin the share of outputs whose score for a criterion lies in it."""
    values = [r["scores"][key] for r in scored if r["scores"][key] is not None]
    return [sum(bin_of(v) == b for v in values) / max(1, len(values)) for b in range(5)]


def score_file(folder: Path, judge: str | None) -> Path | None:
    """The scores in a folder; which judge's must be said if there are several."""
    found = sorted(folder.glob("scores-*.jsonl"))
    if judge:
        name = re.sub(r"[^\w.-]", "-", judge)[:80]
        found = [path for path in found if path.stem == f"scores-{name}"]
    if len(found) > 1:
        raise SertError(f"{folder} has scores of several judges; choose one with --judge-model")
    return found[0] if found else None


def path_scores(folder: Path, judge: str | None) -> list[dict]:
    """Score records of a run of sample.py; paths that early rejection cut short are refused."""
    if not (path := score_file(folder, judge)):
        return []
    settings = folder / "settings.json"
    if settings.exists() and read_json(settings).get("early_reject"):
        raise SertError(
            f"{folder} was sampled with early rejection: its texts are cut short, and a figure of "
            "their scores would be wrong; sample with --no-early-reject into another --out-dir"
        )
    return list(read_jsonl(path, SCORED))


def first_seed(folder: Path, judge: str | None) -> Path:
    """The first seedN folder that has scores, or the first."""
    seeds = sorted(folder.glob("seed*"))
    return next((s for s in seeds if score_file(s, judge)), (seeds or [folder / "seed0"])[0])


def draw_figures(top: Path, out: Path, split: str, judge: str | None) -> None:
    """Every figure that the files under `top` allow, as PNG in `out`, and their numbers in
    figures.json; says what is missing for the others."""
    folders = [p for p in (top, *sorted(top.rglob("*"))) if p.is_dir()]
    models = [p for p in folders if any((p / k).is_dir() for k in (f"paths-{split}", "rd", "sert"))]
    numbers: dict = {}
    criteria: dict[str, dict] = {}
    for model in models:
        task, name = model.parent.name or "task", model.name
        paths = path_scores(first_seed(model / f"paths-{split}", judge), judge)
        raw = path_scores(first_seed(model / f"paths-raw-{split}", judge), judge)
        seeds = sorted((model / "sert").glob(f"seed*/paths-raw-{split}"))
        raw_sert = next(filter(None, (path_scores(seed, judge) for seed in seeds)), [])
        title = name if name == task else f"{task}, {name}"
        file = title.replace(", ", "-")
        if paths and raw:
            groups = numbers[f"fig1-{file}"] = token_groups(paths, raw, raw_sert)
            n = len({r["id"] for r in paths})
            plot_tokens(groups, out / f"fig1-{file}.png", f"{title}, {n} questions")
        if paths:
            curves = ablation(paths)
            numbers[f"fig4-{file}"] = plot_ablation(curves, out / f"fig4-{file}.png", title)
        pair = {m: first_seed(model / m, judge) for m in ("sert-rd", "rd")}
        files = {m: score_file(folder, judge) for m, folder in pair.items()}
        if all(files.values()):
            criteria.setdefault(task, {})[name] = {
                m: list(read_jsonl(path)) for m, path in files.items()
            }
        have = {f"paths-{split}": paths, f"paths-raw-{split}": raw,
                f"sert/seedN/paths-raw-{split}": raw_sert, "sert-rd and rd": all(files.values())}  # fmt: skip
        if missing := [what for what, there in have.items() if not there]:
            print(f"{model}: no judged {', '.join(missing)}; what needs them is left out")
    for task, by_model in criteria.items():
        by_model = dict(sorted(by_model.items(), key=lambda item: size_order(item[0])))
        numbers[f"fig3-{task}"] = plot_criteria(by_model, out / f"fig3-{task}.png", task)
    if not numbers:
        raise SertError(
            f"nothing under {top} is judged; run evaluate.py --paths on paths.jsonl files and "
            "evaluate.py on SERT+RD and RD checkpoints first"
        )
    write_atomic(out / "figures.json", json.dumps(numbers, indent=1) + "\n")
    print("\n".join(f"wrote {path}" for path in sorted(out.glob("fig*.png"))))


def size_order(model: str) -> tuple[int, str]:
    """Sorts gpt2 before gpt2-medium before gpt2-large; other names behind them."""
    names = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return (names.index(model) if model in names else len(names)), model


def canvas(out: Path, *shape, **options):
    """A figure without a screen; its folder is made."""

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    fig, axes = plt.subplots(*shape, layout="constrained", squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#AAAAAA")
        ax.tick_params(colors=INK, length=0)
        ax.grid(axis="y", color="#E8E8E8", linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def save(fig, png: Path) -> None:
    """Write and forget a figure; no version or date in the file, so equal data gives equal bytes."""

    fig.savefig(png, dpi=150, metadata={"Software": None})
    plt.close(fig)


def plot_tokens(groups: dict[str, list[float]], png: Path, title: str) -> None:
    """Fig. 1: per score bin the share of questions with at least one such output."""
    colors = dict(zip((f"Token {b}" for b in range(5)), TOKENS))
    colors |= {"Token All": BLUE, "Raw": GREY, "Raw SERT": ORANGE}
    fig, axes = canvas(png, 1, 1, figsize=(11, 4.6))
    ax, width = axes[0, 0], 0.86 / 8
    for name, shares in groups.items():
        of = list(colors).index(name)
        gap = 0.02 if of >= 5 else 0  # sets the 25-sample bars apart from the 5-sample ones
        x = [b + (of - 3.5) * width + gap for b in range(5)]
        ax.bar(x, shares, width * 0.92, color=colors[name], label=name)
        for at, share in zip(x, shares) if of >= 5 else ():
            text = "1" if share == 1 else f"{share:.2f}".removeprefix("0") if share else ""
            ax.text(at, share + 0.012, text, ha="center", fontsize=8, color=INK)
    ax.set_xticks(range(5), BINS)
    ax.set_xlabel("mean of the four judge scores (Token 0 to 4: 5 samples per question each; the "
                  "others: 25)", color=INK)  # fmt: skip
    ax.set_ylabel("share of questions", color=INK)
    ax.set_ylim(0, 1.08)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    fig.suptitle(f"Questions with at least one output of a quality: {title}", x=0.01, ha="left",
                 fontsize=12, color=INK)  # fmt: skip
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8,
               frameon=False, fontsize=9.5, columnspacing=1.5, handlelength=1.2)  # fmt: skip
    save(fig, png)


def plot_criteria(by_model: dict[str, dict[str, list[dict]]], png: Path, title: str) -> dict:
    """Fig. 3: mean score of each criterion with its 95 % interval, SERT+RD against RD; a panel per
    model. Returns the numbers."""

    fig, axes = canvas(png, 1, len(by_model), figsize=(1.2 + 4.4 * len(by_model), 4), sharey=True)
    numbers: dict = {}
    styles = (("sert-rd", "SERT+RD", BLUE, -1), ("rd", "RD", ORANGE, 1))
    for ax, (model, methods) in zip(axes[0], by_model.items()):
        for method, label, color, side in styles:
            values = {k: [r["scores"][k] for r in methods[method]] for k in KEYS}
            stats = {k: mean_interval([v for v in vs if v is not None]) for k, vs in values.items()}
            numbers.setdefault(model, {})[method] = {k: round(s[0], 4) for k, s in stats.items()}
            x, means = [i + side * 0.2 for i in range(len(KEYS))], [s[0] for s in stats.values()]
            ends = [[max(0, s[0] - s[1]) for s in stats.values()],
                    [max(0, s[2] - s[0]) for s in stats.values()]]  # fmt: skip
            ax.bar(x, means, 0.36, color=color, label=label)
            ax.errorbar(x, means, ends, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
            for at, mean, up in zip(x, means, ends[1]):
                ax.text(at, mean + up + 0.15, f"{mean:.2f}", ha="center", fontsize=8, color=INK)
        ax.set_xticks(range(len(KEYS)), [key.replace(" ", "\n") for key in KEYS])
        ax.tick_params(axis="x", labelsize=9)
        ax.set_title(model, fontsize=10.5, color=INK)
        ax.set_yticks(range(0, 11, 2))
    most = max(mean for of in numbers.values() for means in of.values() for mean in means.values())
    axes[0, 0].set_ylim(0, min(10, most) + 1)
    axes[0, 0].set_ylabel("mean judge score", color=INK)
    fig.suptitle(f"Reasoning of greedy outputs: {title}", x=0.01, ha="left", fontsize=12, color=INK)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
               frameon=False)  # fmt: skip
    save(fig, png)
    return numbers


def plot_ablation(curves: dict[str, list[dict]], png: Path, title: str) -> dict:
    """Fig. 4: the distribution of each criterion's scores as the rules are switched on one by one;
    a panel per criterion. Returns the numbers."""
    colors = (GREY, SKY, GREEN, ORANGE, RED)
    # later marks smaller: where curves lie on one another, all marks show
    styles = (("--", "o", 9), ("-", "s", 8.5), ("-", "^", 7.5), ("-", "D", 5), ("-", "v", 3.5))
    fig, axes = canvas(png, 2, 2, figsize=(9.6, 6.6), sharex=True, sharey=True)
    numbers: dict = {}
    for ax, key in zip(axes.flat, KEYS, strict=True):
        for (name, some), color, (line, marker, size) in zip(
            curves.items(), colors, styles, strict=True
        ):
            if not any(r["scores"][key] is not None for r in some):
                continue
            values = [r["scores"][key] for r in some if r["scores"][key] is not None]
            shares, mean = score_shares(some, key), sum(values) / len(values)
            numbers.setdefault(key, {})[name] = {"mean": round(mean, 4), "n": len(values),
                                                 "shares": [round(s, 4) for s in shares]}  # fmt: skip
            label = f"{name} ({len(some):,} paths)"
            ax.plot(range(5), shares, line, marker=marker, color=color, label=label,
                    linewidth=1.7, markersize=size)  # fmt: skip
        means = " → ".join(f"{v['mean']:.1f}" for v in numbers.get(key, {}).values())
        ax.set_title(f"{key}    mean {means}", loc="left", fontsize=10, color=INK)
        ax.set_xticks(range(5), BINS)
    top = max(share for of in numbers.values() for v in of.values() for share in v["shares"])
    axes[0, 0].set_ylim(-0.035 * top, 1.08 * top)  # shared by all; whole marks
    for ax in axes[1]:
        ax.set_xlabel("judge score", color=INK)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of paths", color=INK)
    fig.suptitle(f"Each rule includes the ones before it: {title}", x=0.01, ha="left", fontsize=12,
                 color=INK)  # fmt: skip
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
               frameon=False, fontsize=8.5, columnspacing=1.2)  # fmt: skip
    save(fig, png)
    return numbers
