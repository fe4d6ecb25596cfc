"""Every command that the README and most of docs/ show is understood by its script, and every file
that they name is there. (docs/exercises.md has the reader change scripts first.)"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

NAMES = ("README.md", *(f"docs/{name}.md" for name in ("usage", "results", "choices", "cost")))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
RUNS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\S*python3?|bash|torchrun|pytest) ")
# files that commands write, or that stand for the reader's own
WRITTEN = {
    "paths.jsonl", "selected.jsonl", "paths.html", "sert.json", "rationales.jsonl", "metrics.json",
    "predictions.jsonl", "responses.jsonl", "sent.jsonl", "settings.json", "FILE.json",
    "FILE.jsonl", "SCRIPT.py", "mine.jsonl"}  # fmt: skip


def commands(text: str) -> list[str]:
    """Lines of bash blocks, and `code` in sentences that begins like a command."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [*lines, *filter(RUNS.match, re.findall(r"`([^`\n]+)`", outside))]
    parts = (part.strip() for line in found for part in re.split(r" && | ; ", line))
    return list(dict.fromkeys(part for part in parts if part and not part.startswith("#")))


class Understood(Exception):
    pass


def start_as_main(monkeypatch, start, script: str, *words) -> None:
    """Start a script as __main__ and let it go as far as its flags."""

    def parse(self, args=None, namespace=None, real=argparse.ArgumentParser.parse_args):
        real(self, words, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", ["script", *words])
    monkeypatch.syspath_prepend(ROOT / "tests")
    with pytest.raises(Understood):
        start(script, run_name="__main__")


@pytest.mark.parametrize("command", sorted({c for text in PAGES.values() for c in commands(text)}))
def test_a_command_is_understood(command, monkeypatch):
    """Guards a flag that was renamed, and a file of tests or requirements that has moved."""
    monkeypatch.chdir(ROOT)
    words = [w for w in shlex.split(command, comments=True) if w != ".."]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program = words.pop(0).rpartition("/")[2]
    if program == "torchrun":
        words = words[next(i for i, w in enumerate(words) if w.endswith(".py")) :]
    if program == "bash":
        assert subprocess.run(["bash", "-n", words[0]]).returncode == 0
    elif program == "pip" or words[:2] in (["-m", "venv"], ["-m", "pip"]):
        named = [b for a, b in zip(words, words[1:]) if a == "-r"]
        assert named or "venv" in words
        assert all((ROOT / name).is_file() for name in named)
    elif program == "pytest" or words[:2] == ["-m", "pytest"]:
        assert all((ROOT / w).is_file() for w in words if w.endswith(".py"))
    elif words[0] in ("docs/example.py", "tests/test_gpt2.py"):  # have no flags
        assert (ROOT / words[0]).is_file()
    elif words[0] != "SCRIPT.py":
        assert program in ("python", "python3", "torchrun"), f"what is {program}?"
        start = runpy.run_path
        if words[0] == "-m":
            start, words = runpy.run_module, words[1:]
        start_as_main(monkeypatch, start, *words)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    """Guards names of files that have moved."""
    known = [f"/{p.relative_to(ROOT)}" for p in ROOT.rglob("*") if ".git" not in p.parts]
    name = r"(?<![\w./*-])\w[\w.-]*(?:/[\w.-]+)*\.(?:py|md|jsonl?|sh|txt|png|html|toml)\b"
    names = set(re.findall(name, PAGES[page])) - WRITTEN
    if page == "README.md":  # the searches find something
        assert len(names) > 20 and len(commands(PAGES[page])) > 10
    assert [n for n in sorted(names) if not any(k.endswith(f"/{n}") for k in known)] == []


def test_the_file_tree_names_every_module():
    """Guards a module that is added and nowhere explained."""
    files = [*ROOT.glob("*.py"), *(ROOT / "sert_min").glob("*.py")]
    tree = next(t for t in PAGES["README.md"].split("```") if t.startswith("\nsample.py"))
    assert [f.name for f in files if f.name not in tree and f.name != "__init__.py"] == []
