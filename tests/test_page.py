"""The page: what it embeds (always), and what a reader sees and does (in headless Chromium)."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import write_tiny_tokenizer

from sert_min import filters
from sert_min.io.errors import SertError
from sert_min.io.files import to_line
from sert_min.questions import Question
from sert_min.report import page
from sert_min.tokenizer import load_tokenizer

ATTACK = 'x</script><img src=q onerror="window.hacked=1"><script>window.hacked=1</script>'
LIMITS = filters.limits({"min_tokens": 8, "max_rep2": 0.9, "min_perplexity": 1.05})


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page-tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def write_run(folder: Path, tokenizer, questions: dict, draw) -> Path:
    """A run folder with 5 x 5 paths per question; `draw(id, branch, sample)` -> (text, finish)."""
    folder.mkdir(parents=True)
    funnel, lines = filters.Funnel(), []
    for name, text in questions.items():
        q = Question("strategy_qa", name, text, "yes", page.choices_of(text))
        sampled = []
        for i in range(25):
            said, finish = draw(name, i // 5, i % 5)
            ids = tokenizer.encode(said)
            logprobs = [round(-((k * 7 + i) % 11) / 3, 5) for k in range(len(ids))]
            sampled.append({"id": name, "branch": i // 5, "sample": i % 5, "token_ids": ids,
                            "logprobs": logprobs, "path_start": 0, "finish": finish})  # fmt: skip
        lines += map(
            to_line, map(funnel.add, filters.path_records(sampled, [q], tokenizer, LIMITS))
        )
    (folder / "paths.jsonl").write_text("".join(lines))
    settings = {"task": "strategy_qa", "model": "tiny", "branches": 5, "samples": 5}
    (folder / "settings.json").write_text(json.dumps(settings))
    told = {"rules": LIMITS, "counts": funnel.counts()}
    (folder / "funnel.json").write_text(json.dumps(told))
    return folder


def plain(name, branch, sample):
    """One kept path in branch 2, one selected in branch 3, bare answers, a cut path, two options."""
    if branch == 3 and sample == 1:
        return "Because the town of which we speak is near.", "eos"
    if branch == 2 and sample == 4:
        return "the the the town is the the town, as far as the town is known", "eos"
    if branch == 4 and sample == 0:
        return "It is far away, in the north. And then we", "length"
    return ("Yes", "yes or no, yes or no")[sample % 2], "eos"


def embedded(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


# --- what the page embeds -------------------------------------------------------------------------


def test_page_holds_every_token_and_log_prob(tmp_path, tokenizer):
    """Guards the compact form: renumbered tokens joined give the records' texts again, also where
    a character is split over tokens or a text is dimmed behind path_end."""
    said = {0: "née 日本 the town", 1: "It is far. And then 日", 2: "\U0001f600" * 3}
    run = write_run(
        tmp_path / "run", tokenizer, {"q": "Is it?"}, lambda n, b, s: (said[b % 3], "length")
    )
    assert page.write_page(run, tmp_path / "p.html", tokenizer) == 1
    data = embedded(tmp_path / "p.html")
    records = [json.loads(line) for line in (run / "paths.jsonl").read_text().splitlines()]
    assert len(data["questions"][0]["paths"]) == len(records) == 25
    for path, r in zip(data["questions"][0]["paths"], records):
        split = path[11] if len(path) > 11 else {}
        texts = [split.get(str(i), data["vocab"][n]) for i, n in enumerate(path[2])]
        assert "".join(texts[path[4] : path[5]]) == r["text"]
        assert "".join(texts) == tokenizer.decode(r["token_ids"])
        assert path[3] == [round(-1000 * x) for x in r["logprobs"]]
        assert path[9] == r["verdict"]
    assert any(p[5] < len(p[2]) for p in data["questions"][0]["paths"])  # a cut path is there


def test_embedded_json_cannot_leave_its_script(tmp_path, tokenizer):
    """`</script>`, U+2028 and slot names in data and title stay data: the page has exactly the
    template's tags, and one policy whose hashes are of its own style and script."""
    question = ATTACK + "\u2028{{data}}"
    run = write_run(tmp_path / "run", tokenizer, {"<q>": question}, lambda n, b, s: (ATTACK, "eos"))
    page.write_page(run, tmp_path / "p.html", tokenizer, title="{{data}} </title><b>")
    text, template = (tmp_path / "p.html").read_text(), page.TEMPLATE.read_text()
    for tag in ("<script", "</script", "<img", "</title", "<b>"):
        assert text.count(tag) == template.count(tag), tag
    assert "\u2028" not in text and "default-src 'none'" in text
    assert embedded(tmp_path / "p.html")["questions"][0]["q"] == question
    assert not re.search(r"\b(?:src|href)=\"http|https?://(?!www\.w3\.org/2000/svg)", template)


def test_limit_keeps_the_chart_whole(tmp_path, tokenizer):
    questions = {f"q{i}": f"Is it {i}?" for i in range(4)}
    run = write_run(tmp_path / "run", tokenizer, questions, plain)
    assert page.write_page(run, tmp_path / "p.html", tokenizer, limit=3) == 3
    data = embedded(tmp_path / "p.html")
    assert (len(data["questions"]), data["counts"]["questions"]) == (3, 4)
    assert data["counts"]["paths"] == 100
    verdicts = [p[9] for p in data["questions"][0]["paths"]]
    assert verdicts.count("selected") == 1 and "pattern:options" in verdicts
    lists = [p for p in data["questions"][0]["paths"] if p[9] == "pattern:options"]
    assert all(0 < p[10] < len(p[2]) for p in lists)  # the token that broke the rule is known


def test_rules_come_from_the_table_and_old_folders_are_read(tmp_path, tokenizer):
    """Guards a new rule that the page does not know, and a folder without funnel.json."""
    run = write_run(tmp_path / "run", tokenizer, {"q": "Is it?"}, plain)
    page.write_page(run, tmp_path / "new.html", tokenizer)
    (run / "funnel.json").unlink()
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, **LIMITS}))
    page.write_page(run, tmp_path / "old.html", tokenizer)
    assert (tmp_path / "new.html").read_bytes() == (tmp_path / "old.html").read_bytes()
    rules = embedded(tmp_path / "new.html")["rules"]
    assert [name for name, _ in rules] == [rule.name for rule in filters.RULES]
    assert ["length", "at least 8 tokens"] in rules


def test_wrong_inputs_are_one_line(tmp_path, tokenizer):
    run = write_run(tmp_path / "run", tokenizer, {"q": "Is it?"}, lambda *_: ("the town", "eos"))
    (tmp_path / "wrong").mkdir()
    write_tiny_tokenizer(tmp_path / "wrong", [])
    for folder, tok, message in (
        (run, load_tokenizer(tmp_path / "wrong"), "this model's tokenizer lacks"),
        (tmp_path / "none", tokenizer, "does not exist"),
    ):
        with pytest.raises(SertError, match=message):
            page.write_page(folder, tmp_path / "p.html", tok)
        assert not (tmp_path / "p.html").exists()


# --- what a reader sees: headless Chromium over the WebDriver protocol -----------------------------


class Browser:
    """The few WebDriver commands that the tests need, over plain HTTP to chromedriver."""

    def __init__(self, folder: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.driver = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"], env={**os.environ, "HOME": str(folder)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
        flags += " disable-background-networking disable-component-update disable-dev-shm-usage"
        args = [f"--{flag}" for flag in flags.split()]
        args += [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": args, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            self.wait_until_ready()
            made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self.driver.kill()
            raise
        light = {"name": "prefers-color-scheme", "value": "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[light])

    def wait_until_ready(self):
        for _ in range(200):
            try:
                return self.ask("GET", "/status")
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("chromedriver does not answer")

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(json.load(e)["value"]["message"].split("\n")[0]) from None

    def post(self, path, **body):
        return self.ask("POST", self.session + path, body)

    def cdp(self, cmd, **params):
        return self.post("/goog/cdp/execute", cmd=cmd, params=params)

    def open(self, path: Path, hash=""):
        self.post("/url", url="about:blank")  # a new hash alone would not load the page anew
        self.post("/url", url=path.resolve().as_uri() + hash)

    def js(self, script, *args):
        return self.post("/execute/sync", script=script, args=list(args))

    def press(self, key):
        """A key as the user's keyboard sends it."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def click(self, css):
        """The left mouse button in the middle of an element."""
        x, y = self.js(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({ block: 'center' });"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]",
            css,
        )
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        steps = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self.post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": steps}])

    def type(self, text):
        for key in text:
            self.press(key)

    def logs(self, kind):
        return self.post("/se/log", type=kind)

    def requests(self):
        """URLs of all requests since the last call, this page's own file included."""
        events = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]

    def close(self):
        try:
            self.ask("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (apt-get install chromium chromium-driver)")
    b = Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tokenizer):
    """one.html: 12 questions of which q3 attacks and q5 has no path."""
    folder = tmp_path_factory.mktemp("pages")
    questions = {f"q{i}": f"Is it number {i}?" for i in range(12)}
    questions["q3"] = ATTACK

    def draw(name, branch, sample):
        if name == "q3":
            return ATTACK, "eos"
        return ("Yes", "eos") if name == "q5" else plain(name, branch, sample)

    run = write_run(folder / "run", tokenizer, questions, draw)
    page.write_page(run, folder / "one.html", tokenizer)
    return folder


def current(browser):
    return browser.js("return decodeURIComponent(location.hash.slice(1))")


def open_verdict(browser):
    return browser.js("return document.querySelector('.path.open .toggle b')?.textContent ?? null")


def assert_quiet(browser, file):
    """No console message, and no request but the one for the file itself."""
    assert browser.logs("browser") == []
    own = file.resolve().as_uri()
    sent = [u.split("#")[0] for u in browser.requests()]
    assert own in sent  # the log is there
    browsers = ("about:blank", "chrome:", "chrome-untrusted:", "data:")  # its own new tab
    others = [u for u in sent if u != own and not u.startswith(browsers)]
    assert others == []


def test_opens_from_a_file_and_asks_for_nothing(browser, pages):
    browser.logs("performance"), browser.logs("browser")
    browser.open(pages / "one.html")
    assert browser.js("return [location.hash, scrollY]") == ["", 0]  # starts with the explanation
    assert browser.js("return document.querySelectorAll('.path').length") == 25
    assert browser.js("return document.querySelectorAll('.branch').length") == 5
    assert open_verdict(browser) == "★ selected"
    assert browser.js("return document.querySelectorAll('.path.open .rules li').length") == 5
    assert browser.js("return document.querySelectorAll('.path.open .curve').length") == 2
    assert browser.js("return document.querySelectorAll('#list a').length") == 12
    assert browser.js("return document.querySelectorAll('.t.off').length") > 0  # behind path_end
    assert_quiet(browser, pages / "one.html")
    refused = "return fetch('http://127.0.0.1:9/').then(() => 'sent', (e) => 'refused: ' + e.name)"
    assert browser.js(refused).startswith("refused")
    assert any("Content Security Policy" in m["message"] for m in browser.logs("browser"))
    browser.requests()


def test_mouse(browser, pages):
    browser.open(pages / "one.html", "#q0")
    browser.click("#list li:nth-child(3) a")
    assert current(browser).startswith("q2/")
    browser.click(".branch:nth-of-type(1) .path:nth-of-type(2) .toggle")
    assert open_verdict(browser) == "✕ lists the options" and current(browser) == "q2/2"
    browser.click(".branch:nth-of-type(1) .path:nth-of-type(2) .toggle")
    assert open_verdict(browser) is None
    browser.click("#filters label:last-child")
    assert browser.js("return [...document.querySelectorAll('#list li:not([hidden])')].length") == 1
    browser.click("#filters label:first-of-type")
    browser.click("#search")
    browser.type("number 7")
    assert current(browser).startswith("q7/")
    assert_quiet(browser, pages / "one.html")


def test_keyboard(browser, pages):
    browser.open(pages / "one.html", "#q0")
    seen = []
    for key in ("j", "\ue014", "k", "\ue012", "4", "4", "4", "s", "1", "n"):  # arrows: right, left
        browser.press(key)
        seen.append(current(browser))
    numbers = "q1/17 q2/17 q1/17 q0/17 q0/18 q0/19 q0/20 q0/17 q0/1 q0/2"
    assert seen == numbers.split()
    browser.js("document.activeElement.blur()")
    assert open_verdict(browser) == "✕ lists the options"
    browser.press("\ue007")  # Enter
    assert open_verdict(browser) is None
    browser.press("\ue007")
    assert open_verdict(browser) == "✕ lists the options"
    before = browser.js("return getComputedStyle(document.body).backgroundColor")
    browser.press("t")
    assert browser.js("return getComputedStyle(document.body).backgroundColor") != before
    browser.press("t")
    browser.press("/")
    assert browser.js("return document.activeElement.id") == "search"
    browser.type("j")  # typed, not a command
    assert browser.js("return document.getElementById('search').value") == "j"
    assert_quiet(browser, pages / "one.html")


def test_deep_link(browser, pages):
    browser.open(pages / "one.html", "#q4/21")
    assert current(browser) == "q4/21"
    label = "return document.querySelector('.path.open').getAttribute('aria-label')"
    assert browser.js(label) == "Path 5.1"
    seen = "const b = document.querySelector('.path.open').getBoundingClientRect();"
    assert browser.js(seen + "return b.top > -1 && b.bottom < innerHeight + 1")
    browser.js("location.hash = '#q6'")
    browser.js("return new Promise((done) => setTimeout(done, 50))")
    assert current(browser) == "q6/17"
    browser.open(
        pages / "one.html", "#%E0%A4%A/x"
    )  # a broken address shows a question all the same
    assert browser.js("return document.querySelectorAll('.path').length") == 25


def test_hostile_text_is_shown_and_does_nothing(browser, pages):
    browser.open(pages / "one.html", "#q3")
    assert browser.js("return document.querySelector('.path .text').textContent") == ATTACK
    assert browser.js("return document.querySelector('.question').textContent") == ATTACK
    assert browser.js("return window.hacked ?? null") is None
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert_quiet(browser, pages / "one.html")


def test_phone_width_has_no_sideways_scrolling(browser, pages):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.cdp("Emulation.setDeviceMetricsOverride", **metrics)
    try:
        browser.open(pages / "one.html", "#q0")
        assert browser.js("return document.documentElement.scrollWidth") <= 390
        browser.click("#openlist")
        browser.click("#list li:nth-child(2) a")
        assert current(browser).startswith("q1/")
    finally:
        browser.cdp("Emulation.clearDeviceMetricsOverride")
