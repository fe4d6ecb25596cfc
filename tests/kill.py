"""Kill sample, train, distill and evaluate anywhere, repeat them, compare every byte.

    PYTHONPATH=. python tests/kill.py [--kills 200] [--seed 0] [--only distill]

A run is a forked child of this process (its imports are done, so a run takes a fraction of a second).
The child traces its own lines and kills itself at one of them, chosen at random inside a phase that
is chosen in turn, or after half of an os.write; a fifth of the runs is killed from outside after a
random time. Every sixth gets SIGTERM instead of SIGKILL. After one to four kills, with the folder
renamed now and then, the command may end. Then the files that a command promises are compared with
those of an uninterrupted run. distill asks a teacher in a process of its own that counts requests.

Prints each kill and a table; fails if a record is lost or there twice, a byte differs, a file is
left over, a reply is bought again, or (with enough kills) a phase was never hit.
"""

import argparse
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import ROOT, make_tiny_model
from fake_server import FakeServer, by_body, error, ok
from test_sample import make_older

import distill
import evaluate
import sample
import train
from sert_min import models, prompts, tasks
from sert_min.io import endpoint
from sert_min.io.files import read_jsonl, set_torn_tail_aside

TORN, TIMED = "half a line", "random moment"
TRAINING = {
    "finetune.train_step": "step",
    "finetune.fit": "loop",
    "finetune.note": "metrics line",
    "state.save_state": "state write",
    "state.load_state": "resume",
    "finetune.keep_metrics_before": "resume",
    "models.save_model": "checkpoint write",
    "figures.plot_training": "curve",
}


class Command(NamedTuple):
    """A command line, and what is looked at when it is killed."""

    script: object
    flags: str
    phases: dict[str, str]  # innermost known function on the stack -> phase
    files: tuple[str, ...]  # the same bytes are promised
    before: Callable[[Path], None] | None = None  # it starts from a sampled folder, changed by this


SAMPLE = "--limit 6 --block-questions 2 --max-new-tokens 6 --patterns none --min-perplexity 0"
LOOSE = f"{SAMPLE} --min-tokens 2 --max-rep2 0.9"
STUDENT = "--epochs 2 --batch-size 4 --report 0 --save-seconds 0"
BLOCKS = tuple(f"blocks/{i:06d}-2.jsonl" for i in range(3))
SAMPLED = (*sample.DERIVED, *BLOCKS)
SAMPLING = {
    "sample.prepare": "start",
    "files.check_settings": "settings",
    "sample.sample_missing": "block file",
    "sample.write_derived": "derived files",
    "console.print_paths": "summary",
}
WEIGHTS = "last/model.safetensors", "metrics.jsonl"
COMMANDS = {
    "sample": Command(sample, LOOSE, {**SAMPLING, "generate.sample_paths": "sampling"}, SAMPLED),
    "filter anew": Command(
        sample, f"{SAMPLE} --min-tokens 3 --max-rep2 0.5", SAMPLING, SAMPLED, lambda out: None
    ),
    "older folder": Command(
        sample, LOOSE, {**SAMPLING, "sample.convert": "conversion"}, SAMPLED, make_older
    ),
    "train": Command(
        train,
        f"--method finetune --limit 16 --holdout {STUDENT}",
        {**TRAINING, "train.prepare": "start", "train.validate": "validation"},
        (*WEIGHTS, "best/model.safetensors"),
    ),
    "distill": Command(
        distill,
        f"--teacher-model fake --keep all --limit 10 --concurrency 3 {STUDENT}",
        {
            **TRAINING,
            "endpoint.load": "resume",
            "endpoint.note": "note of a request or a refusal",
            "endpoint.add": "reply",
            "endpoint.receive": "waiting",
            "endpoint.leave": "sending",
            "rationales.rationale_records": "cleaning",
            "distill.save_records": "rationales",
            "train.prepare": "start",
        },
        (*WEIGHTS, "rationales.jsonl"),
    ),
    "evaluate": Command(
        evaluate,
        "--limit 6 --block-questions 2 --max-new-tokens 8 --by likelihood",
        {
            "evaluate.settle": "start",
            "files.check_settings": "settings",
            "evaluate.missing": "resume",
            "metrics.greedy": "decoding",
            "likelihood.answer_logprobs": "likelihood",
            "evaluate.complete": "block file",
            "evaluate.remove_derived": "derived files",
            "judge.write_scores": "judge",
            "metrics.summarize": "metrics",
            "evaluate.evaluate": "metrics file",
        },
        ("predictions.jsonl", "likelihood.jsonl", "scores-program.jsonl", "metrics.json"),
    ),
}


# --- one run --------------------------------------------------------------------------------------


@functools.cache
def is_ours(code) -> bool:
    """A line of the program, not of a library or of this file."""
    file = Path(code.co_filename)
    return file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests")


@functools.cache
def name_of(code) -> str:
    return f"{Path(code.co_filename).stem}.{code.co_name}"


def where_in(command: Command, frame) -> str | None:
    """The phase that a line belongs to."""
    while frame is not None:
        if phase := command.phases.get(name_of(frame.f_code)):
            return phase
        frame = frame.f_back
    return None


def run_child(command: Command, flags: list[str], kill_at=None, number=signal.SIGKILL, after=None):
    """One command in a forked child: (exit status, lines seen per phase, or where it was killed).
    `kill_at`: the phase and the how-manyth of its lines; `after`: seconds, then killed from here."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            log = os.open(f"/tmp/kill-{os.getppid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            seen: Counter = Counter()
            if after is None:
                kill_itself(command, seen, kill_at, number, write)
            command.script.main(command.script.parse_args(flags))
            sys.settrace(None)
            os.write(write, json.dumps(seen).encode())
            os._exit(0)
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(99)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read) as f:
        return status, f.read()


def kill_itself(command: Command, seen: Counter, kill_at, number: int, report: int) -> None:
    """Count the lines of each phase and die at the one asked for."""
    real_write = os.write

    def due(phase: str) -> bool:
        seen[phase] += 1
        return (phase, seen[phase]) == kill_at

    def on_line(frame, event, arg):
        if event == "line" and (phase := where_in(command, frame)) and due(phase):
            real_write(report, f"{frame.f_code.co_name}:{frame.f_lineno}".encode())
            os.kill(os.getpid(), number)
        return on_line

    def torn_write(fd, data):
        if fd > 2 and fd != report and due(TORN):
            real_write(report, b"os.write")
            real_write(fd, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real_write(fd, data)

    os.write = torn_write
    trace = lambda frame, *_: on_line if is_ours(frame.f_code) else None  # noqa: E731
    sys.settrace(trace)
    threading.settrace(trace)  # a request is noted in a thread of its own


# --- the teacher ----------------------------------------------------------------------------------


def start_teacher(asked: Path) -> str:
    """An endpoint in a process of its own (threads and forks do not mix); its address. It writes
    each request's question to `asked`; now and then it fails. It ends with this process."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        parent, count = os.getppid(), itertools.count()

        @by_body
        def answer(body):
            said = body["messages"][-1]["content"]
            with open(asked, "a") as f:
                f.write(json.dumps(said) + "\n")
            if next(count) % 6 == 3:
                return error(500, "busy")
            return ok(f"There are {len(said)} signs. So the answer is yes.")

        server = FakeServer(answer)
        os.write(write, server.url.encode())
        os.close(write)
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        return f.read()


def recorded(out: Path) -> set[str]:
    """Ids of the questions whose reply stands whole in responses.jsonl."""
    path = out / "responses.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return {json.loads(line)["id"] for line in whole.splitlines()}


# --- chains of kills ------------------------------------------------------------------------------


def differences(command: Command, whole: Path, out: Path) -> Counter:
    """What is wrong with a finished folder: records lost and duplicated, bytes, files."""
    wrong: Counter = Counter()
    for name in command.files:
        a, b = ((p / name).read_bytes() if (p / name).exists() else b"" for p in (whole, out))
        wrong["bytes"] += sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))
        if name.endswith(".jsonl"):
            there, here = Counter(a.splitlines()), Counter(b.splitlines())
            wrong["lost"] += len(there.keys() - here.keys())
            wrong["twice"] += sum(n - 1 for n in here.values() if n > 1)
    names = [
        {str(f.relative_to(p)) for f in p.rglob("*") if not f.name.endswith(".torn")}
        for p in (whole, out)
    ]
    # A run that had nothing left to do has no timings.
    wrong["files"] = sum(not Path(name).name.startswith("timings") for name in names[0] ^ names[1])
    for file in out.rglob("*.jsonl"):  # timings and notes too: no record glued to a torn one
        set_torn_tail_aside(file)
        list(read_jsonl(file))
    return wrong


class Bench:
    """Kills one command; `rows` is the table: (command, phase) -> counts."""

    def __init__(self, name: str, folder: Path, model: Path, url: str, asked: Path, rng):
        self.name, self.command, self.folder, self.rng = name, COMMANDS[name], folder, rng
        self.asked = asked
        self.rows: dict = defaultdict(Counter)
        self.flags = ["--model", str(model), "--device", "cpu", *self.command.flags.split()]
        if name == "distill":
            self.flags += ["--base-url", url]
        self.template = folder / f"{name} from" if self.command.before else None
        if self.template:
            sample_flags = [*self.flags[:4], *LOOSE.split(), "--out-dir", str(self.template)]
            assert run_child(COMMANDS["sample"], sample_flags)[0] == 0
            self.command.before(self.template)
        self.lines: Counter = Counter()  # most lines of a phase that a run has shown
        self.whole = self.fresh("whole")
        start = time.perf_counter()
        self.finish(self.whole)
        self.seconds = time.perf_counter() - start
        self.phases = sorted({*self.command.phases.values(), *self.lines})
        unseen = [p for p in self.phases if not self.lines[p]]
        assert not unseen, f"{name} has no line in {unseen}: a function was renamed"

    def fresh(self, name: str) -> Path:
        out = self.folder / f"{self.name}-{name}"
        if self.template:
            shutil.copytree(self.template, out)
        return out

    def finish(self, out: Path) -> None:
        status, lines = run_child(self.command, [*self.flags, "--out-dir", str(out)])
        log = Path(f"/tmp/kill-{os.getpid()}.log").read_text()
        assert status == 0, f"{self.name} can't be continued in {out}: status {status}\n{log}"
        self.lines |= Counter(json.loads(lines))

    def times_asked(self) -> Counter:
        return Counter(self.asked.read_text().splitlines()) if self.asked.exists() else Counter()

    def chain(self, jobs: list[tuple], number: int, say) -> None:
        """Up to four of `jobs` (taken from its end) on one folder, then the end and the check."""
        out, killed, snapshots = self.fresh(f"chain{number}"), [], []
        self.asked.unlink(missing_ok=True)
        for _ in range(1 + self.rng.randrange(4)):
            if not jobs:
                break
            phase, sign = jobs[-1]
            flags = [*self.flags, "--out-dir", str(out)]
            if phase == TIMED:
                after = self.rng.uniform(0.02, self.seconds)
                status, where = run_child(self.command, flags, number=sign, after=after)
            else:
                # squared: after a resume fewer lines are left than in the whole run
                at = 1 + int(self.lines[phase] * self.rng.random() ** 2)
                status, where = run_child(self.command, flags, (phase, at), sign)
            if status == 0 and where.startswith("{"):
                break  # it came to its end first: compare, then try again
            place, _, ended = where.partition("{")
            hurt = {-sign} if sign == signal.SIGKILL else {-sign, 128 + sign}
            if ended and sign == signal.SIGTERM and self.name in ("train", "distill"):
                hurt = {0}  # while the last state is written: nothing is left to stop
            assert status in hurt, f"{self.name}, {phase}, {place}: {sign.name} gave {status}"
            killed.append((*jobs.pop(), place or "from outside"))
            if self.name == "distill":
                time.sleep(0.05)  # what is still on its way reaches the teacher
                snapshots.append((recorded(out), self.times_asked()))
            if out.exists() and self.rng.random() < 0.2:
                out = out.rename(out.with_name(out.name + "m"))
        self.finish(out)
        wrong = differences(self.command, self.whole, out)
        for ids, asked in snapshots:
            wrong["lost"] += len(ids - recorded(out))
            now, said = self.times_asked(), {json.dumps(prompt_of(i)) for i in ids}
            wrong["twice"] += sum(now[p] > asked[p] for p in said)
        shutil.rmtree(out)
        for phase, sign, where in killed:
            row = self.rows[self.name, phase]
            row["kills"] += 1
            row["SIGTERM"] += sign == signal.SIGTERM
            row += wrong
            told = ", ".join(f"{n:,} {k}" for k, n in wrong.items() if n) or "the same bytes"
            say(f"{self.name}: {signal.Signals(sign).name} in {phase} at {where}: {told}")


@functools.cache
def prompt_of(name: str) -> str:
    q = next(q for q in tasks.load("micro", "train") if q.id == name)
    return prompts.question_prompt(q, prompts.COT_SUFFIX)


def kill_all(folder: Path, kills: int, seed: int, names: list[str], say=print) -> dict:
    """`kills` kills shared by the commands; the table."""
    rng, asked = random.Random(seed), folder / "asked.txt"
    train.VALIDATE = 2  # quick validations
    tasks.TASKS["micro"] = tasks.get("micro")._replace(greedy_cap=6)
    endpoint.BACKOFF = 0.01
    os.environ["OPENAI_API_KEY"] = "sk-of-the-kill-harness"
    tasks.load = functools.cache(tasks.load)
    warm_up(folder)
    url = start_teacher(asked) if "distill" in names else ""
    model = make_tiny_model(folder / "tiny", n_embd=16, n_layer=1, n_head=2, n_positions=512)
    models.load_model(model)
    rows: dict = {}
    for i, name in enumerate(names):
        share = kills * (i + 1) // len(names) - kills * i // len(names)
        bench = Bench(name, folder, model, url, asked, rng)
        timed, places = share // 5, bench.phases[:]
        rng.shuffle(places)
        phases = [places[k % len(places)] for k in range(share - timed)] + [TIMED] * timed
        signs = [signal.SIGTERM if k % 6 == 5 else signal.SIGKILL for k in range(share)]
        jobs = [(p, signal.SIGKILL if p == TORN else s) for p, s in zip(phases, signs)]
        rng.shuffle(jobs)
        number = 0
        while jobs:
            assert number < 20 * share, f"{name} is never in {jobs[-1][0]}"
            bench.chain(jobs, number, say)
            rng.shuffle(jobs)
            number += 1
        for phase in bench.phases:  # also those that no kill has hit
            rows[name, phase] = Counter()
        rows.update(bench.rows)
        say(f"{name}: {number} chains of kills")
    return rows


def warm_up(folder: Path) -> None:
    """Slow imports and first calls once here, not in every child; no autograd before the forks."""
    import openai  # noqa: F401

    from sert_min.report import figures

    torch.optim.Adam([torch.zeros(1)])  # imports the compiler
    (folder / "metrics.jsonl").write_text('{"step":1,"epoch":1,"loss":1.0}\n')
    figures.plot_training(folder / "metrics.jsonl", folder / "loss.png", "")


def print_table(rows: dict) -> None:
    columns = ("kills", "SIGTERM", "lost", "twice", "bytes", "files")
    heads = ("kills", "SIGTERM", "lost", "duplicated", "differing bytes", "files left")
    print("| command | phase | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(heads))
    total: Counter = sum(rows.values(), Counter())
    for (name, phase), row in [*rows.items(), (("all", ""), total)]:
        print(f"| {name} | {phase} | " + " | ".join(f"{row[c]:,}" for c in columns) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    args = p.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = kill_all(Path(folder), args.kills, args.seed, args.only)
    print_table(rows)
    bad = [k for k, row in rows.items() if row["lost"] + row["twice"] + row["bytes"] + row["files"]]
    missed = [k for k, row in rows.items() if not row["kills"]]
    n = sum(row["kills"] for row in rows.values())
    print(f"{n} kills in {time.perf_counter() - start:.0f} s, {len(bad)} phases with a difference")
    if missed:
        print("no kill in: " + ", ".join(f"{name} {phase}" for name, phase in missed))
    sys.exit(bool(bad or (missed and args.kills >= 2 * len(rows))))


if __name__ == "__main__":
    main()
