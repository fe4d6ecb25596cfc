"""The page: what it embeds (always), and what a reader sees and does (in headless Chromium)."""

import contextlib
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
from conftest import ROOT, refuses, write_tiny_tokenizer

from sert_min import filters
from sert_min.io.files import read_jsonl, to_line
from sert_min.questions import Question, choices_of
from sert_min.report import page
from sert_min.tokenizer import load_tokenizer

ATTACK = 'x</script><img src=q onerror="window.hacked=1"><script>window.hacked=1</script>'
LIMITS = filters.limits({"min_tokens": 8, "max_rep2": 0.9, "min_perplexity": 1.05})
TRIED = [{}, {"min_tokens": 40}, {"max_rep2": 0.11}, {"min_perplexity": 5.5}, {"answer": "consistent"},
         {"answer": "right", "min_tokens": 2}, {"min_tokens": 0, "max_rep2": 1, "min_perplexity": 0},
         {"min_tokens": 14, "max_rep2": 0.35, "min_perplexity": 5.05, "answer": "right"}]  # fmt: skip


def write_run(folder: Path, tokenizer, questions: dict, draw) -> Path:
    """A run folder with 5 x 5 paths per question; `draw(id, branch, sample)` -> (text, finish)."""
    folder.mkdir(parents=True)
    funnel, lines = filters.Funnel(), []
    for name, text in questions.items():
        q = Question("strategy_qa", name, text, "yes", choices_of(text))
        sampled = []
        for i in range(25):
            said, finish = draw(name, i // 5, i % 5)
            ids = tokenizer.encode(said)
            logprobs = [round(-((k * 7 + i) % 11) / 3, 5) for k in range(len(ids))]
            sampled.append({"id": name, "question": text, "branch": i // 5, "sample": i % 5,
                            "token_ids": ids, "logprobs": logprobs, "path_start": 0,
                            "finish": finish})  # fmt: skip
        records = filters.path_records(sampled, [q], tokenizer, LIMITS)
        lines += map(to_line, map(funnel.add, records))
    (folder / "paths.jsonl").write_text("".join(lines))
    settings = {"task": "strategy_qa", "model": "tiny", "branches": 5, "samples": 5}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "funnel.json").write_text(json.dumps({"rules": LIMITS, "counts": funnel.counts()}))
    return folder


@pytest.fixture
def write(tmp_path, tokenizer):
    """write(questions, draw, ..) -> (a run folder with its page p.html, what the page embeds)."""

    def make(questions, draw, **more):
        run = write_run(tmp_path / "run", tokenizer, questions, draw)
        n = page.write_page(run, run / "p.html", tokenizer, **more)
        text = (run / "p.html").read_text(encoding="utf-8")
        start = '<script type="application/json" id="data">'
        (data,) = map(json.loads, re.findall(f"{start}(.*?)</script>", text, re.S))
        assert len(data["questions"]) == n
        return run, data

    return make


def plain(name, branch, sample):
    """One kept path in branch 2, one selected in branch 3, bare answers, a cut path, two options."""
    if branch == 3 and sample == 1:
        return "Because the town of which we speak is near.", "eos"
    if branch == 2 and sample == 4:
        return "the the the town is the the town, as far as the town is known", "eos"
    if branch == 4 and sample == 0:
        return "It is far away, in the north. And then we", "length"
    return ("Yes", "yes or no, yes or no")[sample % 2], "eos"


# --- what the page embeds -------------------------------------------------------------------------


def test_page_holds_every_token_and_log_prob(write, tokenizer):
    """Guards the compact form: renumbered tokens joined give the records' texts again, also where
    a character is split over tokens or a text is dimmed behind path_end."""
    said = {0: "née 日本 the town", 1: "It is far. And then 日", 2: "\U0001f600" * 3}
    run, data = write({"q": "Is it?"}, lambda n, b, s: (said[b % 3], "length"))
    records, (question,) = list(read_jsonl(run / "paths.jsonl")), data["questions"]
    assert len(question["paths"]) == len(records) == 25
    for path, r in zip(question["paths"], records):
        split = path[13] if len(path) > 13 else {}
        texts = [split.get(str(i), data["vocab"][n]) for i, n in enumerate(path[2])]
        assert "".join(texts[path[4] : path[5]]) == r["text"]
        assert "".join(texts) == tokenizer.decode(r["token_ids"])
        assert path[3] == [round(-1000 * x) for x in r["logprobs"]]
        assert path[9] == r["verdict"]
    assert any(p[5] < len(p[2]) for p in question["paths"])  # a cut path is there


def test_embedded_json_cannot_leave_its_script(write):
    """`</script>`, U+2028 and slot names in data and title stay data: the page has exactly the
    template's tags, and one policy whose hashes are of its own style and script."""
    question = ATTACK + "\u2028{{data}}"
    title = "{{data}} </title><b>"
    run, data = write({"<q>": question}, lambda n, b, s: (ATTACK, "eos"), title=title)
    text, template = (run / "p.html").read_text(), page.TEMPLATE.read_text()
    for tag in ("<script", "</script", "<img", "</title", "<b>"):
        assert text.count(tag) == template.count(tag), tag
    assert "\u2028" not in text and "default-src 'none'" in text
    assert data["questions"][0]["q"] == question
    assert not re.search(r"\b(?:src|href)=\"http|https?://(?!www\.w3\.org/2000/svg)", template)


def test_the_page_of_the_readme_has_todays_template():
    """Guards docs/page.html: its data in today's page.html give the file."""
    text = (ROOT / "docs/page.html").read_text(encoding="utf-8")
    (data,) = re.findall('id="data">(.*?)</script>', text, re.S)
    assert page.fill_template(json.loads(data)) == text


def test_limit_keeps_the_chart_whole(write):
    """Guards also a new rule that the page does not know."""
    _, data = write({f"q{i}": f"Is it {i}?" for i in range(4)}, plain, limit=3)
    assert (len(data["questions"]), data["counts"]["questions"]) == (3, 4)
    assert data["counts"]["paths"] == 100
    verdicts = [p[9] for p in data["questions"][0]["paths"]]
    assert verdicts.count("selected") == 1 and "pattern:options" in verdicts
    lists = [p for p in data["questions"][0]["paths"] if p[9] == "pattern:options"]
    assert all(0 < p[10] < len(p[2]) for p in lists)  # the token that broke the rule is known
    assert [name for name, *_ in data["rules"]] == [rule.name for rule in filters.RULES]
    assert ["length", "at least 8 tokens", "min_tokens", "at least {} tokens"] in data["rules"]


def test_wrong_inputs_are_one_line(tmp_path, tokenizer):
    run = write_run(tmp_path / "run", tokenizer, {"q": "Is it?"}, lambda *_: ("the town", "eos"))
    (tmp_path / "wrong").mkdir()
    write_tiny_tokenizer(tmp_path / "wrong", [])
    wrong, out = load_tokenizer(tmp_path / "wrong"), tmp_path / "p.html"
    refuses("this model's tokenizer lacks", page.write_page, run, out, wrong)
    refuses("does not exist", page.write_page, tmp_path / "none", out, tokenizer)
    assert not out.exists()


# --- what a reader sees: headless Chromium over the WebDriver protocol -----------------------------


class Browser:
    """The few WebDriver commands that the tests need, over plain HTTP to chromedriver."""

    LOGS = "browser", "performance"
    FLAGS = "headless window-size=1280,900 disable-background-networking disable-component-update "
    FLAGS += "no-sandbox disable-gpu disable-quic no-first-run disable-dev-shm-usage disable-sync"

    def __init__(self, folder: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, quiet = f"http://127.0.0.1:{port}", subprocess.DEVNULL
        how = {"stdout": quiet, "stderr": quiet, "env": {**os.environ, "HOME": str(folder)}}
        self.driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], **how)
        args = [f"--{flag}" for flag in self.FLAGS.split()] + [f"--user-data-dir={folder / 'p'}"]
        wanted = {"goog:chromeOptions": {"args": args, "binary": shutil.which("chromium")}}
        wanted |= {"browserName": "chrome", "goog:loggingPrefs": dict.fromkeys(self.LOGS, "ALL")}
        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    self.ask("GET", "/status")
                    break
                time.sleep(0.1)
            made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self.driver.kill()
            raise

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, told, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(json.load(e)["value"]["message"].split("\n")[0]) from None

    def post(self, path, **body):
        return self.ask("POST", self.session + path, body)

    def open(self, path: Path, hash=""):
        self.post("/url", url="about:blank")  # a new hash alone would not load the page anew
        self.post("/url", url=path.resolve().as_uri() + hash)

    def js(self, script, *args):
        return self.post("/execute/sync", script=script, args=list(args))

    def text(self, css):
        return self.js("return document.querySelector(arguments[0]).textContent", css)

    def count(self, css):
        return self.js("return document.querySelectorAll(arguments[0]).length", css)

    def press(self, *keys):
        """Keys as the user's keyboard sends them."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": steps}])

    def click(self, css):
        """The left mouse button in the middle of an element."""
        js = "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
        js += "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
        x, y = self.js(js, css)
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        steps = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self.post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": steps}])

    def assert_quiet(self, file):
        """No console message, and no request but the one for the file itself."""
        assert self.post("/se/log", type="browser") == []
        log = self.post("/se/log", type="performance")
        events = [json.loads(e["message"])["message"] for e in log]
        sent = [e["params"]["request"]["url"].split("#")[0] for e in events
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
        own = ("about:blank", "chrome:", "chrome-untrusted:", "data:")  # its own new tab
        assert {u for u in sent if not u.startswith(own)} == {file.resolve().as_uri()}

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
def file(tmp_path_factory, tokenizer):
    """A page of 12 questions, of which q3 attacks and q5 has no path."""
    folder = tmp_path_factory.mktemp("pages")
    questions = {f"q{i}": f"Is it number {i}?" for i in range(12)}
    questions["q3"] = ATTACK
    same = {"q3": (ATTACK, "eos"), "q5": ("Yes", "eos")}
    draw = lambda name, *at: same.get(name) or plain(name, *at)  # noqa: E731
    run = write_run(folder / "run", tokenizer, questions, draw)
    page.write_page(run, folder / "p.html", tokenizer)
    return folder / "p.html"


def current(browser):
    return browser.js("return decodeURIComponent(location.hash.slice(1))")


def open_verdict(browser):
    return browser.js("return document.querySelector('.path.open .toggle b')?.textContent ?? null")


def test_opens_from_a_file_and_asks_for_nothing(browser, file):
    """Guards a page that needs a server, and hostile text that is run instead of shown."""
    browser.post("/se/log", type="performance")
    browser.open(file)
    assert browser.js("return [location.hash, scrollY]") == ["", 0]  # starts with the explanation
    assert open_verdict(browser) == "★ selected"
    counts = {".path": 25, ".branch": 5, ".path.open .curve": 2, "#list a": 12,
              ".path.open .rules li": len(filters.RULES) + 1}  # fmt: skip
    assert {css: browser.count(css) for css in counts} == counts
    assert browser.count(".t.off") > 0  # behind path_end
    browser.open(file, "#q3")
    assert browser.text(".path .text") == browser.text(".question") == ATTACK
    assert browser.js("return window.hacked ?? null") is None and browser.count("img") == 0
    browser.assert_quiet(file)
    refused = "return fetch('http://127.0.0.1:9/').then(() => 'sent', (e) => 'refused: ' + e.name)"
    assert browser.js(refused).startswith("refused")
    said = browser.post("/se/log", type="browser")
    assert any("Content Security Policy" in m["message"] for m in said)
    browser.post("/se/log", type="performance")


def test_mouse(browser, file):
    browser.open(file, "#q0")
    browser.click("#list li:nth-child(3) a")
    assert current(browser).startswith("q2/")
    browser.click(".branch:nth-of-type(1) .path:nth-of-type(2) .toggle")
    assert open_verdict(browser) == "✕ lists the options" and current(browser) == "q2/2"
    browser.click(".branch:nth-of-type(1) .path:nth-of-type(2) .toggle")
    assert open_verdict(browser) is None
    browser.click("#filters label:nth-of-type(3)")
    assert browser.count("#list li:not([hidden])") == 1
    browser.click("#filters label:first-of-type")
    browser.click("#search")
    browser.press(*"number 7")
    assert current(browser).startswith("q7/")
    browser.assert_quiet(file)


def answers(name, branch, sample):
    """Paths of several lengths, repetitions and perplexities, with right, wrong and no answers."""
    said = "So the answer is yes.", "So the answer is no.", "That is all.", "Because it is so."
    parts = ["the town", "we see", "an ant", "he went"][: 1 + (branch + sample) % 4]
    words = " ".join(parts * (1 + sample % 3))
    return f"{words} there {said[(branch + 2 * sample + len(name)) % 4]}", "eos"


def test_the_sliders_filter_as_filters_py_does(browser, write, tokenizer, monkeypatch):
    """Guards verdicts, the selection and the funnel of other limits, for all paths of a file; also
    with a new rule between the others, which has no slider."""
    ant = filters.Rule("ant", "ants", 0, filters.number(0), lambda path: path.text.count("an ant"),
                       lambda n, most: n > most, "at most {} ants", "0: none")  # fmt: skip
    monkeypatch.setattr(filters, "RULES", (*filters.RULES[:2], ant, *filters.RULES[2:]))
    monkeypatch.setitem(LIMITS, "ants", 0)
    questions = {f"q{i}": f"Is it number {i}?" for i in range(8)}
    run, _ = write(questions, answers)
    browser.open(run / "p.html")
    stored = list(read_jsonl(run / "paths.jsonl"))
    verdicts, commands = set(), []
    for change in TRIED:
        rules, records = filters.limits(LIMITS | change), []
        for name, text in questions.items():
            q = Question("strategy_qa", name, text, "yes")
            some = [{k: r[k] for k in filters.SAMPLED} for r in stored if r["id"] == name]
            records += filters.path_records(some, [q], tokenizer, rules)
        browser.js("Object.assign(limits, D.limits, arguments[0]); refilter()", change)
        found = browser.js("return D.questions.flatMap((q) => q.paths.map((a) => a[9]))")
        assert found == [r["verdict"] for r in records], change
        counts, funnel = browser.js("return D.shown"), filters.Funnel(records).counts()
        assert all(counts[k] == funnel[k] for k in ("paths", "selected", "without_path")), change
        assert {k: v for k, v in counts["dropped"].items() if v} == {
            k: v for k, v in funnel["dropped"].items() if v}  # fmt: skip
        verdicts |= set(found)
        commands.append(browser.text("#command"))
    assert verdicts == {"selected", "kept", "length", "ant", "repetition", "perplexity", "answer"}
    assert commands[0] == "" and commands[1] == "python sample.py --refilter --min-tokens 40"
    browser.js("limits.min_tokens = D.limits.min_tokens; refilter()")
    assert "selected paths on this page" in browser.text("#note")
    assert browser.count(".stated.wrong") > 0
    browser.assert_quiet(run / "p.html")


def test_keyboard(browser, file):
    browser.open(file, "#q0")
    seen = []
    for key in ("j", "\ue014", "k", "\ue012", "4", "4", "4", "s", "1", "n"):  # arrows: right, left
        before = current(browser)
        browser.press(key)  # a busy browser takes it later
        for _ in range(600):
            if current(browser) != before:
                break
            time.sleep(0.05)
        seen.append(current(browser))
    assert " ".join(seen) == "q1/17 q2/17 q1/17 q0/17 q0/18 q0/19 q0/20 q0/17 q0/1 q0/2"
    browser.js("document.activeElement.blur()")
    for verdict in (None, "✕ lists the options"):
        browser.press("\ue007")  # Enter
        assert open_verdict(browser) == verdict
    color = "return getComputedStyle(document.body).backgroundColor"
    before = browser.js(color)
    browser.press("t")
    assert browser.js(color) != before
    browser.press("t", "/", "j")  # the last one is typed, not a command
    assert browser.js("return document.getElementById('search').value") == "j"
    browser.assert_quiet(file)


def test_deep_link(browser, file):
    browser.open(file, "#q4/21")
    assert current(browser) == "q4/21"
    label = "return document.querySelector('.path.open').getAttribute('aria-label')"
    assert browser.js(label) == "Path 5.1"
    seen = "const b = document.querySelector('.path.open').getBoundingClientRect();"
    assert browser.js(seen + "return b.top > -1 && b.bottom < innerHeight + 1")
    browser.js("location.hash = '#q6'")
    browser.js("return new Promise((done) => setTimeout(done, 50))")
    assert current(browser) == "q6/17"
    browser.open(file, "#%E0%A4%A/x")  # a broken address shows a question, too
    assert browser.count(".path") == 25


def test_phone_width_has_no_sideways_scrolling(browser, file):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)
    browser.open(file, "#q0")
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    browser.click("#openlist")
    browser.click("#list li:nth-child(2) a")
    assert current(browser).startswith("q1/")
