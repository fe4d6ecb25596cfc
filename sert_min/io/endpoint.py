"""One client for teachers and judges, for any OpenAI-compatible endpoint.

Each reply is appended to responses.jsonl, durably, before anything else happens to it. Its key is a
hash of all that shapes it, so repeating a command asks only for what is missing. Replies are read
later and from the file, so a better parser never costs a new request. The openai package sends the
requests, without its own retries, which differ between versions. This is what follows an attempt:

    stop      authentication, quota, unknown model or redirect: an error with advice. Only one
              request is in flight until the first reply arrives, so such a mistake costs one request.
    refused   a bad request, or one that moderation forbids (400, 403, 413, 422): once another
              question has a reply, this is recorded as final for its question, and the rest goes
              on; if the first three questions are refused so, it stops as above
    retry     rate limit (all requests honour Retry-After), 5xx, timeout, connection, or a 200
              without a completion: HTML, cut JSON, no choices, empty text
    record    any completion, also an empty one that hit the token limit, was filtered or was
              refused: asking again would give, and bill, the same

Each request is noted in sent.jsonl before it leaves. A note without a reply or a refusal (the
process was killed, or the request timed out) may have been billed: it counts in full against a cap.
"""

import contextlib
import hashlib
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
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from sert_min.io.errors import SertError, need, printable, this_command
from sert_min.io.files import append_durable, lock_folder, to_line
from sert_min.io.machine import stop_signals

MAX_REPLY = 1_000_000  # characters of a completion; the rest is cut off
TRIES = 6  # attempts per request, not counting those that only met a rate limit
BACKOFF = 0.5  # seconds before the second attempt; doubles with each further one
DRAIN = 30.0  # seconds that an interrupted collection waits for requests in flight
FIRST = 20  # replies after which a collection checks whether they are of use
REFUSED = "refused"  # finish reason of ours: the server refused the request
FINAL = ("length", "content_filter", "refusal")  # finish reasons that explain an empty text
USAGE = ("prompt_tokens", "completion_tokens")
CLIENT_VARIABLES = (
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)


# --- where to ask ---------------------------------------------------------------------------------


def flag(who: str, name: str) -> str:
    """The flag for a field of Endpoint: --teacher-model or --judge-model, but --timeout for both."""
    own = name in ("model", "max_tokens", "temperature")
    return "--" + (f"{who}-" if own else "") + name.replace("_", "-")


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask, how, and at what price. A limit or temperature that is None is not sent."""

    model: str
    base_url: str | None = None  # None: OPENAI_BASE_URL, else OpenAI's own
    max_tokens: int | None = 512
    temperature: float | None = None
    token_parameter: str = "auto"  # max_completion_tokens (OpenAI's own hosts) or max_tokens
    completions: bool = False  # use the older /completions instead of /chat/completions
    concurrency: int = 8
    timeout: float = 120.0  # seconds without an answer
    deadline: float = 900.0  # seconds for one request with all its retries
    insecure: bool = False  # send a key over http:// to another host
    max_requests: int | None = None  # of one run, retries included
    max_cost: float | None = None  # USD, of all runs of a folder together
    price_in: float | None = None  # USD per million tokens
    price_out: float | None = None
    who: str = "teacher"  # or "judge": whose flags an error names

    def __post_init__(self) -> None:
        """Refuse an address that is none or holds a secret (it gets printed), and an unpriced cap."""
        ok = False
        with contextlib.suppress(ValueError):  # an impossible port, for example
            url = urlsplit(self.url())
            secret = url.username or url.password or url.query
            need(not secret, "--base-url must not hold a password or a query; set OPENAI_API_KEY")
            ok = url.hostname and url.port != 0 and url.scheme in ("http", "https")
        need(ok, "--base-url is no http(s) address; give one like http://localhost:8000/v1")
        priced = self.max_cost is None or self.usd(0, 0) is not None
        need(priced, "--max-cost needs --price-in and --price-out (USD per million tokens)")

    def url(self) -> str:
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        return url.rstrip("/")

    def host(self) -> str:
        return urlsplit(self.url()).hostname or ""

    def is_local(self) -> bool:
        """Is the server on this machine?"""
        return self.host() in ("localhost", "127.0.0.1", "::1")

    def is_openai(self) -> bool:
        return f".{self.host()}".endswith(".openai.com")

    def token_limit(self) -> dict:
        """The parameter that caps the reply. Newer OpenAI models refuse the old name, and most local
        servers know no other."""
        if self.max_tokens is None:
            return {}
        name = self.token_parameter
        if name == "auto":
            name = "max_completion_tokens" if self.is_openai() else "max_tokens"
        return {"max_tokens" if self.completions else name: self.max_tokens}

    def request(self, messages: list[dict]) -> dict:
        """The body of a request; the API key is not part of it."""
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


def number(text: str) -> float | None:
    """A number, None for "none", or NaN (which is refused later) for any other text."""
    with contextlib.suppress(ValueError):
        return None if text == "none" else float(text)
    return math.nan


FLAGS = {  # by field of Endpoint
    "model": dict(help="model name at the endpoint; there is no default"),
    "base_url": dict(help="OpenAI-compatible address, e.g. http://localhost:8000/v1 "
                          "(default: OPENAI_BASE_URL, else OpenAI's)"),
    "completions": dict(action="store_true", help="use the older /completions interface"),
    "max_tokens": dict(type=int, default=512, help="of a reply (default: %(default)s)"),
    "temperature": dict(type=number, help="a number, or none: do not send one (default: %(default)s)"),
    "token_parameter": dict(choices=("auto", "max_tokens", "max_completion_tokens"), default="auto",
                            help="what the server calls the limit of tokens"),
    "concurrency": dict(type=int, default=8, help="requests at a time (default: %(default)s)"),
    "timeout": dict(type=float, default=120.0, help="seconds without an answer"),
    "deadline": dict(type=float, default=900.0, help="seconds per request, retries included"),
    "insecure": dict(action="store_true", help="send the key over http:// as well"),
    "max_requests": dict(type=int, help="requests sent by this run, retries included"),
    "max_cost": dict(type=float, help="USD, all runs that share these replies together"),
    "price_in": dict(type=float, help="USD per million prompt tokens"),
    "price_out": dict(type=float, help="USD per million completion tokens"),
}  # fmt: skip


def add_flags(parser, who: str) -> None:
    """Add the flags of an endpoint to a parser or a group of one; `who` is "teacher" or "judge"."""
    for name, how in FLAGS.items():
        default = {"default": "0" if who == "judge" else "none"} if name == "temperature" else {}
        parser.add_argument(flag(who, name), **how, **default)


def from_flags(args, who: str) -> Endpoint:
    """The endpoint that the flags of `add_flags` describe; meaningless values are refused."""
    values = {name: getattr(args, flag(who, name)[2:].replace("-", "_")) for name in FLAGS}
    for name in ("concurrency", "timeout", "deadline", "max_tokens"):
        need(0 < values[name] < 2**31, f"{flag(who, name)} must be above 0 and below 2^31")
    for name in ("temperature", "max_requests", "max_cost", "price_in", "price_out"):
        ok = values[name] is None or 0 <= values[name] < math.inf  # NaN would disable a cap
        need(ok, f"{flag(who, name)} must be a number from 0")
    return Endpoint(**values, who=who)


# --- one request ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request: what it belongs to, and its messages."""

    task: str
    id: str
    sample: int
    messages: tuple  # of {"role":, "content":}

    def key(self, e: Endpoint) -> str:
        """SHA-256 over everything that shapes the reply."""
        content = [e.url(), e.request(list(self.messages)), self.task, self.id, self.sample]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def most_tokens(self, e: Endpoint) -> tuple[int, int]:
        """Upper bounds of its (tokens in, tokens out): a token per byte sent, plus what the server's
        chat template may add, and a full reply."""
        sent = sum(len(m["content"].encode("utf-8", "replace")) + 8 for m in self.messages)
        return sent + 64, e.max_tokens or 4096


class Retry(Exception):
    """This attempt failed in a way that another one may not."""

    def __init__(self, why: str, after: float | None = None, busy=False, billed=True):
        super().__init__(why)
        self.after = after or 0.0  # seconds to wait, as the server said
        self.busy = busy  # a rate limit: nothing is wrong with the request or the server
        self.billed = billed  # the server may have done the work


class Refused(SertError):
    """The server refused this one request; others may pass."""


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def make_client(e: Endpoint):
    """An openai client with the key in OPENAI_API_KEY. The key never travels unencrypted to another
    machine unless `insecure` allows it, and never through a redirect. Requests to this machine
    bypass a proxy, which could not reach it."""
    key = api_key()
    ok = key.isascii() and key.isprintable()
    need(ok, "OPENAI_API_KEY holds characters that no key has; set it again")
    need(
        not key or e.url().lower().startswith("https:") or e.is_local() or e.insecure,
        f"--base-url http://{e.host()} would carry OPENAI_API_KEY unencrypted; use https, unset "
        "the key, or give --insecure",
    )
    ok = key or not e.is_openai()
    need(ok, "OPENAI_API_KEY is not set; set it, or give --base-url of a local server")

    import openai  # here, because it takes half a second that --help does not need

    try:
        http = openai.DefaultHttpxClient(follow_redirects=False, trust_env=not e.is_local())
        return openai.OpenAI(
            api_key=key or "none",
            base_url=e.url(),
            max_retries=0,
            timeout=e.timeout,
            http_client=http,
        )
    except (
        Exception
    ) as error:  # a proxy scheme without its package, a certificate file that is gone
        names = [n for n in os.environ if n.upper() in CLIENT_VARIABLES and os.environ[n]]
        raise SertError(
            f"the HTTP client does not start ({type(error).__name__}: {server_text(str(error))}); check "
            f"or unset {', '.join(names) or 'the proxy settings of this machine'}"
        ) from None


def attempt(client, e: Endpoint, messages: list[dict]) -> dict:
    """Send one request and return the fields of its reply. Raises Retry, or SertError to stop."""
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
        raise SertError(server_text(str(error))) from None


def read_reply(body, e: Endpoint, request_id: str | None = None) -> dict:
    """Text, finish reason, usage, model and request id of a reply's JSON. Raises Retry if there is
    no completion in it (some servers answer 200 with an error or an empty list)."""
    body = body if isinstance(body, dict) else {}
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        said = f" ({server_text(str(body['error']))})" if body.get("error") else ""
        raise Retry(f"a 200 reply without choices{said}")
    message = choices[0] if e.completions else choices[0].get("message")
    message = message if isinstance(message, dict) else {}
    finish = "refusal" if message.get("refusal") else choices[0].get("finish_reason")
    text = message.get("text" if e.completions else "content")
    if isinstance(text, list):  # of parts: {"type": "text", "text": ..}
        parts = (part.get("text") for part in text if isinstance(part, dict))
        text = "".join(part for part in parts if isinstance(part, str))
    text = text if isinstance(text, str) else ""
    if not text.strip() and finish not in FINAL:
        thought = any(message.get(k) for k in ("reasoning_content", "reasoning"))
        hint = f"; it only thinks: raise {flag(e.who, 'max_tokens')}" if thought else ""
        raise Retry(f"a 200 reply with empty text{hint}")
    if len(text) > MAX_REPLY:
        text, finish = text[:MAX_REPLY], "length"
    return {
        "text": hide_key(text.encode("utf-8", "replace").decode()),  # lone surrogates break later
        "finish": server_text(finish),
        "usage": dict(zip(USAGE, tokens_of(body.get("usage")))),
        "returned_model": server_text(body.get("model")),
        "request_id": server_text(request_id or body.get("id")),
    }


def tokens_of(usage) -> list[int | None]:
    """(tokens in, tokens out) of a server's usage; None where it holds no sensible number."""
    values = [usage.get(name) for name in USAGE] if isinstance(usage, dict) else [None, None]
    return [n if type(n) is int and 0 <= n < 2**53 else None for n in values]


def explain(error, e: Endpoint) -> Exception:
    """The Retry, or the SertError with advice, that an HTTP error amounts to."""
    status, code = error.status_code, f"{error.code} {error.type}"
    body = error.body if isinstance(error.body, dict) else {}
    said = server_text(str(body.get("message") or error.message), 300)
    if status == 402 or "insufficient_quota" in code or "billing" in code:
        return SertError(f"the account has no quota left ({said}); add credit, then repeat")
    if status in (408, 409, 425, 429) or status >= 500:
        billed = status in (408, 504, 524)  # a gateway gave up, but the server may have gone on
        after = retry_after(error.response.headers)
        return Retry(f"HTTP {status}: {said}", after, busy=status == 429, billed=billed)
    if status in (401, 403):
        kind = Refused if status == 403 else SertError
        return kind(f"HTTP {status}: the server refused OPENAI_API_KEY; check it ({said})")
    if status == 404:
        lacks = f"{e.url()} has no model {e.model} (hosted models get shut down), or lacks /v1"
        return SertError(f"{lacks}; give another {flag(e.who, 'model')} or --base-url ({said})")
    if status < 400:
        where = server_text(error.response.headers.get("location", "elsewhere"))
        return SertError(f"{e.url()} redirects to {where}; if that is right, give it as --base-url")
    names = "model", "token_parameter", "max_tokens", "temperature"
    flags = " or ".join(flag(e.who, name) for name in names)
    kind = Refused if status in (400, 413, 422) else SertError
    return kind(f"HTTP {status}: {said}; change {flags}")


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait; None if it gives no number."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) / unit)
    return None


def hide_key(text: str) -> str:
    """`text` without the key, which a server may send back. A dummy like "ollama" is no secret."""
    key = api_key()
    return text.replace(key, "[key]") if len(key) >= 12 else text


def server_text(text, limit: int = 200) -> str | None:
    """Text of a server for terminal and records: short, without control characters and the key;
    None if it is no text."""
    return printable(hide_key(text))[:limit] if isinstance(text, str) else None


# --- what a folder holds --------------------------------------------------------------------------

FollowUp = Callable[[Ask, dict], Ask | None] | None  # gives the ask that a reply leads to, if any


@dataclass
class Collection:
    """The replies in a folder by key (responses.jsonl), and what they cost, open bills included
    (sent.jsonl). Only one process at a time may write."""

    folder: Path
    e: Endpoint
    follow_up: FollowUp = None
    replies: dict[str, dict] = field(default_factory=dict)
    unanswered: dict[str, list] = field(default_factory=dict)  # key -> [tokens in, out] at most
    tokens_in: int = 0
    tokens_out: int = 0

    def load(self) -> "Collection":
        """Read the files without touching them: another process may be writing. A torn last line is
        left out (the next append sets it aside); the first of two equal keys holds."""
        for name, count in (("sent.jsonl", self.count_note), ("responses.jsonl", self.count)):
            path = self.folder / name
            *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
            if torn:
                print(f"{path}: a torn last line ({len(torn)} bytes) is left out")
            for number, line in enumerate(lines, 1):
                try:
                    count(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise SertError(f"{path} line {number} is damaged; remove that line") from None
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

    def count(self, record: dict) -> None:
        if not isinstance(record["text"], str):
            raise TypeError("a reply without text")
        self.replies.setdefault(record["key"], record)
        n_in, n_out = tokens_of(record.get("usage"))
        if n_in is not None and n_out is not None:  # else its bound stays, as if unanswered
            self.tokens_in += n_in
            self.tokens_out += n_out
            del self.unanswered.get(record["key"], [])[-1:]

    def walk(self, ask: Ask) -> tuple[list[dict], Ask | None]:
        """(the replies to an ask and to what follows from it, the request that is still to send)."""
        records: list[dict] = []
        now: Ask | None = ask
        while now and (record := self.replies.get(now.key(self.e))):
            records.append(record)
            now = self.follow_up and self.follow_up(now, record)
        return records, now

    def missing(self, asks: Iterable[Ask]) -> list[Ask]:
        """The requests that are still to send; equal ones once."""
        now = (self.walk(ask)[1] for ask in asks)
        return list({ask.key(self.e): ask for ask in now if ask}.values())

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
) -> tuple[Collection, list[str]]:
    """Ask for what the replies in `folder` lack, `e.concurrency` requests at a time; (all replies,
    why others are missing). Stops at the caps of `e` (an open bill counts in full), at an error
    that no retry repairs, when most of the last asks failed, when most replies are of no use, and
    at a signal. Replies to requests in flight are kept whatever happens."""
    asks = list(asks)
    with lock_folder(folder, ".lock-responses"):
        collection = Collection(folder, e, follow_up).load()
        todo, failures = collection.missing(asks), []
        try:
            if todo:
                print(f"{e.who}: {len(todo):,} of {len(asks):,} prompts have no reply yet")
                with tqdm(total=len(todo), unit="reply") as bar:
                    failures = Asking(collection, bar, asks, readable).until_done(todo)
        finally:
            print(collection.summary())
        return collection, failures


def print_plan(
    what: str, folder: Path, asks: Iterable[Ask], e: Endpoint, follow_up: FollowUp = None
) -> None:
    """Print what asking would send and cost at most. Sends and writes nothing."""
    collection = Collection(folder, e, follow_up).load()
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
    text = f"error: {len(failures):,} {who} replies are missing; those so far are in {folder}. "
    print(f"{text}{fix} the command to ask for the rest", file=sys.stderr)
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
        self.resume = 0.0  # no request before this time: a server said so
        self.capped = ""  # why no request may leave

    def until_done(self, asks: list[Ask]) -> list[str]:
        """Send the asks and all that follows from them; why some are still missing."""
        self.check_readable()
        self.todo.extend(asks)
        with stop_signals() as stopped:
            try:
                while not stopped and (self.working or self.todo and not self.capped):
                    slots = self.e.concurrency if any(self.recent) else 1
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
        left = [f"{ask.task}/{ask.id}: {self.capped}" for ask in self.todo]
        return [*self.failures.values(), *left]

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
        need(
            of < (10 if any(self.recent) else 2) or failed <= of / 2,
            f"{failed} of the last {of} requests got no reply ({why}); replies so far are kept, "
            "repeat the command later",
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
                return {**attempt(self.client, self.e, list(ask.messages)), "attempts": attempts}
            except (Retry, SertError) as error:
                why, now = error, time.monotonic()
            with self.lock:
                if not getattr(why, "billed", False):
                    self.collection.note({"key": ask.key(self.e), "refused": True})
                if isinstance(why, SertError):
                    raise why
                wait = f"the server asks to wait {why.after:.0f} s ({why}); repeat the command then"
                need(why.after <= self.e.deadline, wait)
                self.resume = max(self.resume, now + why.after)
            pause = min(BACKOFF * 2 ** min(attempts - 1, 9), 30) * random.uniform(0.75, 1.25)
            tries += not why.busy
            if tries >= TRIES or now + max(pause, why.after) > end:
                raise Retry(f"{why} ({attempts} attempts)")
            self.bar.set_postfix_str(f"retrying: {server_text(str(why), 60)}")
            self.closing.wait(pause)

    def leave(self, ask: Ask, end: float) -> float:
        """Wait as servers told, then note that a request leaves; returns the time after which the
        ask is attempted no more. Raises MayNotLeave at a cap, and Retry behind the time `end`."""
        e, key, at_most = self.e, ask.key(self.e), ask.most_tokens(self.e)
        while not self.closing.wait(max(0.0, self.resume - time.monotonic())):
            with self.lock:
                now = time.monotonic()
                if now < self.resume:  # another request was told to wait
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
                self.working[key] = ask, now + e.deadline
                return min(end, now + e.deadline)
        raise MayNotLeave("not asked, the run ended")
