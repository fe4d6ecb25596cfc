"""One client for teachers and judges: any OpenAI-compatible endpoint, nothing paid for twice.

Every reply is appended to responses.jsonl, durably, before anything else happens to it, under a key
made of everything that shapes it. Repeating a command asks only for what is missing. Parsing comes
later and from the file, so a better parser never costs a new request.

The openai package sends the requests; its own retries are off (they differ between its versions and
retry an exhausted quota), the rules below are the same everywhere:

    stop at once   authentication, permission, quota, unknown model, bad request: with advice
    try again      rate limit (Retry-After is honoured), 5xx, timeout, connection, and a 200 whose
                   body is no completion: HTML, cut JSON, no choices
    final          a completion that is empty because it hit the token limit, was filtered or
                   refused: recorded, because buying it again gives the same
"""

import hashlib
import ipaddress
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sert_min.runtime import SertError, printable
from sert_min.store import append_durable, read_jsonl, set_torn_tail_aside, to_line

MAX_REPLY = 1_000_000  # characters of one completion that are kept


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. Numbers None are not sent: the server's own default holds."""

    model: str
    base_url: str | None = None  # None: the openai package's own default (OPENAI_BASE_URL)
    max_tokens: int | None = 512
    temperature: float | None = None
    token_parameter: str = "auto"  # max_completion_tokens (OpenAI's own hosts) or max_tokens
    completions: bool = False  # the older /completions instead of /chat/completions
    concurrency: int = 8
    timeout: float = 120.0  # seconds per request
    deadline: float = 900.0  # seconds per request with all its retries
    price_in: float | None = None  # USD per million tokens
    price_out: float | None = None
    insecure: bool = False  # send a key over http:// to another host

    def url(self) -> str:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"

    def token_limit(self) -> dict:
        """The parameter that caps the reply; newer OpenAI models refuse the old name, most local
        servers know only that one."""
        if self.max_tokens is None:
            return {}
        name = self.token_parameter
        if name == "auto":
            host = urlsplit(self.url()).hostname or ""
            name = "max_completion_tokens" if host.endswith("openai.com") else "max_tokens"
        if self.completions:
            name = "max_tokens"
        return {name: self.max_tokens}

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


@dataclass(frozen=True)
class Ask:
    """One request: what it belongs to and its messages."""

    task: str
    id: str
    sample: int
    messages: tuple  # of {"role":, "content":}

    def key(self, endpoint: Endpoint) -> str:
        """SHA-256 over everything that shapes the reply."""
        content = [endpoint.url(), endpoint.request(list(self.messages)), self.task, self.id]
        content.append(self.sample)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Usage:
    """What a collection cost so far, all runs of it together."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, usage: dict | None) -> None:
        self.requests += 1
        self.tokens_in += (usage or {}).get("prompt_tokens") or 0
        self.tokens_out += (usage or {}).get("completion_tokens") or 0

    def cost(self, e: Endpoint) -> float | None:
        """USD, if prices are known."""
        if e.price_in is None or e.price_out is None:
            return None
        return (self.tokens_in * e.price_in + self.tokens_out * e.price_out) / 1e6


class Retry(Exception):
    """This attempt failed in a way that another may not; `after` seconds if the server said so."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


# --- one request ----------------------------------------------------------------------------------


def make_client(e: Endpoint):
    """An openai client; the key comes from OPENAI_API_KEY only. A key never travels unencrypted to
    another machine unless `insecure` says so."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "")
    parts = urlsplit(e.url())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SertError(f"--base-url {printable(e.url())} is no http(s) address")
    local = is_loopback(parts.hostname)
    if key and parts.scheme == "http" and not local and not e.insecure:
        raise SertError(
            f"--base-url {parts.scheme}://{parts.hostname} would carry OPENAI_API_KEY unencrypted; "
            "use https, unset the key, or give --insecure"
        )
    if not key and parts.hostname.endswith("openai.com"):
        raise SertError("OPENAI_API_KEY is not set; set it, or give --base-url of a local server")
    return openai.OpenAI(api_key=key or "none", base_url=e.url(), max_retries=0, timeout=e.timeout)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def attempt(client, e: Endpoint, messages: list[dict]) -> dict:
    """Send one request; the fields of its reply, or Retry, or SertError to stop everything."""
    import openai

    body = e.request(messages)
    try:
        create = client.completions.create if e.completions else client.chat.completions.create
        return read_reply(create(**body), e.completions)
    except json.JSONDecodeError:
        raise Retry("the reply was cut off in the middle of its JSON") from None
    except openai.APITimeoutError:
        raise Retry(f"no reply within {e.timeout:g} s") from None
    except openai.APIConnectionError as error:
        raise Retry(f"connection failed ({type(error.__cause__).__name__})") from None
    except openai.APIStatusError as error:
        raise explain(error, e) from None
    except openai.APIResponseValidationError:
        raise Retry("the reply was not in the API's form") from None


def read_reply(reply, completions: bool) -> dict:
    """Text, finish reason, usage, model and request id; a reply without a choice is a Retry (some
    servers answer 200 with a web page or an empty list)."""
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise Retry(f"a 200 reply without choices ({type(reply).__name__})")
    choice = choices[0]
    message = getattr(choice, "message", None)
    text = getattr(choice, "text", None) if completions else getattr(message, "content", None)
    finish = getattr(choice, "finish_reason", None)
    refusal = getattr(message, "refusal", None)
    if not text and finish not in ("length", "content_filter") and not refusal:
        raise Retry("a 200 reply with empty text")
    usage = getattr(reply, "usage", None)
    return {
        "text": (text or "")[:MAX_REPLY],
        "finish": "refusal" if refusal else finish,
        "usage": {
            "prompt_tokens": getattr(usage, "prompt_tokens", None),
            "completion_tokens": getattr(usage, "completion_tokens", None),
        },
        "returned_model": getattr(reply, "model", None),
        "request_id": getattr(reply, "_request_id", None),
    }


def explain(error, e: Endpoint) -> Exception:
    """An HTTP error -> Retry, or a SertError with advice. Server text is shown without control
    characters and without the key."""
    code, status = str(error.code or ""), error.status_code
    said = clean(str(getattr(error, "message", "")), 200)
    if status == 429 and code == "insufficient_quota":
        return SertError(f"the account has no quota left ({said}); add credit, then repeat")
    if status in (408, 409, 425, 429) or status >= 500:
        return Retry(f"HTTP {status}: {said}", retry_after(error.response.headers))
    if status in (401, 403):
        return SertError(f"HTTP {status}: the server refused OPENAI_API_KEY; check it ({said})")
    if status == 404:
        return SertError(
            f"{e.url()} has no model {e.model} (hosted models get shut down), or the address lacks "
            f"/v1; give another --teacher-model or --base-url ({said})"
        )
    flag = ""
    for parameter, name in (
        ("max_completion_tokens", "--token-parameter max_tokens"),
        ("max_tokens", "--token-parameter max_completion_tokens"),
        ("temperature", "leave --teacher-temperature out"),
        ("context", "lower --teacher-max-tokens"),
    ):
        if not flag and (error.param == parameter or parameter in said):
            flag = name
    return SertError(f"HTTP {status}: {said}; {flag or 'check the model and the flags'}")


def retry_after(headers) -> float | None:
    """Seconds that the server asks to wait (Retry-After in seconds or as an HTTP date)."""
    from email.utils import parsedate_to_datetime

    value = headers.get("retry-after")
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def clean(text: str, limit: int) -> str:
    """Server text for the terminal: no control characters, no key, not long."""
    key = os.environ.get("OPENAI_API_KEY")
    return printable(text.replace(key, "[key]") if key else text)[:limit]


def ask_until_done(client, e: Endpoint, messages: list[dict], stop: threading.Event) -> dict:
    """One reply, with retries until the deadline; `attempts` says how many requests it took."""
    end = time.monotonic() + e.deadline
    attempts = 0
    while True:
        attempts += 1
        try:
            return {**attempt(client, e, messages), "attempts": attempts}
        except Retry as why:
            pause = min(0.5 * 2 ** (attempts - 1), 30) * random.uniform(0.75, 1.25)
            pause = max(pause, why.after or 0)
            if time.monotonic() + pause > end or stop.is_set():
                raise Retry(f"{why} ({attempts} attempts)") from None
            stop.wait(pause)


# --- many requests --------------------------------------------------------------------------------


@dataclass
class Collection:
    """The replies of a folder: responses.jsonl by key, and what they cost."""

    path: Path
    replies: dict[str, dict] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def load(self) -> "Collection":
        """Read what is there; a torn last line is set aside, the first of two equal keys holds."""
        if torn := set_torn_tail_aside(self.path):
            print(f"{self.path}: a torn last line ({torn} bytes) was set aside in {self.path}.torn")
        for record in read_jsonl(self.path) if self.path.exists() else ():
            if isinstance(record.get("key"), str) and isinstance(record.get("text"), str):
                self.replies.setdefault(record["key"], record)
                self.usage.add(record.get("usage"))
        return self

    def add(self, record: dict) -> None:
        append_durable(self.path, to_line(record))
        self.replies.setdefault(record["key"], record)
        self.usage.add(record["usage"])


def collect(
    collection: Collection,
    asks: Iterable[Ask],
    e: Endpoint,
    max_requests: int | None = None,
    max_cost: float | None = None,
    check: Callable[[list[dict]], None] = lambda replies: None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Ask for what `collection` lacks, `e.concurrency` at a time; returns why each ask that is
    still missing failed. Stops at the caps (requests of this run; USD of all runs, counting the
    most that requests in flight can cost), at an error that no retry mends, and when most of the
    last requests failed. `check(new replies so far)` may raise to stop early."""
    asks = [a for a in asks if a.key(e) not in collection.replies]
    if not asks:
        return []
    if max_cost is not None and (e.price_in is None or e.price_out is None):
        raise SertError("--max-cost needs --price-in and --price-out (USD per million tokens)")
    client, stop = make_client(e), threading.Event()
    failures: list[str] = []
    recent: deque[bool] = deque(maxlen=20)
    new: list[dict] = []
    waiting, running, sent = deque(asks), {}, 0

    def within_caps() -> bool:
        if max_requests is not None and sent >= max_requests:
            return False
        if max_cost is None:
            return True
        most = sum(request_cost(a, e) for a in [*running.values(), waiting[0]])
        return collection.usage.cost(e) + most <= max_cost

    with ThreadPoolExecutor(e.concurrency) as pool:
        try:
            while running or (waiting and within_caps()):
                while waiting and len(running) < e.concurrency and within_caps():
                    ask = waiting.popleft()
                    running[pool.submit(ask_until_done, client, e, list(ask.messages), stop)] = ask
                    sent += 1
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    ask = running.pop(future)
                    try:
                        reply = future.result()
                    except Retry as why:
                        failures.append(f"{ask.task}/{ask.id}: {why}")
                        recent.append(False)
                        continue
                    recent.append(True)
                    record = {"key": ask.key(e), "task": ask.task, "id": ask.id}
                    record |= {"sample": ask.sample, **reply, "time": round(time.time(), 3)}
                    collection.add(record)
                    new.append(record)
                    progress(1)
                check(new)
                if len(recent) >= 10 and sum(recent) < len(recent) / 2:
                    raise SertError(
                        f"{recent.count(False)} of the last {len(recent)} requests failed "
                        f"({failures[-1]}); replies so far are kept, repeat the command later"
                    )
        except BaseException:
            stop.set()
            for future, ask in running.items():  # what is in flight is paid for: keep it
                if not future.cancel():
                    with_reply(future, ask, e, collection)
            raise
    failures += [f"{a.task}/{a.id}: not asked, a cap was reached" for a in waiting]
    return failures


def with_reply(future, ask: Ask, e: Endpoint, collection: Collection) -> None:
    """Store the reply of a request that was in flight when the collection stopped."""
    try:
        reply = future.result(timeout=e.timeout)
    except Exception:  # it failed too; the error that stopped the collection is the one to show
        return
    record = {"key": ask.key(e), "task": ask.task, "id": ask.id, "sample": ask.sample, **reply}
    collection.add({**record, "time": round(time.time(), 3)})


def request_cost(ask: Ask, e: Endpoint) -> float:
    """The most that a request can cost in USD: a token per byte of prompt, and a full reply."""
    sent = sum(len(m["content"].encode()) + 8 for m in ask.messages)
    return (sent * e.price_in + (e.max_tokens or 4096) * e.price_out) / 1e6
