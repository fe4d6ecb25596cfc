"""Many requests to a teacher or a judge, and the replies in a folder (endpoint.py sends one).

Each reply is appended to responses.jsonl, durably, before anything else happens to it. Its key is a
hash of all that shapes it, so repeating a command asks only for what is missing. Replies are read
later and from the file, so a better parser never costs a new request. A reply that ended by itself
also serves another limit of tokens; one with an unknown finish reason may be cut and is asked for
once more in each run.

Each request is noted in sent.jsonl before it leaves. A note without a reply or a refusal (the
process was killed, or the request timed out) may have been billed: it counts in full against a cap.
"""

import contextlib
import json
import math
import queue
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from sert_min.io import endpoint
from sert_min.io.endpoint import CUT, REFUSED, USAGE, WHOLE, Ask, Endpoint, Refused, Retry
from sert_min.io.errors import SertError, need, printable, this_command
from sert_min.io.files import append_durable, lock_folder, to_line
from sert_min.io.machine import stop_signals
from sert_min.io.progress import Bar

TRIES = 6  # attempts per request, not counting those that only met a rate limit
BACKOFF = 0.5  # seconds before the second attempt; doubles with each further one
DRAIN = 30.0  # seconds that an interrupted collection waits for requests in flight
FIRST = 20  # replies after which a collection checks whether they are of use
KNOWN = (None, REFUSED, *WHOLE, *CUT)  # a reply with another finish reason may be cut

# --- what a folder holds --------------------------------------------------------------------------


class Collection:
    """The replies in a folder by key (responses.jsonl), and what they cost, open bills included
    (sent.jsonl); `load` reads them. What `others`, folders of earlier versions, hold counts as well.
    Only one process at a time may write."""

    def __init__(self, folder: Path, e: Endpoint, *others: Path):
        self.folder, self.e, self.others = folder, e, others

    def load(self) -> "Collection":
        """Read the files, which another process may be writing; a torn last line is left out."""
        self.replies: dict[str, dict] = {}
        self.unanswered: dict[str, list] = {}  # key -> [tokens in, tokens out] at most, of each
        self.tokens_in = self.tokens_out = 0
        self.lacks: list[str] = []  # why replies are missing after asking
        self.caps = {self.e.max_tokens}  # the limits of tokens that were asked with
        for name, count in (("sent.jsonl", self.count_note), ("responses.jsonl", self.count)):
            for path in dict.fromkeys(place / name for place in (self.folder, *self.others)):
                *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
                if torn:
                    print(f"{path}: a torn last line ({len(torn)} bytes) is left out")
                for number, line in enumerate(lines, 1):
                    try:
                        count(json.loads(line))
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        told = f"{path} line {number} is damaged; remove that line"
                        raise SertError(told) from None
        urls = self.e.base_url, self.e.also_url or self.e.base_url
        pairs = product(urls, self.caps)  # whose replies may serve as well
        self.alike = [replace(self.e, base_url=url, max_tokens=cap) for url, cap in pairs]
        return self

    def note(self, note: dict) -> None:
        """Note a request before it leaves ("at_most": tokens in and out), or that the last request
        of a key was answered without work and is not billed ("refused")."""
        append_durable(self.folder / "sent.jsonl", to_line(note))
        self.count_note(note)

    def count_note(self, note: dict) -> None:
        bounds = self.unanswered.setdefault(note["key"], [])
        if note.get("refused"):
            del bounds[-1:]
        else:
            bound = endpoint.tokens_of(dict(zip(USAGE, note["at_most"])))
            need(None not in bound, "a note without two numbers of tokens", ValueError)
            bounds.append(bound)
            self.caps.add(bound[1])

    def add(self, ask: Ask, reply: dict) -> None:
        names = {"key": ask.key(self.e), "task": ask.task, "id": ask.id, "sample": ask.sample}
        record = {**names, **reply, "time": round(time.time(), 3)}
        append_durable(self.folder / "responses.jsonl", to_line(record))
        self.count(record)

    def count(self, record: dict) -> None:
        """Know a reply and its bill. Of two with one key the first holds, unless it may be cut."""
        need(isinstance(record["text"], str), "a reply without text", TypeError)
        if self.replies.setdefault(record["key"], record).get("finish") not in KNOWN:
            self.replies[record["key"]] = record
        n_in, n_out = endpoint.tokens_of(record.get("usage"))
        if n_in is not None and n_out is not None:  # else its bound stays, as if unanswered
            self.tokens_in += n_in
            self.tokens_out += n_out
            del self.unanswered.get(record["key"], [])[-1:]

    def find(self, ask: Ask) -> dict | None:
        """The stored reply to a request; one that ended by itself serves any limit of tokens."""
        for e in (self.e, *self.alike):
            found = self.replies.get(ask.key(e))
            if found and (e.max_tokens == self.e.max_tokens or found.get("finish") in WHOLE):
                return found
        return None

    def walk(self, ask: Ask) -> tuple[list[dict], Ask | None]:
        """(the replies to an ask and to what follows from it, the request that is to be sent)."""
        records: list[dict] = []
        now: Ask | None = ask
        while now and (record := self.find(now)):
            records.append(record)
            now = now.then and now.then(now, record["text"])
        return records, now

    def open_bills(self) -> list:
        """[tokens in, tokens out] at most, of each request whose bill is not known."""
        return list(chain.from_iterable(self.unanswered.values()))

    def most_usd(self, *more) -> float:
        """The most that all runs of this folder and `more` requests cost; prices are known."""
        n_in, n_out = map(sum, zip((self.tokens_in, self.tokens_out), *self.open_bills(), *more))
        return self.e.usd(n_in, n_out)

    def summary(self) -> str:
        usd, bills = self.e.usd(self.tokens_in, self.tokens_out), len(self.open_bills())
        text = f"{self.e.who} {printable(self.e.model)}: {len(self.replies):,} replies, "
        text += f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out; "
        text += "give --price-in and --price-out for USD" if usd is None else f"{usd:.4f} USD"
        if bills:
            text += f"; {bills:,} requests without a known bill (cut off, timed out or no usage)"
            text += "" if usd is None else f", with them at most {self.most_usd():.4f} USD"
        return text


# --- what scripts call ----------------------------------------------------------------------------


class Readable(NamedTuple):
    """What makes a reply useful. Asking stops if most of the first ones are not: each costs money."""

    test: Callable[[Ask, list[dict]], bool]  # of an ask and its replies (two with a follow-up)
    what: str  # "hold all four scores"
    advice: str  # what to change


def ask_all(collection: Collection, asks: Iterable[Ask], readable: Readable | None = None) -> None:
    """Ask for what a collection lacks, `e.concurrency` requests at a time. Stops at the caps of `e`
    (an open bill counts in full), at an error that no retry repairs, when most of the last asks
    failed, when most replies are of no use, and at a signal; replies in flight are always kept."""
    folder, who = collection.folder, collection.e.who
    with lock_folder(folder, ".lock-responses"):
        there = len(collection.load().replies)
        asks = list({ask.key(collection.e): ask for ask in asks}.values())  # equal ones once
        todo = [now for ask in asks if (now := collection.walk(ask)[1])]
        again = [a for a in asks if (collection.find(a) or {}).get("finish") not in KNOWN]
        if there and todo and len(todo) == len(asks):
            print(f"the {there:,} replies in {folder} were made with other settings or at another "
                  "address (--also-url), and do not serve here")  # fmt: skip
        if again:
            print(f"{who}: {len(again):,} replies with an unknown finish are asked for again")
        try:
            if todo or again:
                print(f"{who}: {len(todo):,} of {len(asks):,} prompts have no reply yet")
                with Bar(len(todo + again), "request") as bar:
                    Asking(collection, bar, asks, readable).until_done(todo + again)
        finally:
            print(collection.summary())


def print_plan(what: str, collection: Collection, asks: Iterable[Ask]) -> None:
    """Print what asking would send and cost at most. Sends and writes nothing."""
    there, bounds, e = 0, [], collection.load().e
    for ask in {ask.key(e): ask for ask in asks}.values():  # equal ones once
        records, now = collection.walk(ask)
        there += len(records)
        while now:
            bounds.append(now.most_tokens(e))
            now = now.then and now.then(now, "x" * bounds[-1][1])  # it may use all its tokens
    n_in, n_out = (sum(bound[i] for bound in bounds) for i in (0, 1))
    usd = e.usd(n_in, n_out)
    cost = "" if usd is None else f"; at most {usd:.2f} USD, --max-cost is a hard cap"
    print(f"{what}: {len(bounds):,} {e.who} requests ({there:,} replies are there), at most "
          f"{n_in:,} tokens in (a token per byte; English has about 4 bytes) and {n_out:,} out"
          f"{cost}")  # fmt: skip


def end_if_missing(collection: Collection | None) -> None:
    """If replies are missing, say which and how to go on, and exit with status 2."""
    if not collection or not collection.lacks:
        return
    for why in collection.lacks[:5]:
        print(f"  missing: {printable(why)}", file=sys.stderr)
    who, n = collection.e.who, len(collection.lacks)
    spent = any("--max-cost" in why for why in collection.lacks)  # it counts all runs together
    fix = "Raise --max-cost and repeat" if spent else "Repeat"
    less = "; --allow-missing trains without them" if who == "teacher" else ""
    print(f"error: {n:,} {who} replies are missing; those so far are in "
          f"{collection.folder}. {fix} the command to ask for the rest{less}",
          file=sys.stderr)  # fmt: skip
    raise SystemExit(2)


# --- many requests --------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """An ask that still lacks its reply."""

    ask: Ask
    attempts: int = 0
    tries: int = 0  # attempts that met more than a rate limit
    due: float = 0.0  # no attempt before
    end: float = math.inf  # it is given up then
    why: str = ""  # the last attempt's error, for the message that it is missing


class Asking:
    """Asks at work. One thread decides and writes everything; each attempt has a thread of its own,
    a daemon, so that a server that hangs cannot keep the process from ending."""

    def __init__(self, collection: Collection, bar: Bar, asks: list, readable: Readable | None):
        self.collection, self.e, self.bar = collection, collection.e, bar
        self.asks, self.readable = asks, readable
        self.client = endpoint.make_client(self.e)
        self.jobs: list[Job] = []  # the first of them are at work, as many as there are slots
        self.flying: set[Job] = set()  # these wait for their reply
        self.arrived: queue.SimpleQueue = queue.SimpleQueue()  # of (job, reply or error)
        self.failed: list[Job] = []
        self.refused: list[Job] = []  # until another question has a reply
        self.recent: deque[bool] = deque(maxlen=20)  # did the last asks succeed?
        self.sent = 0
        self.slots, self.step = 1.0, 1.0  # requests at a time; how many more after each reply
        self.resume = 0.0  # no request before this time: a server said so
        self.capped = ""  # why no request may leave

    def until_done(self, asks: list[Ask]) -> None:
        """Send the asks and all that follows from them; note why some are still missing."""
        self.jobs = [Job(ask) for ask in asks]
        with stop_signals() as stopped:
            try:
                self.check_readable()
                while not stopped and self.go_on():
                    if self.receive(wait=0.05):
                        self.check_readable()
                if stopped:  # after the last reply as well: what comes next may take hours
                    print(f"\nno new requests; continue with: {this_command()}", flush=True)
                    raise SystemExit(128 + stopped[0])
            finally:  # what is in flight is paid for: keep it; a second signal ends the wait
                if self.flying:
                    print(f"waiting at most {DRAIN:g} s for requests in flight", flush=True)
                end = time.monotonic() + DRAIN
                while self.flying and time.monotonic() < end:
                    with contextlib.suppress(SertError):  # the error that led here is to be shown
                        self.receive(wait=0.1)
        if self.refused:  # and nothing else succeeded
            raise SertError(self.refused[0].why)
        for job in self.jobs:
            job.why = self.capped
        # A doubtful reply, which was only asked for again, is there.
        lost = [job for job in self.failed + self.jobs if not self.collection.find(job.ask)]
        self.collection.lacks = [f"{job.ask.task}/{job.ask.id}: {job.why}" for job in lost]

    def check_readable(self) -> None:
        """Stop if most of the first replies are of no use. Checks once, when there are enough."""
        if not self.readable or len(self.collection.replies) < FIRST:
            return
        walks = [(ask, *self.collection.walk(ask)) for ask in self.asks]
        done = [(ask, replies) for ask, replies, now in walks
                if not now and replies[0].get("finish") != REFUSED]  # fmt: skip
        if len(done) < FIRST:
            return
        n = sum(self.readable.test(ask, replies) for ask, replies in done)
        cut = sum(replies[0].get("finish") == "length" for _, replies in done)
        limit = endpoint.flag(self.e.who, "max_tokens")
        need(n >= len(done) / 2, f"only {n} of the first {len(done)} replies {self.readable.what} "
             f"({cut} were cut off at {limit}); they are kept. {self.readable.advice}")  # fmt: skip
        self.readable = None

    def go_on(self) -> bool:
        """Let all requests leave that may; is there anything to wait for? A job that is out of time
        is given up, because a server that sends a byte now and then never runs into the timeout. Its
        reply is kept if it comes after all."""
        now, self.capped = time.monotonic(), ""
        for job in self.jobs[: self.e.concurrency]:
            if now > job.end:
                if job in self.flying:
                    self.flying.remove(job)
                    job.why = f"no complete reply within {self.e.deadline:g} s"
                self.jobs.remove(job)
                self.fail(job)
        for job in self.jobs[: int(self.slots)]:
            may = job not in self.flying and now >= max(job.due, self.resume)
            if may and not self.capped and len(self.flying) < int(self.slots):
                self.leave(job)
        return bool(self.flying or self.jobs and not self.capped)

    def leave(self, job: Job) -> None:
        """Note a request and send it, unless that could pass a cap."""
        e, at_most = self.e, job.ask.most_tokens(self.e)
        if e.max_requests is not None and self.sent >= e.max_requests:
            self.capped = f"not asked, --max-requests {e.max_requests} is reached"
        elif e.max_cost is not None and self.collection.most_usd(at_most) > e.max_cost:
            self.capped = f"not asked, it could pass --max-cost {e.max_cost:g}"
        else:
            self.collection.note({"key": job.ask.key(e), "at_most": at_most})
            self.sent += 1
            job.attempts += 1
            job.end = min(job.end, time.monotonic() + e.deadline)
            self.flying.add(job)
            threading.Thread(target=self.send, args=(job,), daemon=True).start()

    def send(self, job: Job) -> None:
        """Make one attempt, in a thread of its own."""
        try:
            result = endpoint.attempt(self.client, self.e, job.ask)
        except BaseException as error:  # for the thread that decides
            result = error
        self.arrived.put((job, result))

    def receive(self, wait: float) -> bool:
        """Take what came of one attempt within `wait` seconds; was it a reply?"""
        try:
            job, result = self.arrived.get(timeout=wait)
        except queue.Empty:
            return False
        self.flying.discard(job)
        if known := job in self.jobs:  # else it was given up before
            self.jobs.remove(job)
        if isinstance(result, dict):
            self.collection.add(job.ask, {**result, "attempts": job.attempts})
            self.recent.append(True)
            self.slots = min(self.slots + self.step, self.e.concurrency)
            if now := self.collection.walk(job.ask)[1]:
                self.jobs.insert(0, Job(now))
            self.bar.set_postfix_str("", refresh=False)
            self.bar.update()
        elif not isinstance(result, Retry | SertError):
            raise result
        elif not getattr(result, "billed", False):
            self.collection.note({"key": job.ask.key(self.e), "refused": True})
        if isinstance(result, Retry) and known:
            self.repeat(job, result)
        elif isinstance(result, Refused):
            job.why = str(result)
            self.refused.append(job)
        elif isinstance(result, SertError):
            raise result
        self.settle_refused()
        return isinstance(result, dict)

    def repeat(self, job: Job, why: Retry) -> None:
        """Let an ask wait for its next attempt, or give it up."""
        now = time.monotonic()
        if why.kind == "timeout":  # half as many at a time, and one more for 20 replies in time
            self.slots, self.step = max(1.0, self.slots / 2), 1 / 20
        dead = why.kind == "no connection" and not any(self.recent)
        need(not dead or job.attempts < 2, str(why))
        wait = f"the server asks to wait {why.after:.0f} s ({why}); repeat the command then"
        need(why.after <= self.e.deadline, wait)
        self.resume = max(self.resume, now + why.after)
        pause = min(BACKOFF * 2 ** min(job.attempts - 1, 9), 30) * random.uniform(0.75, 1.25)
        job.due, job.tries = now + max(pause, why.after), job.tries + (why.kind != "rate limit")
        job.why = f"{why} ({job.attempts} attempts)"
        if job.tries >= TRIES or job.due > job.end:
            return self.fail(job)
        self.jobs.insert(0, job)
        self.bar.set_postfix_str(f"retrying: {endpoint.server_text(str(why), 60)}", refresh=False)
        return self.bar.update(0)

    def settle_refused(self) -> None:
        """Once another question has a reply, store what the server refused as final: it is never
        asked again. If nothing else came of the first three questions, stop."""
        if any(r.get("finish") != REFUSED for r in self.collection.replies.values()):
            for job in self.refused:
                reason = endpoint.server_text(job.why, 300)
                self.collection.add(job.ask, {"text": "", "finish": REFUSED, "reason": reason})
                name = printable(f"{job.ask.task}/{job.ask.id}")
                self.bar.write(f"{name} is left out: {reason}")
                self.bar.update()
            self.refused.clear()
        if len(self.refused) == 3:
            raise SertError(self.refused[0].why)

    def fail(self, job: Job) -> None:
        """Give one ask up; stop everything when most of the last ones failed."""
        self.failed.append(job)
        self.recent.append(False)
        failed, of, some = self.recent.count(False), len(self.recent), any(self.recent)
        if of >= (10 if some else 2) and failed > of / 2:
            why = job.why + ("" if some else endpoint.model_names(self.client))
            raise SertError(f"{failed} of the last {of} requests got no reply ({why}); replies so "
                            "far are kept, repeat the command later")  # fmt: skip
