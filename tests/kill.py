"""Kill sample, train, distill and evaluate anywhere, repeat them, compare every byte.

    PYTHONPATH=. python tests/kill.py [--kills 200] [--seed 0] [--only distill]

A run is a forked child. It traces its own lines and kills itself at a random one of a function that
is chosen in turn, or after half of an os.write; a fifth is killed from outside at a random time.
Every sixth gets SIGTERM. After one to four kills, with the folder renamed now and then, the command
may end, and its files are compared with those of an uninterrupted run. Fails if a record is lost or
there twice, a byte differs, a file is left over, a reply is bought again, or a phase was never hit.
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
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import openai  # noqa: F401 (slow: once here, not in every child)
import torch
from conftest import ROOT, make_tiny_model
from fake_server import FakeServer, error, ok
from test_sample import make_older

import distill
import evaluate
import sample
import train
from sert_min import prompts, tasks
from sert_min.io import asking
from sert_min.io.files import read_jsonl, set_torn_tail_aside
from sert_min.report import figures

TORN, TIMED = "half a line", "random moment"


class Command(NamedTuple):
    """A command line, and what is looked at when it is killed."""

    script: object
    flags: str
    phases: str  # functions; a line belongs to the innermost one of these on the stack
    files: tuple[str, ...]  # the same bytes are promised
    before: Callable[[Path], None] | None = None  # it starts from a sampled folder, changed by this


SAMPLE = "--limit 6 --block-questions 2 --max-new-tokens 6 --patterns none --min-perplexity 0"
LOOSE, STRICT = (f"{SAMPLE} --max-rep2 {r} --min-tokens {n}" for r, n in ((0.9, 2), (0.5, 3)))
SAMPLING = "sample.prepare files.check_settings sample.sample_missing sample.write_derived "
SAMPLING += "console.print_paths "
SAMPLED = (*sample.DERIVED, *(f"blocks/{i:06d}-2.jsonl" for i in range(3)))
STUDENT = "--epochs 2 --batch-size 4 --report 0 --save-seconds 0"
TRAINING = "train.prepare finetune.train_step finetune.fit finetune.note state.save_state "
TRAINING += "state.load_state state.keep_metrics_before models.save_model figures.plot_training "
TRAINED = "last/model.safetensors", "metrics.jsonl"
COMMANDS = {
    "sample": Command(sample, LOOSE, SAMPLING + "generate.sample_paths", SAMPLED),
    "filter anew": Command(sample, STRICT, SAMPLING, SAMPLED, lambda out: None),
    "older folder": Command(sample, LOOSE, SAMPLING + "script.convert_older", SAMPLED, make_older),
    "train": Command(
        train, f"--method finetune --limit 16 --holdout {STUDENT}", TRAINING + "train.validate",
        (*TRAINED, "best/model.safetensors")),
    "distill": Command(
        distill, f"--teacher-model fake --keep all --limit 10 --concurrency 3 {STUDENT}",
        TRAINING + "asking.load asking.note asking.add asking.receive asking.leave "
        "rationales.rationale_records distill.save_records", (*TRAINED, "rationales.jsonl")),
    "evaluate": Command(
        evaluate, "--limit 6 --block-questions 2 --max-new-tokens 8 --by likelihood",
        "evaluate.settle files.check_settings script.missing metrics.greedy evaluate.complete "
        "likelihood.answer_logprobs evaluate.remove_derived judge.write_scores metrics.summarize "
        "evaluate.evaluate",
        ("predictions.jsonl", "likelihood.jsonl", "scores-program.jsonl", "metrics.json")),
}  # fmt: skip


@functools.cache
def name_of(code) -> str:
    """`file.function` of the program's own code; "" for libraries and tests."""
    file = Path(code.co_filename)
    parts = file.relative_to(ROOT).parts if file.is_relative_to(ROOT) else ("elsewhere",)
    return "" if parts[0] in ("elsewhere", "tests", ".venv") else f"{file.stem}.{code.co_name}"


def run_child(command: Command, flags: list[str], kill_at=None, number=0, after=None):
    """(exit status, lines seen per phase or where it was killed) of a command in a forked child,
    killed at `kill_at`, a phase and the how-manyth of its lines, or from here `after` seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, seen = 99, Counter()
        try:
            log = os.open(f"/tmp/kill-{os.getppid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            if not after:
                kill_itself(command, seen, kill_at, number, write)
            command.script.main(command.script.parse_args(flags))
            sys.settrace(None)
            code = 0
            os.write(write, json.dumps(seen).encode())
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(write)
    if after:
        time.sleep(after)
        os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read) as f:
        return status, f.read()


def kill_itself(command: Command, seen: Counter, kill_at, number: int, report: int) -> None:
    """Count the lines of each phase, in all threads, and die at the one asked for."""
    real_write, phases = os.write, set(command.phases.split())

    def due(phase: str) -> bool:
        seen[phase] += 1
        return (phase, seen[phase]) == kill_at

    def on_line(frame, event, arg):
        place = frame if event == "line" else None
        while place and name_of(place.f_code) not in phases:
            place = place.f_back
        if place and due(name_of(place.f_code)):
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
    threading.settrace(lambda frame, *_: on_line if name_of(frame.f_code) else None)
    sys.settrace(threading.gettrace())


def places(name: str, out: Path) -> list[str]:
    """The flags that put everything into one folder, a teacher's replies as well."""
    return ["--out-dir", str(out)] + ["--teacher-dir", str(out)] * (name == "distill")


def start_teacher(asked: Path) -> str:
    """The address of an endpoint in a process of its own, which writes each question to `asked`."""
    read, write = os.pipe()
    if os.fork() == 0:
        parent, count = os.getppid(), itertools.count()

        def answer(body):
            said = body["messages"][-1]["content"]
            with open(asked, "a") as f:
                f.write(json.dumps(said) + "\n")
            if next(count) % 6 == 3:
                return error(500, "busy")
            return ok(f"There are {len(said)} signs. So the answer is yes.")

        os.write(write, FakeServer(answer=answer).url.encode())
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


def differences(command: Command, whole: Path, out: Path) -> Counter:
    """What is wrong with a finished folder: records lost and duplicated, bytes, files."""
    wrong: Counter = Counter()
    for name in command.files:
        a, b = ((p / name).read_bytes() if (p / name).exists() else b"" for p in (whole, out))
        wrong["bytes"] += sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))
        if name.endswith(".jsonl"):
            here = Counter(b.splitlines())
            wrong["lost"] += len(set(a.splitlines()) - here.keys())
            wrong["twice"] += here.total() - len(here)
    # A run that had nothing left to do has no timings; torn tails are kept on purpose.
    a, b = ({str(f.relative_to(p)) for f in p.rglob("*")} for p in (whole, out))
    wrong["files"] = sum(not f.endswith((".torn", "timings.jsonl")) for f in a ^ b)
    for file in out.rglob("*.jsonl"):  # timings and notes too: no record glued to a torn one
        set_torn_tail_aside(file)
        list(read_jsonl(file))
    return wrong


class Bench:
    """Kills one command; `rows` is the table: (command, phase) -> counts."""

    def __init__(self, name: str, folder: Path, model: Path, url: str, asked: Path, rng):
        self.name, self.command, self.folder, self.rng = name, COMMANDS[name], folder, rng
        self.asked, self.rows = asked, defaultdict(Counter)
        self.flags = ["--model", str(model), "--device", "cpu", *self.command.flags.split()]
        self.flags += ["--base-url", url] if name == "distill" else []
        self.template = folder / f"{name} from"
        self.template.mkdir()
        if self.command.before:
            sample_flags = [*self.flags[:4], *LOOSE.split(), "--out-dir", str(self.template)]
            assert run_child(COMMANDS["sample"], sample_flags)[0] == 0
            self.command.before(self.template)
        self.lines: Counter = Counter()  # most lines of a phase that a run has shown
        self.whole, start = self.fresh("whole"), time.perf_counter()
        self.finish(self.whole)
        self.seconds = time.perf_counter() - start
        self.phases = sorted({*self.command.phases.split(), *self.lines})
        assert not (unseen := {*self.phases} - {*self.lines}), f"no line of {unseen}: renamed?"

    def fresh(self, name: str) -> Path:
        return shutil.copytree(self.template, self.folder / f"{self.name}-{name}")

    def finish(self, out: Path) -> None:
        status, lines = run_child(self.command, [*self.flags, *places(self.name, out)])
        log = Path(f"/tmp/kill-{os.getpid()}.log").read_text()
        assert status == 0, f"{self.name} can't be continued in {out}: status {status}\n{log}"
        self.lines |= Counter(json.loads(lines))

    def chain(self, jobs: list[tuple], number: int) -> None:
        """Up to four of `jobs` (taken from its end) on one folder, then the end and the check."""
        out, killed, snapshots = self.fresh(f"chain{number}"), [], []
        self.asked.write_text("")
        for phase, sign in jobs[: -2 - self.rng.randrange(4) : -1]:
            flags = [*self.flags, *places(self.name, out)]
            after = self.rng.uniform(0.02, self.seconds) if phase == TIMED else None
            # squared: after a resume fewer lines are left than in the whole run
            at = 1 + int(self.lines[phase] * self.rng.random() ** 2)
            status, where = run_child(self.command, flags, (phase, at), sign, after)
            place, _, ended = where.partition("{")
            if status == 0 and not place and (ended or after):
                self.seconds /= 2 if after else 1  # they were measured on a busy machine
                break  # it came to its end first: compare, then try again
            # A training that gets SIGTERM while it writes its last state has nothing left to stop.
            hurt = {0} if ended and sign == signal.SIGTERM else {-sign, 128 + sign}
            assert status in hurt, f"{self.name}, {phase}, {place}: {sign.name} gave {status}"
            killed.append((*jobs.pop(), place or "from outside"))
            time.sleep(0.05)  # what is still on its way reaches the teacher
            snapshots.append((recorded(out), Counter(self.asked.read_text().split("\n"))))
            if self.rng.random() < 0.2:
                out = out.rename(out.with_name(out.name + "m"))
        self.finish(out)
        wrong = differences(self.command, self.whole, out)
        now = Counter(self.asked.read_text().split("\n"))
        for ids, asked in snapshots:
            wrong["lost"] += len(ids - recorded(out))
            wrong["twice"] += sum(now[p] > asked[p] for p in map(prompt_of, ids))
        shutil.rmtree(out)
        for phase, sign, where in killed:
            self.rows[self.name, phase] += wrong + Counter({"kills": 1, sign.name: 1})
            print(f"{self.name}: {sign.name} in {phase} at {where}: {dict(+wrong) or 'same bytes'}")


@functools.cache
def prompt_of(name: str) -> str:
    """The line that the teacher writes when it is asked this question."""
    q = next(q for q in tasks.load("micro", "train") if q.id == name)
    return json.dumps(prompts.question_prompt(q, prompts.COT_SUFFIX))


def kill_all(folder: Path, kills: int, seed: int, names: list[str]) -> dict:
    """`kills` kills shared by the commands; the table."""
    rng, asked, rows = random.Random(seed), folder / "asked.txt", {}
    train.VALIDATE = 2  # quick validations
    tasks.TASKS["micro"] = tasks.get("micro")._replace(greedy_cap=6)
    asking.BACKOFF = 0.01
    os.environ["OPENAI_API_KEY"] = "sk-of-the-kill-harness"
    tasks.load = functools.cache(tasks.load)
    torch.optim.Adam([torch.zeros(1)])  # slow first calls here, not in every child; no autograd yet
    (folder / "metrics.jsonl").write_text('{"step":1,"epoch":1,"loss":1.0}\n')
    figures.plot_training(folder / "metrics.jsonl", folder / "loss.png", "")
    url = start_teacher(asked) if "distill" in names else ""
    model = make_tiny_model(folder / "tiny", n_embd=16, n_layer=1, n_head=2, n_positions=512)
    for i, name in enumerate(names):
        share = kills * (i + 1) // len(names) - kills * i // len(names)
        bench = Bench(name, folder, model, url, asked, rng)
        timed, places = share // 5, rng.sample(bench.phases, len(bench.phases))
        phases = [places[k % len(places)] for k in range(share - timed)] + [TIMED] * timed
        signs = [*[signal.SIGKILL] * 5, signal.SIGTERM]
        jobs = [(p, signs[0 if p == TORN else k % 6]) for k, p in enumerate(phases)]
        for number in itertools.count():
            rng.shuffle(jobs)
            if not jobs:
                break
            assert number < 20 * share, f"{name} is never in {jobs[-1][0]}"
            bench.chain(jobs, number)
        rows |= {(name, phase): Counter() for phase in bench.phases} | bench.rows
    return rows


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
    columns = ("kills", "SIGTERM", "lost", "twice", "bytes", "files")
    print("| command | phase | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for key, row in rows.items():
        print("| " + " | ".join([*key, *(f"{row[c]:,}" for c in columns)]) + " |")
    bad = sum(any(row[c] for c in columns[2:]) for row in rows.values())
    missed = any(not row["kills"] for row in rows.values()) and args.kills >= 2 * len(rows)
    n = sum(row["kills"] for row in rows.values())
    print(f"{n} kills in {time.perf_counter() - start:.0f} s, {bad} phases with a difference")
    sys.exit(bool(bad or missed))


if __name__ == "__main__":
    main()
