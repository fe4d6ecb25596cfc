"""One client for teachers and judges: any OpenAI-compatible endpoint; a stored reply is never bought again.

Every reply is appended to responses.jsonl, durably, before anything else happens to it, under a key
made of everything that shapes it. Repeating a command asks only for what is missing. Parsing comes
later and from the file, so a better parser never costs a new request.

The openai package sends the requests; its own retries are off (they differ between its versions and
retry an exhausted quota) and replies are read from their JSON here, so that openai 1.56 and 3.x
behave alike. The rules:

    stop at once   authentication, permission, quota, unknown model, bad request, redirect: with
                   advice. Until the first reply there is one request at a time, so that such a
                   mistake costs exactly one.
    try again      rate limit (Retry-After is honoured by all requests), 5xx, timeout, connection,
                   and a 200 whose body is no completion: HTML, cut JSON, no choices, empty text
    final          a completion that is empty because it hit the token limit, was filtered or
                   refused: recorded, because buying it again gives the same

Each request is noted in sent.jsonl before it leaves. Notes without a reply or a refusal (killed in
flight, timed out) may have been billed: they are counted, and count in full against a cost cap.
"""

import hashlib
import ipaddress
import json
import math
import os
import queue
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from tqdm import tqdm

from sert_min.io.errors import SertError, need, printable, this_command
from sert_min.io.files import (
    append_durable,
    fits,
    lock_folder,
    read_jsonl,
    set_torn_tail_aside,
    to_line,
)
from sert_min.io.machine import stop_signals

MAX_REPLY = 1_000_000  # characters of one completion that are kept
TRIES = 6  # attempts per request; those that only met a rate limit do not count
BACKOFF = 0.5  # seconds before the second attempt; doubles
DRAIN = 30.0  # seconds that an interrupted collection waits for what is in flight
COUNT = range(2**53)  # a number of tokens that floating point can hold
TOKENS = {"prompt_tokens": (COUNT, None, ...), "completion_tokens": (COUNT, None, ...)}
REPLY = {
    "key": str,
    "text": str,
    "finish": (str, None),
    "usage": (TOKENS, None, ...),
}  # of a folder
NOTE = {"key": str, "at_most": ([COUNT], ...)}  # .. and of what was sent
FINAL = ("length", "content_filter", "refusal")  # finish reasons with which empty text is final


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. Numbers None are not sent: the server's own default holds."""

    model: str
    base_url: str | None = None  # None: OPENAI_BASE_URL, else OpenAI's own
    max_tokens: int | None = 512
    temperature: float | None = None
    token_parameter: str = "auto"  # max_completion_tokens (OpenAI's own hosts) or max_tokens
    completions: bool = False  # the older /completions instead of /chat/completions
    concurrency: int = 8
    timeout: float = 120.0  # seconds without an answer
    deadline: float = 900.0  # seconds for one request with all its retries
    price_in: float | None = None  # USD per million tokens
    price_out: float | None = None
    insecure: bool = False  # send a key over http:// to another host
    max_requests: int | None = None  # sent by one run, retries included
    max_cost: float | None = None  # USD of all runs of a folder together
    who: str = "teacher"  # or "judge": whose flags an error names

    def url(self) -> str:
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        return url.rstrip("/")

    def parts(self) -> SplitResult:
        """The parts of the address; all empty if it is none."""
        try:
            parts = urlsplit(self.url())
            return parts if parts.port != 0 else urlsplit("")
        except ValueError:
            return urlsplit("")

    def host(self) -> str:
        return (self.parts().hostname or "").lower()

    def is_openai(self) -> bool:
        return self.host() == "openai.com" or self.host().endswith(".openai.com")

    def token_limit(self) -> dict:
        """The parameter that caps the reply; newer OpenAI models refuse the old name, most local
        servers know only that one."""
        if self.max_tokens is None:
            return {}
        name = self.token_parameter
        if name == "auto":
            name = "max_completion_tokens" if self.is_openai() else "max_tokens"
        return {"max_tokens" if self.completions else name: self.max_tokens}

    def request(self, messages: list[dict]) -> dict:
        """The request body, without the key."""
        body = {"model": self.model, **self.token_limit()}
        if self.completions:
            body["prompt"] = "\n".join(m["content"] for m in messages)
        else:
            body["messages"] = messages
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body

    def usd(self, tokens_in: int, tokens_out: int) -> float | None:
        """What so many tokens cost, if prices are known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def flag(self, field: str) -> str:
        """The flag that sets a field: --teacher-model or --judge-model, but --timeout for both."""
        own = field in ("model", "max_tokens", "temperature")
        return "--" + (f"{self.who}-" if own else "") + field.replace("_", "-")


# --- flags ----------------------------------------------------------------------------------------

FLAGS = {  # the flags of an endpoint, by the field of Endpoint that they set
    "model": dict(help="model name at the endpoint; there is no default"),
    "base_url": dict(
        help="OpenAI-compatible address, e.g. http://localhost:8000/v1 "
        "(default: OPENAI_BASE_URL, else OpenAI's)"
    ),
    "completions": dict(action="store_true", help="use the older /completions interface"),
    "max_tokens": dict(type=int, default=512, help="of a reply (default: %(default)s)"),
    "temperature": dict(help="a number, or none: the server's own (default: %(default)s)"),
    "token_parameter": dict(
        choices=("auto", "max_tokens", "max_completion_tokens"),
        default="auto",
        help="what the server calls the limit of tokens",
    ),
    "concurrency": dict(type=int, default=8, help="requests at a time (default: %(default)s)"),
    "timeout": dict(type=float, default=120.0, help="seconds without an answer"),
    "deadline": dict(type=float, default=900.0, help="seconds per request, retries included"),
    "insecure": dict(action="store_true", help="send the key over http:// as well"),
    "max_requests": dict(type=int, help="requests sent by this run, retries included"),
    "max_cost": dict(type=float, help="USD, all runs with these replies together"),
    "price_in": dict(type=float, help="USD per million prompt tokens"),
    "price_out": dict(type=float, help="USD per million completion tokens"),
}


def add_flags(parser, who: str) -> None:
    """Add the flags of an endpoint to a parser or a group of one; `who` is "teacher" or "judge"."""
    for name, how in FLAGS.items():
        default = {"default": "0" if who == "judge" else "none"} if name == "temperature" else {}
        parser.add_argument(Endpoint("", who=who).flag(name), **how, **default)


def from_flags(args, who: str) -> Endpoint:
    """The endpoint that the flags of `add_flags` describe; values that mean nothing are refused."""
    flag = Endpoint("", who=who).flag
    value = {name: getattr(args, flag(name)[2:].replace("-", "_")) for name in FLAGS}
    try:
        heat = None if value["temperature"] == "none" else float(value["temperature"])
    except ValueError:
        heat = math.nan
    for name in ("concurrency", "timeout", "deadline", "max_tokens"):
        need(0 < value[name] < 2**31, f"{flag(name)} must be above 0 and below 2^31")
    for name in ("max_requests", "max_cost", "price_in", "price_out"):  # NaN would lift a cap
        ok = value[name] is None or 0 <= value[name] < math.inf
        need(ok, f"{flag(name)} must be a number from 0")
    ok = heat is None or 0 <= heat < math.inf
    need(ok, f"{flag('temperature')} must be a number from 0, or none")
    e = Endpoint(**{**value, "temperature": heat}, who=who)
    need(
        e.max_cost is None or e.usd(0, 0) is not None,
        "--max-cost needs --price-in and --price-out (USD per million tokens)",
    )
    check_url(e)
    return e


# --- one request ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request: what it belongs to and its messages."""

    task: str
    id: str
    sample: int
    messages: tuple  # of {"role":, "content":}

    def key(self, e: Endpoint) -> str:
        """SHA-256 over everything that shapes the reply."""
        content = [e.url(), e.request(list(self.messages)), self.task, self.id, self.sample]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def most_tokens(self, e: Endpoint) -> tuple[int, int]:
        """Bounds of its (tokens in, tokens out): a token per byte sent plus what the server's chat
        template may add, and a full reply."""
        sent = sum(len(m["content"].encode("utf-8", "replace")) + 8 for m in self.messages)
        return sent + 64, e.max_tokens or 4096


class Retry(Exception):
    """This attempt failed in a way that another may not; `after` seconds if the server said so."""

    def __init__(self, why: str, after: float | None = None, busy=False, billed=True):
        super().__init__(why)
        self.after = after
        self.busy = busy  # a rate limit: nothing is wrong with the request or the server
        self.billed = billed  # may have been: the server could have done the work


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def make_client(e: Endpoint):
    """An openai client; the key comes from OPENAI_API_KEY only. A key never travels unencrypted to
    another machine unless `insecure` says so, and never through a redirect. Requests to this
    machine go past a proxy: it could not reach us."""
    check_url(e)
    key, local = api_key(), is_loopback(e.host())
    if not (key.isascii() and key.isprintable()):
        raise SertError("OPENAI_API_KEY holds characters that no key has; set it again")
    if key and e.parts().scheme == "http" and not local and not e.insecure:
        raise SertError(
            f"--base-url http://{e.host()} would carry OPENAI_API_KEY unencrypted; "
            "use https, unset the key, or give --insecure"
        )
    if not key and e.is_openai():
        raise SertError("OPENAI_API_KEY is not set; set it, or give --base-url of a local server")

    import openai  # late: half a second that --help does not need

    http = openai.DefaultHttpxClient(follow_redirects=False, trust_env=not local)
    return openai.OpenAI(
        api_key=key or "none", base_url=e.url(), max_retries=0, timeout=e.timeout, http_client=http
    )


def check_flags(args, max_tokens: str, from_zero: tuple[str, ...] = ()) -> None:
    """Refuse numbers of an endpoint's flags that mean nothing, naming the flag. `max_tokens` and
    `from_zero` are the flags that teacher and judge call otherwise."""
    for flag in ("concurrency", "timeout", "deadline", max_tokens):
        if not 0 < getattr(args, flag) < 2**31:
            raise SertError(f"--{flag.replace('_', '-')} must be above 0 and below 2^31")
    for flag in (*from_zero, "max_requests", "max_cost", "price_in", "price_out"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value < math.inf:  # nan would switch a cap off
            raise SertError(f"--{flag.replace('_', '-')} must be a number from 0")
    if args.max_cost is not None and (args.price_in is None or args.price_out is None):
        raise SertError("--max-cost needs --price-in and --price-out (USD per million tokens)")


def check_url(e: Endpoint) -> None:
    """The address must be one, and hold nothing secret: it is printed."""
    parts = e.parts()
    if parts.username or parts.password or parts.query:
        raise SertError("--base-url must not hold a password or a query; set OPENAI_API_KEY")
    if not parts.hostname or parts.scheme not in ("http", "https"):
        raise SertError("--base-url is no http(s) address; give one like http://localhost:8000/v1")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def attempt(client, e: Endpoint, messages: list[dict]) -> dict:
    """Send one request; the fields of its reply, or Retry, or SertError to stop everything."""

    import openai

    api = client.completions if e.completions else client.chat.completions
    try:
        raw = api.with_raw_response.create(**e.request(messages))
        return read_reply(json.loads(raw.text), e, raw.headers.get("x-request-id"))
    except (ValueError, RecursionError):
        raise Retry("a 200 reply that is not JSON (cut off, or a web page)") from None
    except openai.APITimeoutError:
        raise Retry(f"no reply within {e.timeout:g} s") from None
    except openai.APIConnectionError as error:
        cause = type(error.__cause__).__name__
        hint = "; is the server running, is --base-url right?" if cause == "ConnectError" else ""
        raise Retry(f"connection failed ({cause}){hint}", billed=not hint) from None
    except openai.APIStatusError as error:
        raise explain(error, e) from None
    except openai.OpenAIError as error:
        raise SertError(server_text(str(error), 200)) from None


def read_reply(body, e: Endpoint, request_id: str | None = None) -> dict:
    """Text, finish reason, usage, model and request id of a reply's JSON; a reply without a choice
    is a Retry (some servers answer 200 with an error or an empty list)."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        error = body.get("error") if isinstance(body, dict) else None
        raise Retry(
            "a 200 reply without choices" + (f" ({server_text(str(error), 200)})" if error else "")
        )
    message = choices[0] if e.completions else choices[0].get("message")
    message = message if isinstance(message, dict) else {}
    finish = "refusal" if message.get("refusal") else choices[0].get("finish_reason")
    text = message.get("text" if e.completions else "content")
    text = text if isinstance(text, str) else ""
    if not text.strip() and finish not in FINAL:
        raise Retry("a 200 reply with empty text")
    if len(text) > MAX_REPLY:
        text, finish = text[:MAX_REPLY], "length"
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    tokens = {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}
    return {
        "text": hide_key(text.encode("utf-8", "replace").decode()),  # lone surrogates break later
        "finish": short(finish),
        "usage": {k: n if fits(n, COUNT) else None for k, n in tokens.items()},
        "returned_model": short(body.get("model")),
        "request_id": short(request_id or body.get("id")),
    }


def explain(error, e: Endpoint) -> Exception:
    """An HTTP error -> Retry, or a SertError with advice."""
    status, code = error.status_code, f"{error.code} {error.type}"
    body = error.body if isinstance(error.body, dict) else {}
    said = server_text(str(body.get("message") or error.message), 300)
    if status == 402 or "insufficient_quota" in code or "billing" in code:
        return SertError(f"the account has no quota left ({said}); add credit, then repeat")
    if status in (408, 409, 425, 429) or status >= 500:
        billed = status in (408, 504, 524)  # a gateway gave up on a server that went on working
        after = retry_after(error.response.headers)
        return Retry(f"HTTP {status}: {said}", after, busy=status == 429, billed=billed)
    if status in (401, 403):
        return SertError(f"HTTP {status}: the server refused OPENAI_API_KEY; check it ({said})")
    if status == 404:
        return SertError(
            f"{e.url()} has no model {e.model} (hosted models get shut down), or the address lacks "
            f"/v1; give another {e.flag('model')} or --base-url ({said})"
        )
    if status < 400:
        where = server_text(error.response.headers.get("location", "elsewhere"), 200)
        return SertError(f"{e.url()} redirects to {where}; if that is right, give it as --base-url")
    return SertError(f"HTTP {status}: {said}; {flag_to_change(said, str(error.param or ''), e)}")


def flag_to_change(said: str, parameter: str, e: Endpoint) -> str:
    """Which flag mends a bad request."""
    about = f"{parameter} {said}".lower()
    sent = next(iter(e.token_limit()), "")
    refused = ("unsupported", "not supported", "unrecognized", "unknown", "not permitted", "extra")
    if "temperature" in about:
        return f"give {e.flag('temperature')} none"
    if sent and sent in about and any(word in about for word in refused):
        other = {"max_tokens": "max_completion_tokens"}.get(sent, "max_tokens")
        return f"give --token-parameter {other}"
    if "max_tokens" in about or "max_completion_tokens" in about or "context" in about:
        return f"give a smaller {e.flag('max_tokens')}"
    return "check the model and the flags"


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait: milliseconds, seconds or an HTTP date."""

    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue

    def seconds(name: str) -> float:
        return parsedate_to_datetime(headers[name]).timestamp()

    try:  # by the server's clock, if it says what that shows: ours may be wrong
        return max(
            0.0, seconds("retry-after") - (seconds("date") if "date" in headers else time.time())
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def hide_key(text: str) -> str:
    """`text` without the key: a server may send it back. A dummy like "ollama" is no secret."""
    key = api_key()
    return text.replace(key, "[key]") if len(key) >= 12 else text


def server_text(text: str, limit: int) -> str:
    """Server text for the terminal: no control characters, no key, not long."""
    return printable(hide_key(text))[:limit]


def short(value) -> str | None:
    """A name that the server gave, for the record."""
    return server_text(value, 200) if isinstance(value, str) else None


# --- what a folder holds --------------------------------------------------------------------------


@dataclass
class Collection:
    """The replies of a folder by key, and what they cost: responses.jsonl, and sent.jsonl with what
    left for them. One process at a time; only the thread that collects writes."""

    path: Path  # of responses.jsonl
    replies: dict[str, dict] = field(default_factory=dict)
    unanswered: dict[str, list] = field(default_factory=dict)  # key -> [tokens in, out] at most
    tokens_in: int = 0
    tokens_out: int = 0

    def sent_path(self) -> Path:
        return self.path.with_name("sent.jsonl")

    def load(self) -> "Collection":
        """Read what is there; a torn last line is set aside, the first of two equal keys holds."""
        for path in (self.path, self.sent_path()):
            if torn := set_torn_tail_aside(path):
                print(f"{path}: a torn last line ({torn} bytes) was set aside in {path}.torn")
        for note in read_jsonl(self.sent_path(), NOTE) if self.sent_path().exists() else ():
            bounds = self.unanswered.setdefault(note["key"], [])
            if note.get("refused"):
                del bounds[-1:]
            elif len(note.get("at_most", ())) == 2:
                bounds.append(note["at_most"])
        for record in read_jsonl(self.path, REPLY) if self.path.exists() else ():
            self.count(record)
        return self

    def sending(self, key: str, at_most: tuple[int, int]) -> None:
        """Note a request before it leaves."""
        append_durable(self.sent_path(), to_line({"key": key, "at_most": at_most}))
        self.unanswered.setdefault(key, []).append(at_most)

    def refused(self, key: str) -> None:
        """Note that the last request of `key` was answered without work: it is not billed."""
        append_durable(self.sent_path(), to_line({"key": key, "refused": True}))
        self.unanswered[key].pop()

    def add(self, key: str, ask: Ask, reply: dict) -> dict:
        """Store a reply; returns its record."""
        names = {"key": key, "task": ask.task, "id": ask.id, "sample": ask.sample}
        record = {**names, **reply, "time": round(time.time(), 3)}
        append_durable(self.path, to_line(record))
        self.count(record)
        return record

    def count(self, record: dict) -> None:
        self.replies.setdefault(record["key"], record)
        tokens = [
            (record.get("usage") or {}).get(k) for k in ("prompt_tokens", "completion_tokens")
        ]
        if None not in tokens:  # else its bound stays, as if it had no answer
            self.tokens_in += tokens[0]
            self.tokens_out += tokens[1]
            if self.unanswered.get(record["key"]):
                self.unanswered[record["key"]].pop()

    def open_bills(self) -> list:
        """[tokens in, tokens out] at most, of each request whose bill is not known."""
        return [bound for bounds in self.unanswered.values() for bound in bounds]

    def most_usd(self, e: Endpoint) -> float:
        """The most that all runs of this folder can have cost; prices must be known."""
        bills = self.open_bills()
        known = e.usd(self.tokens_in, self.tokens_out)
        return known + e.usd(sum(b[0] for b in bills), sum(b[1] for b in bills))

    def summary(self, e: Endpoint) -> str:
        usd, bills = e.usd(self.tokens_in, self.tokens_out), len(self.open_bills())
        cost = "give --price-in and --price-out for USD" if usd is None else f"{usd:.4f} USD"
        text = (
            f"{printable(e.model)}: {len(self.replies):,} replies, {self.tokens_in:,} tokens in, "
        )
        text += f"{self.tokens_out:,} out; {cost}"
        if bills:
            text += f"; {bills:,} requests without a known bill (cut off, timed out or no usage)"
            text += "" if usd is None else f", with them at most {self.most_usd(e):.4f} USD"
        return text


def stored_replies(path: Path) -> dict[str, dict]:
    """The replies in a responses.jsonl by key, without touching it: another process may write."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    try:
        records = [json.loads(line) for line in whole.split(b"\n") if line]
    except (ValueError, RecursionError):
        records = [None]
    if not fits(records, [REPLY]):
        raise SertError(f"{path} holds a line that is no reply; remove that line")
    return {r["key"]: r for r in reversed(records)}


def no_follow_up(ask: Ask, record: dict) -> Ask | None:
    return None


def walk(replies: dict, ask: Ask, e: Endpoint, follow_up=no_follow_up) -> tuple[list, Ask | None]:
    """(the replies that an ask and its follow-ups have, what is to ask now). `follow_up(ask,
    record)` gives the request that a reply leads to, if any."""
    records: list[dict] = []
    now: Ask | None = ask
    while now and (record := replies.get(now.key(e))):
        records.append(record)
        now = follow_up(now, record)
    return records, now


def missing(collection: Collection, asks: Iterable[Ask], e: Endpoint, follow_up=no_follow_up):
    """What is to ask now, without what has a reply."""
    walks = (walk(collection.replies, ask, e, follow_up) for ask in asks)
    return [now for _, now in walks if now]


# --- many requests --------------------------------------------------------------------------------


@dataclass
class Job:
    """An ask on its way through its attempts; times are those of time.monotonic()."""

    ask: Ask
    key: str
    due: float = 0.0  # of the next attempt
    end: float = math.inf  # no attempt starts after it
    overdue: float = math.inf  # when the attempt in flight is given up
    tries: int = 0
    pauses: int = 0  # attempts that only met a rate limit


def collect(
    collection: Collection,
    asks: Iterable[Ask],
    e: Endpoint,
    max_requests: int | None = None,
    max_cost: float | None = None,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, str], None] = lambda n, note: None,
    follow_up: Callable[[Ask, dict], Ask | None] = no_follow_up,
) -> list[str]:
    """Ask for what `collection` lacks, `e.concurrency` at a time; returns why each ask that is
    still missing failed. Stops at the caps (requests sent by this call, retries included; USD of
    all runs of the folder, open bills in full), at an error that no retry mends, when most of the
    last asks failed, and at a signal. `check()` is called after each reply and may raise to stop;
    `progress(replies, note)` reports. What is in flight when it stops is kept."""
    if max_cost is not None and e.usd(0, 0) is None:
        raise SertError("--max-cost needs --price-in and --price-out (USD per million tokens)")
    asks = missing(collection, asks, e, follow_up)
    if not asks:
        return []
    check()
    run = Collecting(collection, e, make_client(e), max_requests, max_cost, follow_up, progress)
    run.todo.extend(Job(a, a.key(e)) for a in asks)
    with stop_signals() as stopped:
        try:
            while not stopped and (run.todo or run.later or run.flying):
                run.send_what_is_due()
                if run.capped and not run.flying:
                    break
                if run.receive(wait=0.05):
                    check()
            if stopped:  # also behind the last reply: what follows may take hours
                print(f"\nno new requests; continue with: {this_command()}", flush=True)
                raise SystemExit(128 + stopped[0])
        finally:
            run.drain()
    left = [*run.later, *run.todo]
    return [*run.failures.values(), *(f"{j.ask.task}/{j.ask.id}: {run.capped}" for j in left)]


@dataclass
class Collecting:
    """A collection at work. The calling thread decides, counts and writes; a thread per request in
    flight sends it and hands back what came. (Daemons: one that hangs can't keep us from ending.)"""

    collection: Collection
    e: Endpoint
    client: object
    max_requests: int | None
    max_cost: float | None
    follow_up: Callable
    progress: Callable
    todo: deque = field(default_factory=deque)  # jobs never sent
    later: list = field(default_factory=list)  # jobs waiting for their next attempt
    flying: dict = field(default_factory=dict)  # key -> job
    arrived: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    failures: dict = field(default_factory=dict)  # key -> why
    recent: deque = field(default_factory=lambda: deque(maxlen=20))  # did the last asks succeed?
    sent: int = 0
    resume: float = 0.0  # no request before this time: a server said so
    capped: str = ""

    def send_what_is_due(self) -> None:
        """Start as many requests as slots, times and caps allow; waiting retries hold their slot,
        so that a rate limit slows down everything."""
        slots = self.e.concurrency if any(self.recent) else 1
        self.capped = ""
        while len(self.flying) < slots and time.monotonic() >= self.resume:
            job = next((j for j in self.later if j.due <= time.monotonic()), None)
            if job is None and self.todo and len(self.flying) + len(self.later) < slots:
                job = self.todo[0]
            if job is None:
                return
            at_most = job.ask.most_tokens(self.e)
            if self.max_requests is not None and self.sent >= self.max_requests:
                self.capped = f"not asked, --max-requests {self.max_requests} is reached"
            elif self.max_cost is not None:
                cost = self.collection.most_usd(self.e) + self.e.usd(*at_most)
                if not cost <= self.max_cost:
                    self.capped = f"not asked, it could pass --max-cost {self.max_cost:g}"
            if self.capped:
                return
            if job.tries + job.pauses:
                self.later.remove(job)
            else:
                self.todo.popleft()
            self.sent += 1
            job.tries += 1
            job.overdue = time.monotonic() + self.e.deadline
            job.end = min(job.end, job.overdue)
            self.collection.sending(job.key, at_most)
            self.flying[job.key] = job
            threading.Thread(target=self.work, args=(job,), daemon=True).start()

    def work(self, job: Job) -> None:
        """In a thread of its own: one attempt."""
        try:
            result = attempt(self.client, self.e, list(job.ask.messages))
        except BaseException as error:  # handed on to the thread that decides
            result = error
        self.arrived.put((job, result))

    def receive(self, wait: float) -> bool:
        """Take one result within `wait` seconds; was it a reply?"""
        try:
            job, result = self.arrived.get(timeout=wait)
        except queue.Empty:
            self.give_up_overdue()
            return False
        known = self.flying.pop(job.key, None) is not None  # else it came after we gave it up
        if isinstance(result, dict):
            self.store(job, result)
            return True
        if not isinstance(result, Retry):
            if isinstance(result, SertError):
                self.collection.refused(job.key)
            raise result
        if not result.billed:
            self.collection.refused(job.key)
        if known:
            self.retry(job, result)
        return False

    def store(self, job: Job, reply: dict) -> None:
        if job.key in self.collection.replies:
            return
        self.collection.add(job.key, job.ask, {**reply, "attempts": job.tries + job.pauses})
        self.failures.pop(job.key, None)
        self.recent.append(True)
        for ask in missing(self.collection, [job.ask], self.e, self.follow_up):
            self.todo.appendleft(Job(ask, ask.key(self.e)))
        self.progress(1, "")

    def retry(self, job: Job, why: Retry) -> None:
        """Another attempt after a pause, unless tries or time are used up."""
        now = time.monotonic()
        if why.after is not None:
            if why.after > self.e.deadline:
                raise SertError(
                    f"the server asks to wait {why.after:.0f} s ({why}); repeat the command then"
                )
            self.resume = max(self.resume, now + why.after)
        doubled = BACKOFF * 2 ** min(job.tries + job.pauses - 1, 9)
        pause = min(doubled, 30.0) * random.uniform(0.75, 1.25)
        if why.busy:
            job.tries, job.pauses = job.tries - 1, job.pauses + 1
        job.due = now + max(pause, why.after or 0)
        self.progress(0, f"retrying: {server_text(str(why), 60)}")
        if job.tries >= TRIES or job.due > job.end:
            self.fail(job, str(why))
        else:
            self.later.append(job)

    def fail(self, job: Job, why: str) -> None:
        """Give one ask up; stop everything when most of the last ones failed."""
        attempts = job.tries + job.pauses
        self.failures[job.key] = f"{job.ask.task}/{job.ask.id}: {why} ({attempts} attempts)"
        self.recent.append(False)
        failed, of = self.recent.count(False), len(self.recent)
        if of >= (10 if any(self.recent) else 2) and failed > of / 2:
            raise SertError(
                f"{failed} of the last {of} requests got no reply ({why}); "
                "replies so far are kept, repeat the command later"
            )

    def give_up_overdue(self) -> None:
        """A server that sends a byte now and then never runs into the timeout: the deadline ends
        it. Should the reply come after all, it is kept."""
        for job in [j for j in self.flying.values() if time.monotonic() > j.overdue]:
            del self.flying[job.key]
            self.fail(job, f"no complete reply within {self.e.deadline:g} s")

    def drain(self) -> None:
        """Keep what is still in flight: it is paid for. A second signal ends the wait."""
        if self.flying:
            n = len(self.flying)
            print(f"waiting at most {DRAIN:g} s for {n} request(s) in flight", flush=True)
        end = time.monotonic() + DRAIN
        while self.flying and time.monotonic() < end:
            try:
                job, result = self.arrived.get(timeout=0.1)
            except queue.Empty:
                continue
            self.flying.pop(job.key, None)
            if isinstance(result, dict):
                self.store(job, result)
            elif isinstance(result, SertError) or not getattr(result, "billed", True):
                self.collection.refused(job.key)


# --- what scripts call ----------------------------------------------------------------------------


class Readable(NamedTuple):
    """What a reply must hold to be of use. If most of the first ones do not, collecting stops early:
    every further reply costs."""

    test: Callable[[Ask, list[dict]], bool]  # of an ask and its replies: one, or two with follow-up
    what: str  # "hold all four scores"
    advice: str  # what to change


def ask_all(
    folder: Path,
    asks: Iterable[Ask],
    e: Endpoint,
    readable: Readable | None = None,
    follow_up: Callable[[Ask, dict], Ask | None] = no_follow_up,
) -> tuple[Collection, list[str]]:
    """Ask for what the replies in `folder` lack; (all replies, why others are missing). Asks that
    are the same are sent once. Shows progress and prints what it has cost."""
    asks, checked = list({ask.key(e): ask for ask in asks}.values()), readable is None
    with lock_folder(folder, ".lock-responses"):
        collection = Collection(folder / "responses.jsonl").load()

        def check() -> None:
            nonlocal checked
            if checked or len(collection.replies) < 20:
                return
            walks = [(ask, *walk(collection.replies, ask, e, follow_up)) for ask in asks]
            done = [(ask, records) for ask, records, now in walks if not now]
            if checked := len(done) >= 20:
                n = sum(readable.test(ask, records) for ask, records in done)
                cut = sum(records[0]["finish"] == "length" for _, records in done)
                need(
                    n >= len(done) / 2,
                    f"only {n} of the first {len(done)} replies {readable.what} ({cut} were cut off "
                    f"at {e.flag('max_tokens')}); they are kept. {readable.advice}",
                )

        todo = missing(collection, asks, e, follow_up)
        if todo:
            print(f"{e.who}: {len(asks) - len(todo):,} of {len(asks):,} requests have replies")
        try:
            with tqdm(total=len(todo), unit="reply", disable=not todo) as bar:

                def progress(n: int, note: str) -> None:
                    bar.set_postfix_str(note, refresh=bool(note))
                    bar.update(n)

                caps = e.max_requests, e.max_cost
                failures = collect(collection, todo, e, *caps, check, progress, follow_up)
        finally:
            print(f"{e.who} {collection.summary(e)}")
    return collection, failures


def print_plan(
    what: str, folder: Path, asks: Iterable[Ask], e: Endpoint, follow_up=no_follow_up
) -> None:
    """Print what asking would send and cost at most. Sends and writes nothing."""
    replies, there, bounds = stored_replies(folder / "responses.jsonl"), 0, []
    for ask in {ask.key(e): ask for ask in asks}.values():
        records, now = walk(replies, ask, e, follow_up)
        there += len(records)
        while now:
            bounds.append(now.most_tokens(e))
            now = follow_up(now, {"text": "x" * bounds[-1][1]})  # as if it had the longest reply
    n_in, n_out = (sum(b[i] for b in bounds) for i in (0, 1))
    usd = e.usd(n_in, n_out)
    print(
        f"{what}: {len(bounds):,} {e.who} requests ({there:,} replies are there), at most {n_in:,} "
        f"tokens in (a token per byte; English has about 4 bytes) and {n_out:,} out"
        + ("" if usd is None else f"; at most {usd:.2f} USD, --max-cost is a hard cap")
    )


def end_if_missing(failures: list[str], who: str, folder: Path) -> None:
    """If replies are missing, say which and how to go on, and end with status 2."""
    if not failures:
        return
    for why in failures[:5]:
        print(f"  missing: {printable(why)}", file=sys.stderr)
    spent = any("--max-cost" in why for why in failures)  # which counts all runs together
    fix = "Raise --max-cost and repeat" if spent else "Repeat"
    print(
        f"error: {len(failures):,} {who} replies are missing; those so far are in {folder}. {fix} "
        "the command to ask for the rest",
        file=sys.stderr,
    )
    raise SystemExit(2)
