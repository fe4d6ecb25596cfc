"""Many requests to a teacher or a judge, and the replies in a folder (endpoint.py sends one request).

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sert_min.io.endpoint import (
    CUT,
    REFUSED,
    USAGE,
    WHOLE,
    Ask,
    Endpoint,
    Refused,
    Retry,
    attempt,
    flag,
    make_client,
    model_names,
    server_text,
    tokens_of,
)
from sert_min.io.errors import SertError, need, printable, this_command
from sert_min.io.files import append_durable, lock_folder, to_line
from sert_min.io.machine import stop_signals
from sert_min.io.progress import FORM, Bar

TRIES = 6  # attempts per request, not counting those that only met a rate limit
BACKOFF = 0.5  # seconds before the second attempt; doubles with each further one
DRAIN = 30.0  # seconds that an interrupted collection waits for requests in flight
FIRST = 20  # replies after which a collection checks whether they are of use

# --- what a folder holds --------------------------------------------------------------------------

FollowUp = Callable[[Ask, dict], Ask | None] | None  # gives the ask that a reply leads to, if any


def is_doubtful(reply: dict) -> bool:
    """Has a reply a finish reason that we don't know? (None: the server gave none.)"""
    return reply.get("finish") not in (None, REFUSED, *WHOLE, *CUT)


@dataclass
class Collection:
    """The replies in a folder by key (responses.jsonl), and what they cost, open bills included
    (sent.jsonl). Only one process at a time may write. Replies in `others`, folders in which earlier
    versions stored them, count as well."""

    folder: Path
    e: Endpoint
    follow_up: FollowUp = None
    others: tuple[Path, ...] = ()
    replies: dict[str, dict] = field(default_factory=dict)
    unanswered: dict[str, list] = field(default_factory=dict)  # key -> [tokens in, out] at most
    tokens_in: int = 0
    tokens_out: int = 0
    alike: tuple[Endpoint, ...] = ()  # `e` with other limits of tokens or another address

    def load(self) -> "Collection":
        """Read the files without touching them: another process may be writing. A torn last line is
        left out (the next append sets it aside)."""
        caps: set = {self.e.max_tokens}
        notes, counted = self.folder / "sent.jsonl", self.folder / "responses.jsonl"
        files = [(notes, self.count_note), (counted, self.count)]
        files += [(other / counted.name, self.keep) for other in self.others]
        files += [(p / notes.name, lambda note: caps.update(note.get("at_most", ())[1:]))
                  for p in (self.folder, *self.others)]  # fmt: skip
        for path, count in files:
            *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
            if torn:
                print(f"{path}: a torn last line ({len(torn)} bytes) is left out")
            for number, line in enumerate(lines, 1):
                try:
                    count(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise SertError(f"{path} line {number} is damaged; remove that line") from None
        urls = [self.e.base_url] + [self.e.also_url] * bool(self.e.also_url)
        caps = {cap for cap in caps if cap is None or (type(cap) is int and cap > 0)}
        self.alike = tuple(
            replace(self.e, base_url=url, max_tokens=cap) for url in urls for cap in caps
        )
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
            bound = tokens_of(dict(zip(USAGE, note["at_most"])))
            if None in bound:
                raise ValueError("a note without two numbers of tokens")
            bounds.append(bound)

    def add(self, key: str, ask: Ask, reply: dict) -> None:
        """Store a reply."""
        names = {"key": key, "task": ask.task, "id": ask.id, "sample": ask.sample}
        record = {**names, **reply, "time": round(time.time(), 3)}
        append_durable(self.folder / "responses.jsonl", to_line(record))
        self.count(record)

    def keep(self, record: dict) -> None:
        """Know a reply: the first of two equal keys, or a later one if the first may be cut."""
        if not isinstance(record["text"], str):
            raise TypeError("a reply without text")
        held = self.replies.get(record["key"])
        if held is None or is_doubtful(held):
            self.replies[record["key"]] = record

    def count(self, record: dict) -> None:
        self.keep(record)
        n_in, n_out = tokens_of(record.get("usage"))
        if n_in is not None and n_out is not None:  # else its bound stays, as if unanswered
            self.tokens_in += n_in
            self.tokens_out += n_out
            del self.unanswered.get(record["key"], [])[-1:]

    def find(self, ask: Ask) -> dict | None:
        """The stored reply to a request; one that ended by itself serves any limit of tokens."""
        if found := self.replies.get(ask.key(self.e)):
            return found
        for e in self.alike:
            found = self.replies.get(ask.key(e))
            if found and (e.max_tokens == self.e.max_tokens or found.get("finish") in WHOLE):
                return found
        return None

    def walk(self, ask: Ask) -> tuple[list[dict], Ask | None]:
        """(the replies to an ask and to what follows from it, the request that is still to send)."""
        records: list[dict] = []
        now: Ask | None = ask
        while now and (record := self.find(now)):
            records.append(record)
            now = self.follow_up and self.follow_up(now, record)
        return records, now

    def missing(self, asks: Iterable[Ask]) -> list[Ask]:
        """The requests that are still to send; equal ones once."""
        now = (self.walk(ask)[1] for ask in asks)
        return list({ask.key(self.e): ask for ask in now if ask}.values())

    def doubtful(self, asks: Iterable[Ask]) -> list[Ask]:
        """The requests whose reply may be cut: its finish reason is unknown."""
        asks = {ask.key(self.e): ask for ask in asks}.values()
        return [ask for ask in asks if is_doubtful(self.find(ask) or {})]

    def replied(self) -> bool:
        """Has any question a reply?"""
        return any(r.get("finish") != REFUSED for r in self.replies.values())

    def open_bills(self) -> list:
        """[tokens in, tokens out] at most, of each request whose bill is not known."""
        return [bound for bounds in list(self.unanswered.values()) for bound in bounds]

    def most_usd(self) -> float:
        """The most that all runs of this folder can have cost; prices must be known."""
        n_in, n_out = map(sum, zip((self.tokens_in, self.tokens_out), *self.open_bills()))
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
    """What makes a reply useful. Asking stops early if most of the first replies are not, because
    every further one costs."""

    test: Callable[[Ask, list[dict]], bool]  # of an ask and its replies (two with a follow-up)
    what: str  # "hold all four scores"
    advice: str  # what to change


def ask_all(
    folder: Path,
    asks: Iterable[Ask],
    e: Endpoint,
    readable: Readable | None = None,
    follow_up: FollowUp = None,
    others: tuple[Path, ...] = (),
) -> tuple[Collection, list[str]]:
    """Ask for what the replies in `folder` lack, `e.concurrency` requests at a time; (all replies,
    why others are missing). Stops at the caps of `e` (an open bill counts in full), at an error
    that no retry repairs, when most of the last asks failed, when most replies are of no use, and
    at a signal. Replies to requests in flight are kept whatever happens."""
    asks = list(asks)
    with lock_folder(folder, ".lock-responses"):
        collection = Collection(folder, e, follow_up, others).load()
        todo, again, failures = collection.missing(asks), collection.doubtful(asks), []
        try:
            if todo and len(todo) == len(asks) and collection.replies:
                print(f"the {len(collection.replies):,} replies in {folder} were made with other "
                      "settings or at another address (--also-url), and do not serve here")  # fmt: skip
            if again:
                print(f"{e.who}: {len(again):,} replies with an unknown finish are asked for again")
            if todo := todo + again:
                n = len(todo) - len(again)
                print(f"{e.who}: {n:,} of {len(asks):,} prompts have no reply yet")
                with Bar(len(todo), "reply", bar_format=FORM.replace("{unit}s", "replies")) as bar:
                    failures = Asking(collection, bar, asks, readable).until_done(todo)
        finally:
            print(collection.summary())
        return collection, failures


def print_plan(
    what: str,
    folder: Path,
    asks: Iterable[Ask],
    e: Endpoint,
    follow_up: FollowUp = None,
    others: tuple[Path, ...] = (),
) -> None:
    """Print what asking would send and cost at most. Sends and writes nothing."""
    collection = Collection(folder, e, follow_up, others).load()
    there, bounds = 0, []
    for ask in {ask.key(e): ask for ask in asks}.values():
        records, now = collection.walk(ask)
        there += len(records)
        while now:
            bounds.append(now.most_tokens(e))
            said = {"text": "x" * bounds[-1][1]}  # as if it had used all its tokens
            now = follow_up and follow_up(now, said)
    n_in, n_out = (sum(bound[i] for bound in bounds) for i in (0, 1))
    usd = e.usd(n_in, n_out)
    print(
        f"{what}: {len(bounds):,} {e.who} requests ({there:,} replies are there), at most {n_in:,} "
        f"tokens in (a token per byte; English has about 4 bytes) and {n_out:,} out"
        + ("" if usd is None else f"; at most {usd:.2f} USD, --max-cost is a hard cap")
    )


def end_if_missing(failures: list[str], who: str, folder: Path) -> None:
    """If replies are missing, say which and how to go on, and exit with status 2."""
    if not failures:
        return
    for why in failures[:5]:
        print(f"  missing: {printable(why)}", file=sys.stderr)
    spent = any("--max-cost" in why for why in failures)  # it counts all runs together
    fix = "Raise --max-cost and repeat" if spent else "Repeat"
    less = "; --allow-missing trains without them" if who == "teacher" else ""
    text = f"error: {len(failures):,} {who} replies are missing; those so far are in {folder}. "
    print(f"{text}{fix} the command to ask for the rest{less}", file=sys.stderr)
    raise SystemExit(2)


# --- many requests --------------------------------------------------------------------------------


class MayNotLeave(Exception):
    """No request may leave: a cap is reached, or the run ends."""


class Asking:
    """Asks at work. The calling thread starts them, stores replies and decides; a worker thread makes
    all attempts of one ask. Workers are daemons, so a server that hangs cannot keep the process from
    ending. `lock` guards the collection and what decides whether a request may leave."""

    def __init__(self, collection: Collection, bar: tqdm, asks: list, readable: Readable | None):
        self.collection, self.e, self.bar = collection, collection.e, bar
        self.asks, self.readable = asks, readable
        self.client = make_client(self.e)
        self.todo: deque[Ask] = deque()
        self.working: dict[str, tuple[Ask, float]] = {}  # key -> ask, when it is given up
        self.arrived: queue.SimpleQueue = queue.SimpleQueue()  # of (ask, reply or error)
        self.failures: dict[str, str] = {}  # key -> why
        self.recent: deque[bool] = deque(maxlen=20)  # did the last asks succeed?
        self.refused: list[tuple[Ask, Refused]] = []  # until another question has a reply
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.sent = 0
        self.slots, self.in_time = 1.0, 0  # requests at a time; replies since the last timeout
        self.slow = False  # has a request timed out?
        self.flying = 0  # requests that have left and wait for their reply
        self.resume = 0.0  # no request before this time: a server said so
        self.capped = ""  # why no request may leave

    def until_done(self, asks: list[Ask]) -> list[str]:
        """Send the asks and all that follows from them; why some are still missing."""
        self.check_readable()
        self.todo.extend(asks)
        with stop_signals() as stopped:
            try:
                while not stopped and (self.working or self.todo and not self.capped):
                    slots = min(self.e.concurrency, int(self.slots)) if any(self.recent) else 1
                    while self.todo and not self.capped and len(self.working) < slots:
                        ask = self.todo.popleft()
                        self.working[ask.key(self.e)] = ask, math.inf
                        threading.Thread(target=self.work, args=(ask,), daemon=True).start()
                    if self.receive(wait=0.05):
                        self.check_readable()
                if stopped:  # after the last reply as well: what comes next may take hours
                    print(f"\nno new requests; continue with: {this_command()}", flush=True)
                    raise SystemExit(128 + stopped[0])
            finally:  # what is in flight is paid for: keep it; a second signal ends the wait
                self.closing.set()
                if self.working:
                    print(f"waiting at most {DRAIN:g} s for requests in flight", flush=True)
                end = time.monotonic() + DRAIN
                while self.working and time.monotonic() < end:
                    with contextlib.suppress(SertError):  # the error that led here is to be shown
                        self.receive(wait=0.1)
        if self.refused:  # and nothing else succeeded
            raise self.refused[0][1]
        there = self.collection.replies  # a doubtful one, if it was only asked for again
        left = {ask.key(self.e): f"{ask.task}/{ask.id}: {self.capped}" for ask in self.todo}
        return [why for key, why in (self.failures | left).items() if key not in there]

    def check_readable(self) -> None:
        """Stop if most of the first replies are of no use. Checks once, when there are enough."""
        if not self.readable or len(self.collection.replies) < FIRST:
            return
        walks = [(ask, *self.collection.walk(ask)) for ask in self.asks]
        done = [(ask, records) for ask, records, now in walks if not now]
        done = [(ask, records) for ask, records in done if records[0]["finish"] != REFUSED]
        if len(done) < FIRST:
            return
        n = sum(self.readable.test(ask, records) for ask, records in done)
        cut = sum(records[0].get("finish") == "length" for _, records in done)
        need(
            n >= len(done) / 2,
            f"only {n} of the first {len(done)} replies {self.readable.what} ({cut} were cut off at "
            f"{flag(self.e.who, 'max_tokens')}); they are kept. {self.readable.advice}",
        )
        self.readable = None

    def receive(self, wait: float) -> bool:
        """Take one result within `wait` seconds; was it a reply? A request is given up at the
        deadline, because a server that sends a byte now and then never runs into the timeout; a
        reply that comes after all is kept."""
        try:
            ask, result = self.arrived.get(timeout=wait)
        except queue.Empty:
            for ask in [ask for ask, end in self.working.values() if time.monotonic() > end]:
                self.fail(ask, f"no complete reply within {self.e.deadline:g} s")
            return False
        if isinstance(result, dict):
            with self.lock:
                self.collection.add(ask.key(self.e), ask, result)
        known = self.working.pop(ask.key(self.e), None)  # else it was given up before
        if isinstance(result, Refused):
            self.refused.append((ask, result))
            if len(self.refused) == 3 and not self.collection.replied():
                raise self.refused[0][1]
        if self.collection.replied():
            self.record_refused()
        if isinstance(result, dict):
            self.failures.pop(ask.key(self.e), None)
            self.recent.append(True)
            self.capped = ""  # the bill may be smaller than its bound was
            self.speed_up()
            self.todo.extendleft(self.collection.missing([ask]))
            self.bar.set_postfix_str("", refresh=False)
            self.bar.update()
            return True
        if isinstance(result, MayNotLeave):
            self.capped = str(result)
            self.todo.appendleft(ask)
        elif not isinstance(result, Retry | Refused):
            raise result
        elif known and isinstance(result, Retry):
            self.fail(ask, str(result))
        return False

    def speed_up(self) -> None:
        """One more request at a time for each reply; behind the first timeout for each 20 of them."""
        self.in_time += 1
        if not self.slow or self.in_time % 20 == 0:
            self.slots = min(self.slots + 1, self.e.concurrency)

    def slow_down(self) -> None:
        """A request timed out: half as many at a time."""
        self.slow, self.in_time, self.slots = True, 0, max(1.0, self.slots / 2)

    def record_refused(self) -> None:
        """Store what the server refused as final for its questions; it is never asked again."""
        for ask, why in self.refused:
            reply = {"text": "", "finish": REFUSED, "reason": server_text(str(why), 300)}
            with self.lock:
                self.collection.add(ask.key(self.e), ask, reply)
            tqdm.write(f"{printable(f'{ask.task}/{ask.id}')} is left out: {reply['reason']}")
            self.bar.update()
        self.refused.clear()

    def fail(self, ask: Ask, why: str) -> None:
        """Give one ask up; stop everything when most of the last ones failed."""
        self.working.pop(ask.key(self.e), None)
        self.failures[ask.key(self.e)] = f"{ask.task}/{ask.id}: {why}"
        self.recent.append(False)
        failed, of = self.recent.count(False), len(self.recent)
        if of >= (10 if any(self.recent) else 2) and failed > of / 2:
            known = "" if any(self.recent) else model_names(self.client)
            raise SertError(
                f"{failed} of the last {of} requests got no reply ({why}{known}); replies so far are "
                "kept, repeat the command later"
            )

    # --- in the thread of an ask

    def work(self, ask: Ask) -> None:
        """Hand over the reply to an ask, or the error that ends its attempts."""
        try:
            result = self.reply_to(ask)
        except BaseException as error:  # for the thread that decides
            result = error
        self.arrived.put((ask, result))

    def reply_to(self, ask: Ask) -> dict:
        """Attempt until there is a reply. Raises Retry when tries or time are used up, MayNotLeave,
        or SertError to stop everything."""
        tries, attempts, end = 0, 0, math.inf
        while True:
            end = self.leave(ask, end)
            attempts += 1
            try:
                reply = attempt(self.client, self.e, ask)
                with self.lock:
                    self.flying -= 1
                return {**reply, "attempts": attempts}
            except (Retry, SertError) as error:
                why, now = error, time.monotonic()
            with self.lock:
                self.flying -= 1
                if not getattr(why, "billed", False):
                    self.collection.note({"key": ask.key(self.e), "refused": True})
                if isinstance(why, SertError):
                    raise why
                if why.kind == "timeout":
                    self.slow_down()
                dead = why.kind == "no connection" and not any(self.recent)
                need(not dead or attempts < 2, str(why))
                wait = f"the server asks to wait {why.after:.0f} s ({why}); repeat the command then"
                need(why.after <= self.e.deadline, wait)
                self.resume = max(self.resume, now + why.after)
            pause = min(BACKOFF * 2 ** min(attempts - 1, 9), 30) * random.uniform(0.75, 1.25)
            tries += not why.busy
            if tries >= TRIES or now + max(pause, why.after) > end:
                raise Retry(f"{why} ({attempts} attempts)")
            self.bar.set_postfix_str(f"retrying: {server_text(str(why), 60)}", refresh=False)
            self.bar.update(0)
            self.closing.wait(pause)

    def leave(self, ask: Ask, end: float) -> float:
        """Wait as servers told, and with a repetition for its turn, then note that a request leaves;
        returns the time after which the ask is attempted no more. Raises MayNotLeave at a cap, and
        Retry behind the time `end`."""
        e, key, at_most = self.e, ask.key(self.e), ask.most_tokens(self.e)
        wait = 0.0
        while not self.closing.wait(max(wait, self.resume - time.monotonic())):
            with self.lock:
                now, wait = time.monotonic(), 0.02
                if now < self.resume:  # another request was told to wait
                    continue
                if self.flying >= int(self.slots) and end < math.inf:
                    continue
                if now > end:
                    raise Retry(f"rate limits for {e.deadline:g} s")
                if e.max_requests is not None and self.sent >= e.max_requests:
                    raise MayNotLeave(f"not asked, --max-requests {e.max_requests} is reached")
                if (
                    e.max_cost is not None
                    and self.collection.most_usd() + e.usd(*at_most) > e.max_cost
                ):
                    raise MayNotLeave(f"not asked, it could pass --max-cost {e.max_cost:g}")
                self.collection.note({"key": key, "at_most": at_most})
                self.sent += 1
                self.flying += 1
                self.working[key] = ask, now + e.deadline
                return min(end, now + e.deadline)
        raise MayNotLeave("not asked, the run ended")
