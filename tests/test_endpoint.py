"""The client of teachers and judges, against a local server that misbehaves in every way we know."""

import argparse
import json
import os
import re
import signal
import threading
import time
from dataclasses import replace

import openai  # noqa: F401  once, before any fork
import pytest
from conftest import KEY, refuses
from fake_server import FakeServer, dribble, error, hang, json_reply, ok, raw

from sert_min.io import asking, endpoint
from sert_min.io.asking import Collection, Readable, ask_all
from sert_min.io.endpoint import Ask, Endpoint, make_client

pytestmark = pytest.mark.usefixtures("keyed")
OTHER = "https://example.org/v1"


def asks(n=1):
    return [Ask("t", str(i), 0, ({"role": "user", "content": f"q{i}"},)) for i in range(n)]


def at(server, **more):
    return Endpoint(**{"model": "m", "base_url": server.url, "timeout": 5, "deadline": 20, **more})


def run(folder, server, n=1, e=None, readable=None, **more):
    """(collection, what it lacks) of asking `e`, or else the server, for what `folder` lacks."""
    collection = Collection(folder, replace(e or at(server), **more))
    ask_all(collection, asks(n), readable)
    return collection, collection.lacks


def stored(folder, e=None) -> Collection:
    return Collection(folder, e or Endpoint("m")).load()


# what the server does -> requests it gets -> outcome -> a word that record or message must hold
#   reply    a record with text            missing  tries are used up, the row is reported
#   final    a record without text         stop     SertError; with 5 questions and concurrency 4
OLD_NAME = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
MODELS = "--teacher-model or --base-url (no such model; it has qwen, llama)"
PARTS = [{"type": "text", "text": "Ice "}, {"type": "image"}, {"type": "text", "text": "is cold."}]
ONLY_THINKS = ok(message={"content": None, "reasoning_content": "Is it?"})
TABLE = [
    ("429, Retry-After", [error(429, "slow", retry_after="0.3"), ok()], 2, "reply", "stop"),
    ("429 without Retry-After", [error(429, "slow")] * 6 + [ok()], 7, "reply", "stop"),
    ("429, Retry-After 1000", [error(429, "slow", retry_after="1000")], 1, "stop", "asks to wait 1000 s"),
    ("429 quota", [error(429, "exceeded", "insufficient_quota")], 1, "stop", "add credit"),
    ("402", [error(402, "Insufficient Balance")], 1, "stop", "add credit"),
    ("401", [error(401, "Incorrect API key")], 1, "stop", "OPENAI_API_KEY"),
    ("403", [error(403, "Country not supported")], 3, "stop", "HTTP 403: the server refused OPENAI_API_KEY"),
    ("404", [error(404, "no such model", "model_not_found")], 1, "stop", MODELS),
    ("400", [error(400, OLD_NAME, "unsupported_parameter", "max_tokens")], 3, "stop", "--token-parameter"),
    ("400, body is a list", [json_reply(400, [{"error": "x"}])], 3, "stop", "--teacher-temperature"),
    ("400, error is a string", [json_reply(400, {"error": "bad thing"})], 3, "stop", "bad thing"),
    ("400, no JSON", [raw(400, b"plain words")], 3, "stop", "plain words"),
    ("422, detail is a list", [json_reply(422, {"detail": [{"msg": "no such field"}]})], 3, "stop", "no such field"),
    ("503 for ever", [error(503, "loading")], 6, "missing", "HTTP 503"),
    ("hang for ever", [hang(0.6)], 6, "missing", "no reply within"),
    ("short body", [raw(200, b"x" * 99, cut=50), ok()], 2, "reply", "stop"),
    ("cut JSON", [raw(200, b'{"choices": [{"mess'), ok()], 2, "reply", "stop"),
    ("deep JSON", [raw(200, b"[" * 100_000), ok()], 2, "reply", "stop"),
    ("broken gzip", [raw(200, b"{}", content_encoding="gzip"), ok()], 2, "reply", "stop"),
    ("a web page", [raw(200, b"<html>hi</html>", content_type="text/html")], 6, "missing", "not JSON"),
    ("200 with an error inside", [json_reply(200, {"error": "it died"}), ok()], 2, "reply", "stop"),
    ("choices []", [json_reply(200, {"choices": []}), ok()], 2, "reply", "stop"),
    ("content in parts", [ok(PARTS)], 1, "reply", '"text":"Ice is cold."'),
    ("content null for ever, with thoughts", [ONLY_THINKS], 6, "missing", "it only thinks: raise --teacher-max-tokens"),
    ("empty, length", [ok("", "length")], 1, "final", "length"),
    ("empty, content_filter", [ok("", "content_filter")], 1, "final", "content_filter"),
    ("refusal", [ok(message={"content": None, "refusal": "I can't"})], 1, "final", "refusal"),
    ("redirect", [raw(307, b"", location="http://localhost:9/v1")], 1, "stop", "give it as --base-url"),
    ("huge body", [ok("x " * 2_000_000)], 1, "reply", "length"),
    ("lone surrogate", [ok("a \ud800 b")], 1, "reply", "a ? b"),
    ("strange usage", [ok(usage={"prompt_tokens": "many", "completion_tokens": -1})], 1, "reply", "null"),
    ("usage null, finish a number", [ok(finish=3, usage=None, model=7)], 1, "reply", "null"),
]  # fmt: skip


@pytest.mark.parametrize("name, steps, requests, outcome, word", TABLE, ids=[r[0] for r in TABLE])
def test_what_the_server_does(name, steps, requests, outcome, word, tmp_path):
    with FakeServer(*steps) as server:
        server.models = ["qwen", "llama"]
        e = at(server, concurrency=4, timeout=0.3 if "hang" in name else 5.0)
        if outcome == "stop":
            refuses(re.escape(word), run, tmp_path, server, 5, e)
            assert not (tmp_path / "responses.jsonl").exists()
        else:
            collection, failures = run(tmp_path, server, 1, e)
            if outcome == "missing":
                assert word in failures[0] and "(6 attempts)" in failures[0]
            else:
                (record,) = collection.replies.values()
                assert failures == [] and record["attempts"] == requests
                assert word in (tmp_path / "responses.jsonl").read_text()
                assert bool(record["text"]) == (outcome == "reply")
                assert len(record["text"]) <= endpoint.MAX_REPLY
                run(tmp_path, server, 1, e)  # again: nothing is asked twice
        assert len(server.bodies) == requests


def test_advice_names_the_flags_of_who_asks(tmp_path):
    """The judge's users were told to change --teacher-temperature."""
    with FakeServer(error(400, "temperature?")) as server:
        refuses("--judge-model .*--judge-temperature", run, tmp_path, server, who="judge")


def test_retry_after_is_waited_for_by_all(tmp_path):
    """Hammering: other requests went on while one waited as told."""
    with FakeServer(ok(), error(429, "slow", retry_after="0.9"), ok(), delay=0.05) as server:
        _, failures = run(tmp_path, server, 30, concurrency=4)
        told = server.times[1] + 0.05
        meanwhile = sum(told < t < told + 0.7 for t in server.times)
    assert failures == [] and len(server.times) == 31 and meanwhile <= 4  # those in flight


@pytest.mark.parametrize("steps, replies", [([ok()], 3), ([error(500, "x"), ok()], 2)])
def test_max_requests_counts_every_request(steps, replies, tmp_path):
    """A cap that counts questions lets retries cost what they like."""
    with FakeServer(*steps) as server:
        collection, failures = run(tmp_path, server, 9, max_requests=3)
        assert len(server.bodies) == 3 and len(collection.replies) == replies
        assert len(failures) == 9 - replies and "--max-requests 3" in failures[0]
        collection, _ = run(tmp_path, server, 9, max_requests=4)  # of this run, not of all
    assert len(collection.replies) == replies + 4


def test_max_cost_holds_over_runs_and_lost_replies(tmp_path):
    """A request costs at most 10 + 5 tokens; a timeout may have been billed and counts whole."""
    e = dict(price_in=1e6, price_out=1e6, max_tokens=5, concurrency=4)
    bound = sum(asks()[0].most_tokens(Endpoint("m", max_tokens=5)))
    with FakeServer(ok(), hang(0.5), ok()) as server:
        for _ in range(3):
            collection, failures = run(tmp_path, server, 30, timeout=0.2, max_cost=300.0, **e)
        assert len(server.bodies) * 15 <= 300 and failures
        assert collection.tokens_in + collection.tokens_out == 15 * len(collection.replies)
        (open_bill,) = collection.open_bills()
        assert collection.most_usd() == 15 * len(collection.replies) + sum(open_bill) <= 300
        assert 300 - collection.most_usd() < max(bound, 15)  # and it is used up


def test_what_stays_without_a_known_bill(tmp_path):
    """Refusals are not billed; a reply without usage counts in full, also when it is read again."""
    with FakeServer(error(503, "busy"), error(429, "slow"), ok(), ok(usage=None)) as server:
        collection, _ = run(tmp_path, server)
        assert collection.open_bills() == stored(tmp_path).open_bills() == []
        run(tmp_path, server, 3, max_tokens=7)
    bills = stored(tmp_path).open_bills()
    assert len(bills) == 2 and bills[0][1] == 7  # the first reply ended by itself: it serves


def test_most_of_the_last_failing_stops(tmp_path):
    """A server that dies in the middle: not all of 200 questions are tried six times each."""
    told = "got no reply .*HTTP 500.*repeat the command"
    with FakeServer(*[ok()] * 20, error(500, "gone")) as server:
        refuses(told, run, tmp_path, server, 200, concurrency=4)
        assert len(server.bodies) <= 20 + 6 * (11 + 4)
    assert len(stored(tmp_path).replies) == 20


def test_a_refused_question_does_not_stop_the_rest(tmp_path, capsys):
    """A content filter's 400 stopped a collection there, now and at every repetition."""
    risk = error(400, "Content Exists Risk")
    with FakeServer(answer=lambda b: risk if re.search("q[03]", str(b)) else ok()) as server:
        collection, failures = run(tmp_path, server, 8)
        said = capsys.readouterr().out
        assert not failures and "t/3 is left out: HTTP 400: Content Exists Risk" in said
        assert len(server.bodies) == 8 and run(tmp_path, server, 8)[1] == []
        assert len(server.bodies) == 8
    refused = [r for r in collection.replies.values() if r["finish"] == "refused"]
    assert sorted(r["id"] for r in refused) == ["0", "3"] and not collection.open_bills()
    assert all(r["text"] == "" and "Content Exists Risk" in r["reason"] for r in refused)


def test_dead_server(tmp_path):
    with FakeServer(ok()) as server:
        e = at(server, concurrency=4)
    refuses(f"no connection to {e.url()}; is the server running", run, tmp_path, None, 50, e)
    assert (tmp_path / "sent.jsonl").read_text().count("at_most") <= 2
    assert stored(tmp_path).open_bills() == []


def test_the_deadline_ends_what_never_ends(tmp_path, monkeypatch):
    """A byte every tenth of a second never runs into the timeout; nor do rate limits end."""
    monkeypatch.setattr(asking, "BACKOFF", 0.1)
    with FakeServer(dribble) as server:
        _, failures = run(tmp_path, server, deadline=0.5)
        assert "no complete reply within 0.5 s" in failures[0]
        assert server.served == 0  # it is still sending
    with FakeServer(error(429, "slow")) as server:
        _, failures = run(tmp_path, server, deadline=1.0)
        assert "HTTP 429" in failures[0] and len(server.bodies) < 10


def test_an_early_stop_keeps_what_is_in_flight(tmp_path, monkeypatch):
    """Paid replies were dropped because another request had failed for good."""
    monkeypatch.setattr(asking, "FIRST", 3)
    nothing = Readable(lambda ask, replies: False, "rhyme", "Ask a poet.")
    with FakeServer(ok(), delay=0.1) as server:
        told = "only 0 of the first 3 replies rhyme.*Ask a poet"
        refuses(told, run, tmp_path, server, 20, readable=nothing, concurrency=4)
        assert 3 < len(server.bodies) == len(stored(tmp_path).replies)


def test_key_of_a_reply_depends_on_everything():
    """Cache keys without a sampling setting or the sample number serve the wrong text."""
    e, ask = Endpoint("m", "http://a/v1"), asks()[0]
    fields = dict(model="n", base_url="http://b/v1", max_tokens=9, temperature=0.0, completions=True,
                  token_parameter="max_completion_tokens", extra_body={"top_p": 0.5},
                  system_prompt="Be brief.")  # fmt: skip
    keys = [ask.key(replace(e, **{name: value})) for name, value in fields.items()]
    for change in ({"task": "u"}, {"id": "7"}, {"sample": 1}, {"messages": asks(2)[1].messages}):
        keys.append(replace(ask, **change).key(e))
    assert len({ask.key(e), *keys}) == 1 + len(keys)
    same = dict(base_url="http://a/v1/", concurrency=1, timeout=1.0, extra_header=(("X-A", "B"),))
    assert ask.key(replace(e, **same)) == ask.key(e)


def from_words(*words, who="teacher"):
    parser = argparse.ArgumentParser()
    endpoint.add_flags(parser, who)
    base = [f"--{who}-model", "gpt-x", "--base-url", "https://api.example.com/v1"]
    return endpoint.from_flags(parser.parse_args([*base, *words]), who)


@pytest.mark.parametrize("who, more, key", [
    ("teacher", "", "e678dbf9e2b9382c52832a65"),
    ("teacher", "--teacher-temperature 0.7 --completions", "1d207c1ab5b17c4448a3d0cf"),
    ("judge", "", "e88ab58802c4d882d071e050"),
])  # fmt: skip
def test_keys_stay_what_they_were(who, more, key):
    """Replies that were bought before a change of this program must not be bought again."""
    message = {"role": "user", "content": "Question: Is it é?\nAnswer:"}
    e = from_words(*more.split(), who=who)
    assert Ask("strategy_qa", "7", 0, (message,)).key(e).startswith(key)


def test_what_is_sent(tmp_path):
    with FakeServer(ok()) as server:
        run(tmp_path, server)
        run(tmp_path, server, temperature=0.5, completions=True)
        run(tmp_path, server, token_parameter="max_completion_tokens")
    a, b, c = server.bodies
    message = {"role": "user", "content": "q0"}
    assert a == {"model": "m", "messages": [message], "max_tokens": 512}
    assert b == {"model": "m", "prompt": "q0", "max_tokens": 512, "temperature": 0.5}
    assert c == {"model": "m", "messages": [message], "max_completion_tokens": 512}
    assert Endpoint("m").token_limit() == {"max_completion_tokens": 512}  # api.openai.com
    assert list(Endpoint("m", "https://evilopenai.com/v1").token_limit()) == ["max_tokens"]


@pytest.mark.parametrize("url, variable, value, message", [
    ("http://192.168.1.4:8000/v1", "", "", "unencrypted.*--insecure"),
    ("https://user:secret@example.com/v1", "", "", "must not hold a password"),
    ("https://example.com/v1?key=secret", "", "", "must not hold a password"),
    ("ftp://example.com", "", "", "no http"),
    ("http://a:99999/v1", "", "", "no http"),
    (OTHER, "ALL_PROXY", "socks://proxy:1080", "check or unset .*ALL_PROXY"),
    (OTHER, "SSL_CERT_FILE", "/no/such/file.pem", "check or unset .*SSL_CERT_FILE"),
    (None, "OPENAI_API_KEY", "", "OPENAI_API_KEY is not set"),
    # httpx puts a header that it can't send into its message: "Illegal header value b'Bearer sk-..'"
    (OTHER, "OPENAI_API_KEY", "sk-a\nb-secret", "no key has"),
])  # fmt: skip
def test_what_makes_no_client(url, variable, value, message, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, value)
    assert "secret" not in refuses(message, lambda: make_client(Endpoint("m", url)))


def test_which_servers_need_a_key_and_a_proxy(tmp_path, monkeypatch):
    """With HTTP_PROXY set, requests for 127.0.0.1 went to the proxy, which failed."""
    assert make_client(Endpoint("m", "http://192.168.1.4/v1", insecure=True))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # the end of a file's line is no part of it
    with FakeServer(ok()) as server:
        run(tmp_path, server)
        monkeypatch.delenv("OPENAI_API_KEY")
        assert make_client(Endpoint("m", "http://192.168.1.4/v1"))
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert run(tmp_path, server, 2)[1] == [] and server.auths[0] == f"Bearer {KEY}"


def stopped(folder, server, requests, number, **more) -> int:
    """How a fork ends (no import of torch per kill) that gets a signal after so many requests."""
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, server, 50, **more)
        except SystemExit as stop:
            os._exit(stop.code)
        finally:
            os._exit(99)
    while len(server.bodies) < requests:
        time.sleep(0.01)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_in_flight(number, tmp_path, capfd):
    """SIGTERM just killed the process, with paid requests in flight."""
    with FakeServer(ok(), delay=0.3) as server:
        assert stopped(tmp_path, server, 5, number, concurrency=4) == 128 + number
        there = stored(tmp_path)
        assert len(there.replies) == len(server.bodies) >= 5 and there.open_bills() == []
    said = capfd.readouterr().out
    assert "continue with: " in said and "without a known bill" not in said
    assert len(server.bodies) <= 9


def test_a_signal_at_the_last_reply_stops_as_well(tmp_path, monkeypatch):
    """It was swallowed, and distill.py went on to train."""
    monkeypatch.setattr(asking, "FIRST", 1)
    signal_me = Readable(lambda ask, replies: not os.kill(os.getpid(), 15), "", "")
    with FakeServer(ok()) as server:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, server, 1, readable=signal_me)
        assert stopped.value.code == 143 and len(server.bodies) == 1


def test_a_hanging_request_does_not_hold_up_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "DRAIN", 0.3)
    with FakeServer(ok(), hang(20)) as server:
        assert stopped(tmp_path, server, 2, signal.SIGTERM, concurrency=2, timeout=30) == 143
        assert server.served <= 1  # the second request still hangs
        assert len(stored(tmp_path).open_bills()) in (1, 2)


def test_a_reply_that_ended_by_itself_serves_any_limit(tmp_path):
    """Following "give a smaller --teacher-max-tokens" bought every reply again."""
    with FakeServer(answer=lambda b: ok("half", "length") if "q1" in str(b) else ok()) as server:
        run(tmp_path, server, 3, max_tokens=100)
        for cap, requests in ((50, 4), (200, 5), (200, 5)):  # the one that was cut is asked again
            collection, failures = run(tmp_path, server, 3, max_tokens=cap)
            assert (len(server.bodies), failures) == (requests, [])
            assert len([ask for ask in asks(3) if collection.find(ask)]) == 3


def test_the_same_server_at_another_address_is_named_by_a_flag(tmp_path, capsys):
    with FakeServer(ok()) as old, FakeServer(ok()) as new:
        run(tmp_path, old, 3)
        run(tmp_path, new, 3, also_url=old.url)
        assert new.bodies == []
        run(tmp_path, new, 3)
        assert len(new.bodies) == 3 and "--also-url" in capsys.readouterr().out


def test_an_unknown_finish_is_asked_again_once_a_run(tmp_path):
    """Half a text under a word that we don't know counted as whole, and for ever."""
    half = ok("Half a", "sensitive")
    with FakeServer(half, half, ok("Whole.")) as server:
        for requests, text in ((1, "Half a"), (2, "Half a"), (3, "Whole."), (3, "Whole.")):
            collection, failures = run(tmp_path, server, 1)
            assert (len(server.bodies), failures) == (requests, [])
            assert collection.find(asks()[0])["text"] == text
    with FakeServer(error(500, "gone")) as server:  # what is there stays, and nothing is missing
        (tmp_path / "b").mkdir()
        record = {"key": asks()[0].key(at(server)), "text": "Half", "finish": "abort", "id": "0"}
        (tmp_path / "b/responses.jsonl").write_text(json.dumps(record) + "\n")
        assert run(tmp_path / "b", server, 1)[1] == []


def test_concurrency_adapts_to_a_serial_server(tmp_path):
    """8 requests at a time against a server that serves one got 2 replies for 60 requests."""
    turn = threading.Lock()

    def serial(body):
        with turn:
            time.sleep(0.1)
        return ok()

    with FakeServer(answer=serial) as server:
        collection, failures = run(tmp_path, server, 20, timeout=0.35, concurrency=16)
        assert failures == [] and len(collection.replies) == 20 and len(server.bodies) < 40


@pytest.mark.parametrize("words, message", [
    (["--concurrency", "0"], "--concurrency must be above 0"),
    (["--timeout", "nan"], "--timeout must be"), (["--price-in", "-1"], "--price-in must be"),
    (["--max-cost", "1"], "needs --price-in"),
    (["--max-cost", "nan", "--price-in", "1", "--price-out", "1"], "--max-cost must be"),
    (["--teacher-temperature", "inf"], "--teacher-temperature must be"),
    (["--base-url", "https://me:pw@host/v1"], "must not hold a password"),
    (["--extra-body", "[1]"], "no JSON object"), (["--extra-body", "{"], "no JSON object"),
    (["--extra-body", '{"n": 2, "stream": true}'], "must not set n, stream"),
    (["--extra-header", "X-Key"], "NAME=VARIABLE"), (["--extra-header", "X=NO"], "NO is not set"),
])  # fmt: skip
def test_bad_flags_are_refused(words, message):
    refuses(message, from_words, *words)


def test_additions_to_a_request(tmp_path, monkeypatch):
    """They are sent, and a header's value is stored nowhere."""
    monkeypatch.setenv("HEADER_VALUE", "secret-header-value-123")
    with FakeServer(ok("I saw secret-header-value-123.")) as server:
        e = from_words("--extra-body", '{"top_p": 0.5}', "--system-prompt", "Be brief.",
                       "--extra-header", "X-Title=HEADER_VALUE")  # fmt: skip
        run(tmp_path, server, e=e, base_url=server.url, timeout=5)
    (body,), (headers,) = server.bodies, server.headers
    assert body["top_p"] == 0.5 and headers["x-title"] == "secret-header-value-123"
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert b"secret-header" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    refuses("HEADER_VALUE unencrypted", make_client, replace(e, base_url="http://10.0.0.1/v1"))
