"""Do the paper's two claims hold in the micro-world? Four methods, several seeds, controls.

Claims [SERT §III-B]: SERT above Finetune, and SERT+RD above RD, here at a number of teacher
rationales that was fixed beforehand (--n). Every seed samples its own paths, draws its own subset of
questions for the teacher and shuffles its own batches; all seeds share the one pretrained student.
Controls: Finetune+RD (saw the same gold labels as SERT+RD, but no paths) and RD for as many steps as
SERT+RD took in both stages. Intervals: paired bootstrap over seeds and test questions.

    python bench/micro_experiment.py --out out/experiment        # repeat to continue

Writes results-seedN.jsonl (a line per trained student, with every test answer) and summary.json.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import numpy as np
import torch

from bench.common import machine
from sert_min import prompts, tasks
from sert_min.answers import strip_answer_sentence
from sert_min.finetune import TrainSettings, encode_example, fit
from sert_min.io.errors import need, run_script
from sert_min.io.files import (
    append_durable,
    check_settings,
    lock_folder,
    read_jsonl,
    set_torn_tail_aside,
    to_line,
    write_atomic,
)
from sert_min.io.hub import find_model, weights_hash
from sert_min.metrics import grade, greedy
from sert_min.micro import measure, program, world
from sert_min.models import load_model
from sert_min.tokenizer import load_tokenizer

CURVES = ("RD", "SERT+RD", "Finetune+RD", "RD, steps of SERT+RD")


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--n", type=int, default=40, help="rationales of the headline comparison")
    p.add_argument("--curve", default="10,20,40,80,160,400", help="numbers of rationales")
    p.add_argument("--epochs", type=int, default=tasks.get("micro").preset["epochs"])
    p.add_argument("--test", type=int, default=400, help="test questions")
    p.add_argument("--train", type=int, default=400, help="train questions")
    p.add_argument("--model", default="micro")
    p.add_argument("--teacher", choices=("other", "own"), default="other",
                   help="the teacher's wording: its own, or the student's latent one")  # fmt: skip
    p.add_argument("--workers", type=int, default=os.cpu_count())
    p.add_argument("--quick", action="store_true", help="2 seeds, 3 numbers, 100 test questions")
    p.add_argument("--out", default="out/experiment")
    p.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.quick:
        args.seeds, args.curve, args.test = 2, f"{args.n},160", 100
    return args


# --- one student ----------------------------------------------------------------------------------


def trained(model, pairs: list, tokenizer, epochs: int, seed: int, steps: int | None = None):
    """A copy of `model` fine-tuned on (prompt, completion) pairs; (student, steps taken)."""
    student = copy.deepcopy(model)
    examples = [encode_example(tokenizer, *pair) for pair in pairs]
    if steps:  # as many epochs as these take
        epochs = steps // TrainSettings(epochs=1).steps(len(pairs)) + 1
    s = TrainSettings(epochs=epochs, seed=seed, max_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        fit(student, examples, [str(i) for i in range(len(pairs))], Path(folder), s)
    return student, s.steps(len(pairs))


def tested(student, tokenizer, questions: list, suffix: str) -> dict:
    """Greedy test answers as a string of 0 and 1, and the share of outputs that reason."""
    outputs = greedy(student, tokenizer, questions, suffix, world.PRESET["max_new_tokens"])
    records = [grade(q, text, finish) for q, (text, finish) in zip(questions, outputs)]
    reasoned = [program.check_path(q, t)["stated"] > 0 for q, (t, _) in zip(questions, outputs)]
    return {
        "correct": "".join(str(int(r["correct"])) for r in records),
        "unreadable": sum(r["extracted"] is None for r in records),
        "reasoning": round(sum(reasoned) / len(reasoned), 4),
    }


def selected_pairs(model, tokenizer, questions: list, seed: int) -> tuple[list, dict]:
    """SERT's training pairs from this seed's own samples, and how good the paths are."""
    pairs, right, contradict, by_id = [], 0, 0, {q.id: q for q in questions}
    for r in measure.sampled(model, tokenizer, questions, replace(measure.SETTINGS, seed=seed)):
        q, (text, _) = by_id[r["id"]], strip_answer_sentence(r["text"])
        if r["verdict"] == "selected" and text:  # train.py leaves empty ones out as well
            seen = program.check_path(q, text)
            right += seen["facts"] and seen["relation"] and seen["verdict"]
            contradict += bool(seen["stated"] and not seen["gold"])
            pairs.append(prompts.sert_pair(q, text))
    return pairs, {"selected": len(pairs), "right": right, "contradict_gold": contradict}


def rationale(q, wording: str) -> str:
    """A right rationale: in the teacher's wording, or in that of the student's latent paths."""
    if wording == "other":
        return program.teacher_rationale(q)
    asked = program.parse_question(q)
    t = asked.world.home[asked.person]
    v = asked.world.value[asked.relation, t]
    rng = random.Random(q.id)
    text = world.latent_reasoning(rng, asked.relation, asked.person, t, v, asked.value)
    return strip_answer_sentence(text)[0]


# --- one seed -------------------------------------------------------------------------------------


def run_seed(args, seed: int, done: set, save) -> None:
    """All students of a seed; what is in `done` is skipped."""
    torch.set_num_threads(1)
    folder = find_model(args.model)
    base, tokenizer = load_model(folder), load_tokenizer(folder)
    train = tasks.load("micro", "train")[: args.train]
    test = tasks.load("micro", "test")[: args.test]
    shuffled = train[:]
    random.Random(f"teacher {seed}").shuffle(shuffled)
    numbers = [min(int(n), len(train)) for n in args.curve.split(",")]

    def finish(method: str, n: int, student, steps: int, suffix: str, start, **more) -> None:
        result = {"seed": seed, "method": method, "n": n, "steps": steps}
        result |= tested(student, tokenizer, test, suffix)
        save({**result, **more, "seconds": round(time.perf_counter() - start, 1)})

    # 1. The student as it is, and the stages without a teacher.
    start = time.perf_counter()
    if ("base", 0) not in done:
        finish("base", 0, base, 0, "", start)
    start = time.perf_counter()
    pairs, quality = selected_pairs(base, tokenizer, train, seed)
    sert, sert_steps = trained(base, pairs, tokenizer, args.epochs, seed)
    if ("SERT", 0) not in done:
        finish("SERT", 0, sert, sert_steps, "", start, **quality)
    start = time.perf_counter()
    labels = [prompts.finetune_pair(q) for q in train]
    labelled, label_steps = trained(base, labels, tokenizer, args.epochs, seed)
    if ("Finetune", 0) not in done:
        finish("Finetune", 0, labelled, label_steps, "", start)

    # 2. n rationales: from the raw student, from SERT, and the two controls.
    for n in numbers:
        rationales = [prompts.rd_pair(q, rationale(q, args.teacher)) for q in shuffled[:n]]
        rd_steps = args.epochs * -(-n // TrainSettings.batch_size)
        plans = {
            "RD": (base, None),
            "SERT+RD": (sert, None),
            "Finetune+RD": (labelled, None),
            "RD, steps of SERT+RD": (base, sert_steps + rd_steps),
        }
        for method, (parent, steps) in plans.items():
            if (method, n) in done:
                continue
            start = time.perf_counter()
            student, taken = trained(parent, rationales, tokenizer, args.epochs, seed, steps)
            finish(method, n, student, taken, prompts.COT_SUFFIX, start)


def work(args, out: Path) -> None:
    """The seeds of one worker, each result durable as soon as it is there."""
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        if (seed - args.first_seed) % args.workers != args.worker:
            continue
        path = out / f"results-seed{seed}.jsonl"
        set_torn_tail_aside(path)
        there = list(read_jsonl(path)) if path.exists() else []

        def save(result: dict, path=path) -> None:
            append_durable(path, to_line(result))
            accuracy = result["correct"].count("1") / len(result["correct"])
            name = f"{result['method']} n={result['n']}"
            seconds = f"{result['seconds']:.0f} s"
            print(f"seed {result['seed']}  {name:28} {accuracy:6.1%}  {seconds}", flush=True)

        run_seed(args, seed, {(r["method"], r["n"]) for r in there}, save)


# --- the answer -----------------------------------------------------------------------------------


def matrix(results: list[dict], method: str, n: int) -> np.ndarray:
    """Correct answers [seeds, questions] of a method, seeds in order."""
    rows = sorted(
        (r["seed"], r["correct"]) for r in results if (r["method"], r["n"]) == (method, n)
    )
    return np.array([[c == "1" for c in correct] for _, correct in rows], dtype=float)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, times: int = 10_000) -> tuple:
    """(mean of a - b, low, high): 95 % over resampled seeds and questions, the same for both."""
    rng, d = np.random.default_rng(0), a - b
    S, Q = d.shape
    means = np.empty(times)
    for i in range(times):
        means[i] = d[rng.integers(0, S, S)][:, rng.integers(0, Q, Q)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return d.mean(), low, high


def summarize(args, results: list[dict]) -> dict:
    numbers = [min(int(n), args.train) for n in args.curve.split(",")]
    rows = {}
    print(f"\n{'method':26}{'rationales':>11}{'accuracy':>10}   by seed")
    for method, n in [("base", 0), ("Finetune", 0), ("SERT", 0)] + [(m, args.n) for m in CURVES]:
        a = matrix(results, method, n).mean(1)
        rows[f"{method} n={n}"] = {"accuracy": a.mean(), "by_seed": a.round(4).tolist()}
        print(f"{method:26}{n:>11}{a.mean():>10.1%}   " + " ".join(f"{x:.1%}" for x in a))
    claims = {}
    print(f"\n{'paired differences':42}{'mean':>8}   95 % (bootstrap over seeds and questions)")
    for (m1, n1), (m2, n2) in (
        (("SERT", 0), ("Finetune", 0)),
        (("SERT+RD", args.n), ("RD", args.n)),
        (("SERT+RD", args.n), ("Finetune+RD", args.n)),
        (("SERT+RD", args.n), ("RD, steps of SERT+RD", args.n)),
    ):
        mean, low, high = paired_bootstrap(matrix(results, m1, n1), matrix(results, m2, n2))
        holds = "holds" if low > 0 else "does not hold" if high < 0 else "open"
        claims[f"{m1} - {m2}"] = {"mean": mean, "low": low, "high": high, "verdict": holds}
        print(f"{m1 + ' above ' + m2:42}{mean:>+8.1%}   {low:+.1%} to {high:+.1%}   {holds}")
    curve = {m: [matrix(results, m, n).mean() for n in numbers] for m in CURVES}
    start = {"SERT+RD": "SERT", "Finetune+RD": "Finetune"}
    print(f"\n{'accuracy by number of rationales':26}" + "".join(f"{n:>8}" for n in [0, *numbers]) + "    area")  # fmt: skip
    areas = {}
    for m, values in curve.items():
        values = [matrix(results, start.get(m, "base"), 0).mean(), *values]
        curve[m] = values
        x, y = np.array([0, *numbers]), np.array(values)
        areas[m] = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / numbers[-1])
        print(f"{m:26}" + "".join(f"{v:>8.1%}" for v in values) + f"{areas[m]:>8.3f}")
    paths = [r for r in results if r["method"] == "SERT"]
    selected = sum(r["selected"] for r in paths)
    against = sum(r["contradict_gold"] for r in paths) / selected
    right = sum(r["right"] for r in paths) / selected
    print(f"\nself-generated paths: {selected} selected, {right:.1%} right in facts, relation and "
          f"verdict; {against:.1%} contradict the gold answer appended to them")  # fmt: skip
    return {
        "machine": machine(), "args": {k: v for k, v in vars(args).items() if k != "worker"},
        "accuracy": rows, "claims": claims, "numbers": [0, *numbers], "curve": curve,
        "area": areas, "selected_right": right, "selected_contradict_gold": against,
    }  # fmt: skip


def main(args) -> None:
    out = Path(args.out)
    if args.worker is not None:
        return work(args, out)
    need(str(args.n) in args.curve.split(","), f"--n {args.n} must be one of --curve {args.curve}")
    start = time.perf_counter()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with lock_folder(out):
        names = ("curve", "epochs", "test", "train", "model", "teacher")
        fixed = {k: getattr(args, k) for k in names}
        fixed["weights"] = weights_hash(find_model(args.model))
        check_settings(out / "settings.json", fixed, "choose another --out")
        command = [sys.executable, __file__, *sys.argv[1:], "--workers", str(args.workers)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        numbers = range(args.workers)
        workers = [subprocess.Popen([*command, "--worker", str(i)], env=env) for i in numbers]
        failed = any([p.wait() for p in workers])
        need(not failed, "a worker failed, see above; repeat the command to continue")
        results = [r for n in seeds for r in read_jsonl(out / f"results-seed{n}.jsonl")]
        summary = summarize(args, results)
        summary["minutes"] = round((time.perf_counter() - start) / 60, 1)
        write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"\nwrote {out}/summary.json; {summary['minutes']} minutes")
    return None


if __name__ == "__main__":
    run_script(main, parse_args())
