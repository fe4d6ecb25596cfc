"""What runs/paper.sh would do: every cell with its tokens and time. Reads no data, sends nothing.

Counts rest on what the data and the teachers' public files hold (means in GPT-2's tokens). Sampled
lengths are the cap with a third off, since rows end or are rejected early; every question is taken
to keep a path; greedy outputs have the paper's mean lengths. Times scale a rate of gpt2 with the
number of parameters: give your own with --sample-rate and --train-rate (tokens per second of gpt2).

    bash runs/paper.sh --dry-run --device cuda
"""

import argparse

TASKS = {  # train, test, tokens of a prompt, of a kept rationale, kept rationales, words of outputs
    "strategy_qa": (1603, 687, 17, 84, 875, 120),
    "commonsense_qa": (9741, 1221, 51, 28, 7377, 125),
}
PARAMETERS = {"gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6,
              "distilgpt2": 82e6}  # fmt: skip
RATES = {"cpu": (500, 300), "cuda": (30_000, 60_000)}  # sampling, training; assumed, of gpt2
PATHS, CAP, EPOCHS, ANSWER = 25, 128, 20, 8
JUDGE_IN, JUDGE_OUT = 420, 220  # tokens of a judge request and its reply


def cell(task: str, method: str, limit: int | None) -> tuple[int, int, int]:
    """(tokens sampled, trained on, decoded greedily) of one cell; SERT+RD starts from SERT's."""
    train, test, prompt, rationale, kept, words = TASKS[task]
    if limit:
        train, test, kept = min(train, limit), min(test, limit), min(kept, limit)
    path = CAP * 2 // 3
    sampled = train * PATHS * path if method == "sert" else 0
    learnt = {
        "finetune": train * (prompt + ANSWER),
        "sert": train * (prompt + path + ANSWER),
        "rd": kept * (prompt + 7 + rationale + ANSWER),
        "sert-rd": kept * (prompt + 7 + rationale + ANSWER),
    }[method]
    decoded = test * (ANSWER if method == "finetune" else words * 4 // 3)
    return sampled, EPOCHS * learnt, decoded


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def main(argv=None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--models", nargs="+", default=["gpt2", "gpt2-medium", "gpt2-large"])
    p.add_argument("--methods", nargs="+", default=["finetune", "sert", "sert-rd", "rd"],
                   choices=("finetune", "sert", "sert-rd", "rd"))  # fmt: skip
    p.add_argument("--limit", type=int)
    p.add_argument("--judge", action="store_true")
    p.add_argument("--device", choices=RATES, default="cuda")
    p.add_argument("--sample-rate", type=float, help="tokens per second of gpt2")
    p.add_argument("--train-rate", type=float, help="tokens per second of gpt2")
    p.add_argument("--price-in", type=float, help="USD per million tokens of the judge")
    p.add_argument("--price-out", type=float, help="USD per million tokens of the judge")
    args = p.parse_args(argv)
    sample, train = RATES[args.device]
    sample, train = args.sample_rate or sample, args.train_rate or train
    print(f"{'':<44}{'sampled':>13}{'trained on':>13}{'decoded':>11}   about")
    total, judged = 0.0, 0
    for task in args.tasks:
        for model in args.models:
            # a folder's size is not known here: as gpt2
            size = PARAMETERS.get(model, PARAMETERS["gpt2"]) / PARAMETERS["gpt2"]
            for method in args.methods:
                n_sampled, n_trained, n_decoded = cell(task, method, args.limit)
                seconds = size * ((n_sampled + n_decoded) / sample + n_trained / train)
                total += seconds
                name = f"{task:<16}{model[-16:]:<17}{method:<9}"
                print(f"{name:<44}{n_sampled:>13,}{n_trained:>13,}{n_decoded:>11,}   "
                      f"{hours(seconds)}")  # fmt: skip
                test = TASKS[task][1]
                judged += 0 if method == "finetune" else min(test, args.limit or test)
            judged += 3 * PATHS * min(100, args.limit or 100) if args.judge else 0
    print(f"in all about {hours(total)} at {sample:,.0f} sampled and {train:,.0f} trained tokens "
          f"per second of gpt2 ({args.device}; an assumption, see --help)")  # fmt: skip
    n_in, n_out = judged * JUDGE_IN, judged * JUDGE_OUT
    with_figures = " (figures included)" if args.judge else ", and figures"
    text = f"a judge would get {judged:,} requests{with_figures}: about {n_in:,} tokens in"
    text += f" and {n_out:,} out"
    if args.price_in is not None and args.price_out is not None:
        text += f", {(n_in * args.price_in + n_out * args.price_out) / 1e6:.2f} USD"
    print(text)


if __name__ == "__main__":
    main()
