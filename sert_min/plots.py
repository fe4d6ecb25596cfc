"""Pictures from the JSONL files: the training curve."""

from pathlib import Path

from sert_min.store import read_jsonl


def plot_training(metrics: Path, png: Path, title: str) -> None:
    """Loss of each step with a centred mean over a fortieth of the run and, with --holdout, the
    validation loss and, below, the validation accuracy of each epoch."""
    import matplotlib

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
