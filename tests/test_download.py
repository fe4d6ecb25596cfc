"""download_model through the real huggingface_hub, against an HTTP server on this machine."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import transformers
from conftest import ROOT

from sert_min.io.hub import HUB, weights_hash
from sert_min.models import load_model
from sert_min.tokenizer import load_tokenizer

MAIN = "0123456789abcdef0123456789abcdef01234567"  # the commit of `main`
SHORT = "model.safetensors"

# Reads {"name", "env"} lines; answers each with what became of the model, from a process of its own:
# the hub's client reads its environment when it is imported. Waits are left out and counted.
LOADER = """
import json, os, sys, time
import safetensors.torch
from sert_min.models import load_model
from sert_min.io.errors import SertError
from sert_min.io.hub import find_model, weights_hash
from sert_min.tokenizer import load_tokenizer

slept = []

def load(name):
    try:
        folder = find_model(name)
        load_model(folder)
        ids = load_tokenizer(folder).encode("the yes")
        return {"folder": str(folder), "hash": weights_hash(folder), "ids": ids, "waits": sum(slept)}
    except SertError as e:
        return {"error": str(e), "waits": sum(slept)}

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(request["env"])
        time.sleep = slept.append
        print(json.dumps(load(request["name"])), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(json.dumps({"crashed": request}), flush=True)  # the traceback is on stderr
"""


class Hub:
    """What huggingface_hub needs of the hub: HEAD and GET of /{repo}/resolve/{revision}/{file}."""

    def __init__(self):
        self.repos: dict[str, tuple[Path, str]] = {}  # repo -> its files, the only commit it has
        self.status = 0  # answers everything, if it is set
        self.cut = None  # "short": GET announces and sends less; "broken": it stops half-way
        self.asked: list[str] = []
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {
            "protocol_version": "HTTP/1.1", "log_message": lambda *_: None,
            "do_GET": lambda request: self.answer(request),
            "do_HEAD": lambda request: self.answer(request)})  # fmt: skip
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path = request.path.partition("?")[0].removeprefix("/api/models")
        repo, how, rest = re.fullmatch("/(.*?)/(resolve|revision|tree)/(.*)", path).groups()
        revision, _, name = rest.partition("/")
        self.asked.append(f"{request.command} {revision}/{name or how}")
        folder, commit = self.repos.get(repo, (None, None))
        status, headers, body = 404, {"X-Repo-Commit": commit or ""}, b""
        if self.status:  # 200: a login page in place of the hub
            status, body = self.status, b"<html>log in</html>"
            headers = {"Content-Type": "text/html"}
        elif commit is None:
            headers = {"X-Error-Code": "RepoNotFound"}
        elif revision not in ("main", commit):
            headers = {"X-Error-Code": "RevisionNotFound"}
        elif how == "resolve" and (folder / name).is_file():
            status, body = 200, (folder / name).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        elif how == "resolve":
            headers["X-Error-Code"] = "EntryNotFound"
        else:  # older clients ask for the revision, newer ones for the tree
            about = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name,
                      "rfilename": f.name} for f in folder.iterdir()]  # fmt: skip
            if how == "revision":
                about = {"id": repo, "sha": commit, "siblings": about}
            status, body = 200, json.dumps(about).encode()
            headers["Content-Type"] = "application/json"
        announced, cut = len(body), request.command == "GET" and name == SHORT and self.cut
        body = body[: len(body) // 2] if cut else body
        headers["Content-Length"] = str(len(body) if cut == "short" else announced)
        request.send_response(status)
        for header in headers.items():
            request.send_header(*header)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
            request.close_connection = request.close_connection or self.cut == "broken"


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def loader():
    mine = ("HF_TOKEN", "HF_HUB_CACHE")
    env = {k: v for k, v in os.environ.items() if k not in mine and "proxy" not in k.lower()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LOADER], cwd=ROOT, env=env, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def load(tmp_path, hub, loader):
    """load(name, **environment) -> what LOADER said, under its own empty Hugging Face cache."""

    def run(name: str, **environment) -> dict:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}  # fmt: skip
        print(json.dumps({"name": name, "env": env}), file=loader.stdin, flush=True)
        result = json.loads(loader.stdout.readline())
        assert "crashed" not in result
        if "error" in result:
            assert "\n" not in result["error"] and name.split("/")[-1] in result["error"]
        return result

    return run


@pytest.fixture(scope="session")
def sharded(tiny_model_folder, tmp_path_factory) -> Path:
    """The same model as newer transformers write it: shards with an index, tokenizer.json."""
    folder = tmp_path_factory.mktemp("hub") / "sharded"
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny_model_folder)
    model.save_pretrained(folder, max_shard_size="40KB")
    files = (str(tiny_model_folder / name) for name in ("vocab.json", "merges.txt"))
    transformers.GPT2Tokenizer(*files).save_pretrained(folder)
    assert len([*folder.glob("model-*")]) > 2 and not (folder / "merges.txt").exists()
    return folder


def test_named_model_comes_from_its_pinned_revision(hub, load, tiny_model_folder):
    """Guards the pinned commit, and the second start: no request, no network, no hub."""
    repo, commit = HUB["gpt2"]
    hub.repos[repo] = tiny_model_folder, commit
    first = load("gpt2")
    assert first["hash"] == weights_hash(tiny_model_folder) and Path(first["folder"]).name == commit
    assert not [a for a in hub.asked if " main/" in a], "asked for main"
    hub.asked.clear()
    assert load("gpt2") == first
    assert not [a for a in hub.asked if commit in a], "asked again"
    hub.close()
    assert load("gpt2", HF_HUB_OFFLINE="1") == first
    assert load("gpt2") == first, "a cached model needs no hub"


def test_sharded_model_with_tokenizer_json_only(hub, load, sharded, tiny_model_folder):
    """Guards its offline start: the hub can't be asked then whether it has the other files."""
    hub.repos["someone/tiny"] = sharded, MAIN
    first = load("someone/tiny")
    assert Path(first["folder"]).name == MAIN
    main = [a for a in hub.asked if " main/" in a]  # it may move: the rest comes from one commit
    assert main == ["HEAD main/config.json", "GET main/config.json"]
    ours = load_model(Path(first["folder"])).state_dict()
    assert all((ours[k] == v).all() for k, v in load_model(tiny_model_folder).state_dict().items())
    assert load_tokenizer(tiny_model_folder).encode("the yes") == first["ids"]
    hub.close()
    for offline in "10":
        again = load("someone/tiny", HF_HUB_OFFLINE=offline)
        assert again.pop("waits") < 15, "waits for files that were never there"
        assert again == {k: first[k] for k in again}


def test_unknown_models_are_refused(hub, load, tiny_model_folder, tmp_path):
    """A wrong name, a repository without weights, of another architecture, with pickles only."""
    for name in ("someone/nothing", "gpt3", "what is/this?"):
        assert "is no folder and not on the hub" in load(name)["error"]
    other = tmp_path / "other"
    other.mkdir()
    hub.repos["someone/other"] = other, MAIN
    assert "no config.json" in load("someone/other")["error"]
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / SHORT).write_bytes(b"must not be asked for")
    hub.repos["someone/other"] = other, "f" * 40
    assert "type 'bert'" in load("someone/other")["error"]
    assert not [a for a in hub.asked if a.endswith(SHORT)]
    shutil.copy(tiny_model_folder / "config.json", other)
    (other / SHORT).rename(other / "pytorch_model.bin")
    hub.repos["someone/other"] = other, "e" * 40
    assert "pickle files are refused" in load("someone/other")["error"]
    assert not list(tmp_path.rglob(f"snapshots/*/{SHORT}"))


def test_unreachable_hub_is_one_line(hub, load):
    """Guards a wait or a traceback without a network, also beside a proxy that is not for the hub, and
    offline with an empty cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    beside = {"HF_ENDPOINT": closed, "HTTP_PROXY": "http://[::1]:1", "NO_PROXY": "127.0.0.1"}
    for environment in ({"HF_ENDPOINT": closed}, {"HF_HUB_OFFLINE": "1"}, beside):
        found = load("gpt2", **environment)
        error = found["error"]
        assert found["waits"] == 0
        assert "can't be reached" in error and "HF_ENDPOINT" in error and "HF_HUB_OFFLINE" in error
    assert not hub.asked


@pytest.mark.parametrize("status, message", [
    (401, "HF_TOKEN"), (403, "accept its terms"), (429, "too many requests"), (200, "login page"),
    (302, "login page"), (503, "answers 503; try again later"),
    *((n, f"answers {n}") for n in (400, 404, 407)),
])  # fmt: skip
def test_what_the_hub_answers_is_told(status, message, hub, load):
    hub.status = status
    assert message in load("gpt2")["error"]


@pytest.mark.parametrize("cut", ["short", "broken"])
def test_truncated_download_is_not_kept(cut, hub, load, tiny_model_folder, tmp_path):
    """Guards half a file that the next run takes for whole; then the next run mends it."""
    hub.repos[HUB["gpt2"][0]] = tiny_model_folder, HUB["gpt2"][1]
    hub.cut = cut
    assert re.search("can't be downloaded.*try again", load("gpt2")["error"])
    assert not list(tmp_path.rglob(f"snapshots/*/{SHORT}"))
    assert "is not in the local cache" in load("gpt2", HF_HUB_OFFLINE="1")["error"]
    hub.cut = None
    assert load("gpt2")["hash"] == weights_hash(tiny_model_folder)
