"""One request to a teacher or a judge, at any OpenAI-compatible endpoint (asking.py sends many).

The openai package sends it, without its own retries: asking.py notes and counts each attempt. It
ends with a reply; with Retry, if another attempt may help (a rate limit, 5xx, timeout, connection,
or a 200 without a completion); with Refused, if this request is bad or forbidden, but others may
pass (400, 403, 413, 422); or with an error that has advice and ends all asking (authentication,
quota, model, redirect). A reply that hit the token limit, was filtered or refused may be empty:
asking again would give, and bill, the same.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from sert_min.io.errors import SertError, need, printable

MAX_REPLY = 1_000_000  # characters of a completion; the rest is cut off
# Finish reasons. A text with another one, which may be somebody's word for an error, is not whole.
WHOLE = ("stop", "eos", "end_turn", "stop_sequence", "completed", "STOP")
CUT = ("length", "content_filter", "refusal")  # these explain an empty text
REFUSED = "refused"  # ours: the server refused the request
USAGE = ("prompt_tokens", "completion_tokens")
SECRETS = {"OPENAI_API_KEY"}  # variables whose values are never printed or stored
OURS = {"model", "messages", "prompt", "n", "best_of", "stream", "max_tokens",
        "max_completion_tokens"}  # fields that --extra-body must not set  # fmt: skip


# --- whom to ask, and its flags -------------------------------------------------------------------


def number(text: str) -> float | None:
    """A number, None for "none", or NaN (which is refused later) for any other text."""
    with contextlib.suppress(ValueError):
        return None if text == "none" else float(text)
    return math.nan


def extra_body(text: str) -> dict:
    """The object of --extra-body. What would ask for other things than we count is refused."""
    body = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(text)
    need(isinstance(body, dict), "--extra-body is no JSON object; give one like '{\"top_p\": 0.9}'")
    bad = ", ".join(sorted(OURS & body.keys()))
    need(not bad, f"--extra-body must not set {bad}; these have flags of their own or are counted")
    return body


def extra_header(text: str) -> tuple[str, str]:
    """(name, variable) of --extra-header NAME=VARIABLE. The variable has to be set."""
    form = re.fullmatch(r"([\w-]+)=([A-Za-z_]\w*)", text)
    told = "--extra-header takes NAME=VARIABLE, with an environment variable that holds the value"
    need(form, told)
    name, variable = form.groups()
    value = os.environ.get(variable, "")
    need(value, f"--extra-header {text}: the variable {variable} is not set")
    need(value.isascii() and value.isprintable(), f"{variable} holds characters that no header has")
    SECRETS.add(variable)
    return name, variable


def option(about: str, default=None, **how):
    """A field of Endpoint that is a flag as well; `how` is for argparse."""
    return field(default=default, metadata={"help": about, **how})


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask, how, and at what price."""

    # fmt: off
    model: str = option("model name at the endpoint; there is no default")
    base_url: str | None = option("OpenAI-compatible address, e.g. http://localhost:8000/v1 "
                                  "(default: OPENAI_BASE_URL, else OpenAI's)")
    completions: bool = option("use the older /completions interface", False, action="store_true")
    max_tokens: int = option("of a reply (default: %(default)s)", 512, type=int)
    temperature: float | None = option("a number, or none: do not send one (default: %(default)s)",
                                       type=number)
    token_parameter: str = option("what the server calls the limit of tokens", "auto",
                                  choices=("auto", "max_tokens", "max_completion_tokens"))
    concurrency: int = option("requests at a time (default: %(default)s)", 8, type=int)
    timeout: float = option("seconds without an answer", 120.0, type=float)
    deadline: float = option("seconds per request, retries included", 900.0, type=float)
    system_prompt: str | None = option("a system message before each prompt", metavar="TEXT")
    extra_body: dict | None = option('more fields of a request, like {"top_p": 0.9}',
                                     type=extra_body, metavar="JSON")
    extra_header: tuple | list | None = option(  # of (name, variable)
        "send this header with the value of an environment variable",
        type=extra_header, metavar="NAME=VARIABLE", action="append")
    also_url: str | None = option("replies of the same server under this address count, too",
                                  metavar="URL")
    insecure: bool = option("send the key over http:// as well", False, action="store_true")
    max_requests: int | None = option("requests sent by this run, retries included", type=int)
    max_cost: float | None = option("USD, all runs that share these replies together", type=float)
    price_in: float | None = option("USD per million prompt tokens", type=float)
    price_out: float | None = option("USD per million completion tokens", type=float)
    who: str = "teacher"  # or "judge": whose flags an error names
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse an address that is none or holds a secret (it is printed), and an unpriced cap."""
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
        return self.host() in ("localhost", "127.0.0.1", "::1")

    def is_openai(self) -> bool:
        return f".{self.host()}".endswith(".openai.com")

    def token_limit(self, cap: int | None = None) -> dict[str, int]:
        """What caps a reply: newer OpenAI models refuse max_tokens, most servers know nothing else."""
        name = self.token_parameter
        if name == "auto":
            name = "max_completion_tokens" if self.is_openai() else "max_tokens"
        return {"max_tokens" if self.completions else name: cap or self.max_tokens}

    def usd(self, tokens_in: int, tokens_out: int) -> float | None:
        """What so many tokens cost, if prices are known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


FLAGS = {f.name: f for f in fields(Endpoint) if f.metadata}


def flag(who: str, name: str) -> str:
    """The flag for a field of Endpoint: --teacher-model, --judge-model, but --timeout for both."""
    own = name in ("model", "max_tokens", "temperature")
    return "--" + (f"{who}-" if own else "") + name.replace("_", "-")


def add_flags(parser, who: str) -> None:
    """Add the flags of an endpoint to a parser or a group of one; `who` is "teacher" or "judge"."""
    for name, f in FLAGS.items():
        cold = "0" if who == "judge" else "none"
        default = cold if name == "temperature" else f.default
        parser.add_argument(flag(who, name), default=default, **f.metadata)


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
    max_tokens: int | None = None  # instead of the endpoint's
    then: Callable[["Ask", str], "Ask | None"] | None = None  # (this, its reply) -> what follows

    def body(self, e: Endpoint) -> dict:
        """The request that is sent, without extra_body; no secret is part of it."""
        body = {"model": e.model, **e.token_limit(self.max_tokens)}
        system = {"role": "system", "content": e.system_prompt}
        messages = [system] * bool(e.system_prompt) + list(self.messages)
        text = "\n".join(m["content"] for m in messages)
        body |= {"prompt": text} if e.completions else {"messages": messages}
        return body if e.temperature is None else body | {"temperature": e.temperature}

    def key(self, e: Endpoint) -> str:
        """SHA-256 over everything that shapes the reply."""
        content = [e.url(), self.body(e) | (e.extra_body or {}), self.task, self.id, self.sample]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def most_tokens(self, e: Endpoint) -> tuple[int, int]:
        """Upper bounds of its (tokens in, tokens out): a token per byte sent, plus what the
        server's chat template may add, and a full reply."""
        texts = [m["content"] for m in self.messages]
        texts += [e.system_prompt or "", json.dumps(e.extra_body or "")]
        sent = sum(len(text.encode("utf-8", "replace")) + 8 for text in texts)
        return sent + 64, self.max_tokens or e.max_tokens


class Retry(Exception):
    """This attempt failed in a way that another one may not."""

    def __init__(self, why: str, kind: str = "", after: float = 0.0, billed: bool = True):
        super().__init__(why)
        self.kind = kind  # "timeout", "no connection", "rate limit", or ""
        self.after = after  # seconds to wait, as the server said
        self.billed = billed  # the server may have done the work


class Refused(SertError):
    """The server refused this one request; others may pass."""


def make_client(e: Endpoint):
    """An openai client with the key in OPENAI_API_KEY, which never follows a redirect, nor travels
    unencrypted to another machine unless `insecure` is set. To this machine no proxy is used."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    ok = key.isascii() and key.isprintable()
    need(ok, "OPENAI_API_KEY holds characters that no key has; set it again")
    secret = ["OPENAI_API_KEY"] * bool(key) + [variable for _, variable in e.extra_header or ()]
    safe = e.url().lower().startswith("https:") or e.is_local() or e.insecure
    need(safe or not secret, f"--base-url http://{e.host()} would carry {' and '.join(secret)} "
         "unencrypted; use https, unset the key, or give --insecure")  # fmt: skip
    ok = key or not e.is_openai()
    need(ok, "OPENAI_API_KEY is not set; set it, or give --base-url of a local server")

    import openai  # here, because it takes half a second that --help does not need

    how = dict(api_key=key or "none", base_url=e.url(), max_retries=0, timeout=e.timeout)
    try:
        http = openai.DefaultHttpxClient(follow_redirects=False, trust_env=not e.is_local())
        return openai.OpenAI(**how, http_client=http)
    except Exception as error:  # a proxy scheme without its package, a certificate that is gone
        why = f"{type(error).__name__}: {server_text(str(error))}"
        raise SertError(f"the HTTP client does not start ({why}); check or unset ALL_PROXY, "
                        "HTTP_PROXY, HTTPS_PROXY, SSL_CERT_FILE and SSL_CERT_DIR") from None  # fmt: skip


def attempt(client, e: Endpoint, ask: Ask) -> dict:
    """Send one request and return the fields of its reply. Raises Retry, or SertError to stop."""
    import openai

    api = client.completions if e.completions else client.chat.completions
    headers = {name: os.environ.get(variable, "") for name, variable in e.extra_header or ()}
    more = {"extra_body": e.extra_body, "extra_headers": headers}
    try:
        raw = api.with_raw_response.create(**ask.body(e), **more)
        return read_reply(json.loads(raw.text), e, raw.headers.get("x-request-id"))
    except (ValueError, RecursionError):
        raise Retry("a 200 reply that is not JSON (cut off, or a web page)") from None
    except openai.APITimeoutError:
        told = f"no reply within {e.timeout:g} s; raise --timeout or lower --concurrency"
        raise Retry(told, "timeout") from None
    except openai.APIConnectionError as error:
        if type(error.__cause__).__name__ == "ConnectError":
            told = f"no connection to {e.url()}; is the server running, is --base-url right?"
            raise Retry(told, "no connection", billed=False) from None
        raise Retry(f"connection failed ({type(error.__cause__).__name__})") from None
    except openai.APIStatusError as error:
        raise explain(error, e, client) from None
    except openai.OpenAIError as error:
        raise SertError(server_text(str(error))) from None


# --- what comes back ------------------------------------------------------------------------------


def read_reply(body, e: Endpoint, request_id: str | None = None) -> dict:
    """Text, finish reason, usage, model and request id of a reply's JSON. Raises Retry if there is
    no completion in it (some servers answer 200 with an error or an empty list)."""
    body = body if isinstance(body, dict) else {}
    try:
        choice = body["choices"][0]
        message = choice if e.completions else choice["message"]
        text = message.get("text" if e.completions else "content")
        finish = "refusal" if message.get("refusal") else choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        said = f" ({server_text(str(body['error']))})" if body.get("error") else ""
        raise Retry(f"a 200 reply without choices{said}") from None
    if isinstance(text, list):  # of parts: {"type": "text", "text": ..}
        parts = (part.get("text") for part in text if isinstance(part, dict))
        text = "".join(part for part in parts if isinstance(part, str))
    text = text if isinstance(text, str) else ""
    if not text.strip() and finish not in CUT:
        thought = message.get("reasoning_content") or message.get("reasoning")
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


def explain(error, e: Endpoint, client) -> Exception:
    """The Retry, or the SertError with advice, that an HTTP error amounts to. It has what the
    server says: `message`, `error` as a string, `detail`, else the beginning of the body."""
    status, code, headers = error.status_code, f"{error.code} {error.type}", error.response.headers
    said = error.body or error.response.text
    if isinstance(said, dict):
        said = next((said[k] for k in ("message", "error", "detail") if said.get(k)), "")
    said = server_text(said if isinstance(said, str) else json.dumps(said)).strip() or str(status)
    if status == 402 or "insufficient_quota" in code or "billing" in code:
        return SertError(f"the account has no quota left ({said}); add credit, then repeat")
    if status in (408, 409, 425, 429) or status >= 500:
        billed = status in (408, 504, 524)  # a gateway gave up, but the server may have gone on
        kind = "rate limit" if status == 429 else ""  # there, nothing is wrong with the request
        after = 0.0
        with contextlib.suppress(KeyError, ValueError):
            after = max(after, float(headers["retry-after"]))
        return Retry(f"HTTP {status}: {said}", kind, after, billed)
    if status == 404:
        lacks = f"{e.url()} has no model {e.model} (hosted models get shut down), or lacks /v1"
        fix = f"give another {flag(e.who, 'model')} or --base-url"
        return SertError(f"{lacks}; {fix} ({said}{model_names(client)})")
    if status < 400:
        where = server_text(headers.get("location", "elsewhere"))
        return SertError(f"{e.url()} redirects to {where}; if that is right, give it as --base-url")
    kind = Refused if status in (400, 403, 413, 422) else SertError
    if status in (401, 403):
        return kind(f"HTTP {status}: the server refused OPENAI_API_KEY; check it ({said})")
    names = "model", "token_parameter", "max_tokens", "temperature"
    flags = " or ".join(flag(e.who, name) for name in names)
    return kind(f"HTTP {status}: {said}; change {flags}")


def model_names(client) -> str:
    """The models that a server lists at /models, for an error about a wrong name, or ""."""
    try:
        names = [str(model.id) for model in client.with_options(timeout=10).models.list().data]
    except Exception:  # this only adorns an error
        return ""
    return f"; it has {server_text(', '.join(names[:10]), 300)}" if names else ""


def hide_key(text: str) -> str:
    """`text` without key and secret headers, which servers may send back; "ollama" is no secret."""
    for value in (os.environ.get(name, "").strip() for name in SECRETS):
        text = text.replace(value, "[key]") if len(value) >= 12 else text
    return text


def server_text(text, limit: int = 200) -> str | None:
    """A server's text, short, without control characters and the key; None if it is no text."""
    return printable(hide_key(text))[:limit] if isinstance(text, str) else None
