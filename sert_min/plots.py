"""Pictures from the JSONL files: the training curve."""

from pathlib import Path

from sert_min.store import read_jsonl


def plot_training(metrics: Path, png: Path, title: str) -> None:
    """Loss per step (thin: each batch, thick: running mean) and, with --holdout, validation loss
    and accuracy per epoch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(read_jsonl(metrics))
    steps = [r for r in records if "loss" in r]
    epochs = [r for r in records if "validation_loss" in r]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    x, y, smooth, mean = [r["step"] for r in steps], [r["loss"] for r in steps], [], None
    for value in y:
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        smooth.append(mean)
    ax.plot(x, y, color="#9bb8d3", linewidth=0.6, label="loss of each batch")
    ax.plot(x, smooth, color="#1f4e79", linewidth=1.8, label="running mean")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=title, ylim=(0, None))
    if epochs:
        at = [r["step"] for r in epochs]
        ax.plot(
            at, [r["validation_loss"] for r in epochs], "o-", color="#c0504d", label="validation"
        )
        right = ax.twinx()
        right.plot(at, [r["validation_acc"] for r in epochs], "s--", color="#6a8f3c", markersize=4)
        right.set(ylabel="validation accuracy (green)", ylim=(0, 1))
    ax.legend(frameon=False)
    fig.savefig(png, dpi=130)
    plt.close(fig)
