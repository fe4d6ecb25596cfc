"""Lint and format, as configured in pyproject.toml; the worked examples in docstrings."""

import doctest
import importlib
import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(words):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed (it is in requirements-dev.txt)")
    command = [sys.executable, "-m", "ruff", *words, "--no-cache", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_worked_examples_of_the_docstrings():
    """Guards examples that have gone stale."""
    files = [p for folder in ("sert_min", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
    files = [p.relative_to(ROOT).with_suffix("") for p in files if ">>> " in p.read_text()]
    assert len(files) >= 3
    for file in files:
        found = doctest.testmod(importlib.import_module(".".join(file.parts)))
        assert found.attempted and not found.failed, file
