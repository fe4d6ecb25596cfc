"""Shared by all tests: one thread, no network, a tiny model, and the real data where it is."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers would ask the hub about local folders

import json
import shutil
import socket
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io import asking
from sert_min.io.errors import SertError
from sert_min.io.vocabulary import END, byte_alphabet
from sert_min.kernels.fast import cpu
from sert_min.models import save_model
from sert_min.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"  # real data; not part of the repository
KEY = "sk-test-0123456789abcdefKEY"
NO_RULES = ["--patterns", "none", "--min-tokens", "1", "--min-perplexity", "0", "--max-rep2", "1"]
MERGES = ["h e", "e s", "Ġ t", "Ġt he", "Ġ y", "Ġy es", "Ġ n", "Ġn o", "a n", "an s", "w e", "we r"]

torch.set_num_threads(1)
sys.orig_argv[0] = "python"  # Commands that are printed begin with this word.
# No time limits, which a busy machine breaks. The same examples in every run, so that a commit is
# green or not; FUZZ=10 (times as many, test_fuzz.py) draws new ones.
how = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("x", **how, derandomize="FUZZ" not in os.environ)
hypothesis.settings.load_profile("x")


def shared(*parts: str) -> Path:
    """A file or folder of ../shared; the test is skipped where that does not exist."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here")
    return path


def pretend_bf16(monkeypatch, has: bool) -> None:
    """From now on this CPU has instructions for bf16, or not (skips where oneDNN would refuse)."""
    if has and not cpu.has_bf16():
        pytest.skip("this CPU has no instructions for bf16 (AVX-512 with bf16, or AMX)")
    monkeypatch.setattr(cpu, "has_bf16", lambda: has)


def refuses(message: str, call, *args, **more) -> str:
    """The error, one line, that `call(*args, **more)` ends with; it matches the regex `message`."""
    with pytest.raises(SertError, match=message) as error:
        call(*args, **more)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def read_from(table):
    """A test of each text of a table {question: {answer: texts}}: (question, text, answer)."""
    cases = [(q, t, a) for q, by in table.items() for a, texts in by.items() for t in texts]
    return pytest.mark.parametrize("question, text, answer", cases)


def start(script, *words) -> None:
    """Run one of the scripts with these words as its command line."""
    script.main(script.parse_args(list(map(str, words))))


def write_tiny_tokenizer(folder: Path, merges: list[str] = MERGES) -> int:
    """vocab.json and merges.txt: 256 bytes, a few merges, <|endoftext|>; returns how many ids."""
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), END]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return len(tokens)


def make_tiny_model(folder: Path, seed: int = 0, **config) -> Path:
    """A small random GPT-2 in our own format; `config` overrides fields of GPT2Config."""
    source = folder.with_name(folder.name + "-tokenizer")
    source.mkdir(parents=True)
    n_vocab = write_tiny_tokenizer(source)
    small = {"vocab_size": n_vocab, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": n_vocab - 1, "eos_token_id": n_vocab - 1}
    model = GPT2(GPT2Config(**{**small, **ends, **config})).init_weights_(seed)
    save_model(model, folder, source, {"method": "random", "seed": seed})
    return folder


def make_checkpoint(model: Path, folder: Path, **about) -> Path:
    """A copy of a model folder that says so much about itself, as a student's does."""
    shutil.copytree(model, folder)
    (folder / "sert.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder) -> Tokenizer:
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny model whose context holds the long prompts as well."""
    return make_tiny_model(tmp_path_factory.mktemp("long") / "model", n_positions=1024)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> None:
    """The test works in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def keyed(monkeypatch) -> None:
    """A key for endpoints, nothing else of them in the environment, and short pauses."""
    monkeypatch.setattr(asking, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails with its address."""
    for name in ("connect", "connect_ex"):
        real = getattr(socket.socket, name)

        def guarded(self, address, real=real):
            host = address[0] if isinstance(address, tuple) else "localhost"  # else: a unix socket
            if host not in ("localhost", "::1") and not str(host).startswith("127."):
                raise AssertionError(f"a test reached for the network: {address}")
            return real(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
