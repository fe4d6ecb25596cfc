"""Every command that README shows is understood by its script, and every file it names is there."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
BLOCKS = [text for language, text in FENCED if language == "bash"]
OUTSIDE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
SPANS = re.findall(r"`([^`\n]+)`", OUTSIDE)
RUNS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\S*python3?|bash|torchrun|pytest) ")
# files that commands write, or that stand for the reader's own
WRITTEN = {
    "paths.jsonl", "selected.jsonl", "paths.html", "sert.json", "rationales.jsonl", "metrics.json",
    "predictions.jsonl", "responses.jsonl", "FILE.json", "FILE.jsonl",
}  # fmt: skip


def commands() -> list[str]:
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").split("\n")]
    found = [*lines, *(span for span in SPANS if RUNS.match(span))]
    parts = (part.strip() for line in found for part in line.split(" && "))
    return list(dict.fromkeys(part for part in parts if part and not part.startswith("#")))


class Understood(Exception):
    pass


def parse_only(monkeypatch, words: list[str], run) -> None:
    """Start a script as __main__ and let it go as far as its flags."""
    real = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        real(self, words, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", ["script", *words])
    monkeypatch.syspath_prepend(ROOT / "tests")
    with pytest.raises(Understood):
        run()


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [w for w in shlex.split(command, comments=True) if w != ".."]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program = words.pop(0).rpartition("/")[2]
    if program == "torchrun":
        while not words[0].endswith(".py"):
            words.pop(0)
    if program == "bash":
        assert subprocess.run(["bash", "-n", words[0]]).returncode == 0
    elif program == "pip" or words[:2] in (["-m", "venv"], ["-m", "pip"]):
        named = [b for a, b in zip(words, words[1:]) if a == "-r"]
        assert named or "venv" in words
        assert all((ROOT / name).is_file() for name in named)
    elif program == "pytest" or words[:2] == ["-m", "pytest"]:
        assert all((ROOT / w).is_file() for w in words if w.endswith(".py"))
    elif words[0] == "-m":
        run = lambda: runpy.run_module(words[1], run_name="__main__")  # noqa: E731
        parse_only(monkeypatch, words[2:], run)
    elif words == ["tests/test_gpt2.py"]:  # has no flags
        compile((ROOT / words[0]).read_text(), words[0], "exec")
    else:
        assert program in ("python", "python3", "torchrun"), f"what is {program}?"
        run = lambda: runpy.run_path(words[0], run_name="__main__")  # noqa: E731
        parse_only(monkeypatch, words[1:], run)


def test_the_commands_are_found():
    """Guards the search itself: with nothing found nothing would be checked."""
    found = "\n".join(commands())
    for script in ("sample.py", "train.py", "distill.py", "evaluate.py", "runs/micro.sh", "pytest"):
        assert script in found
    assert len(commands()) > 20


def test_every_file_that_is_named_exists():
    known = {p.name for p in ROOT.rglob("*") if ".git" not in p.parts}
    names = set(re.findall(r"(?<![\w./*-])\w[\w.-]*(?:/[\w.-]+)*\.(?:py|md|jsonl?|sh|txt|png|html|toml)\b",
                           README))  # fmt: skip
    assert len(names) > 40
    missing = [
        name
        for name in sorted(names - WRITTEN)
        if not ((ROOT / name).exists() or ("/" not in name and name in known))
    ]
    assert not missing


def test_the_file_tree_names_every_module():
    """Guards a module that is added and nowhere explained."""
    tree = next(text for _, text in FENCED if "sert_min/tasks.py" in text)
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "sert_min").glob("*.py"),
        *(ROOT / "kernels").glob("*.py"),
    ]
    assert [f.name for f in files if f.name not in tree and f.name != "__init__.py"] == []
