"""sert-min from Python: the lines of its docstring, from another folder, from the checkout and installed."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refuses

import sert_min
from sert_min.io.files import lock_folder

LINES = re.search(r"(?m)^    import sert_min.*(?:\n    .+)+", sert_min.__doc__)[0]


def run_lines(folder: Path, path: Path, code: str) -> str:
    """What `code` prints in a Python of its own that finds packages in `path`, started in `folder`."""
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(path)}, "text": True}
    return subprocess.check_output([sys.executable, "-c", code], **how)


def quick() -> str:
    """The docstring's lines with the embedded student and looser rules."""
    lines = re.sub(r"(?m)^    ", "", LINES).replace('"gpt2"', '"micro"')
    rules = "sm.SampleSettings(max_new_tokens=8), {'min_tokens': 1, 'min_perplexity': 0}"
    lines = lines.replace("er, questions)  # with", f"er, questions, {rules})  # with")
    return lines.replace('"out/student")', '"out/student", sm.TrainSettings(max_steps=1))')


def test_the_lines_of_the_docstring(tmp_path):
    """Guards the five lines, from another folder than the checkout."""
    said = run_lines(tmp_path, ROOT, quick())
    assert "'extracted'" in said and (tmp_path / "out/student/last/model.safetensors").exists()


def test_names_and_refusals(empty_folder):
    """Guards __all__, a folder whose state belongs to another training or model or is being written,
    and errors that would come late."""
    assert all(getattr(sert_min, name) for name in sert_min.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sert_min.nothing
    model, tokenizer = sert_min.open_student("micro")
    short = sert_min.TrainSettings(max_steps=1)
    sert_min.fit(model, tokenizer, [("Question: a", " b")], "s", short)
    other = copy.copy(tokenizer)
    other.folder = Path("s/last")
    for message, *given in (
        ("holds a run with other settings", tokenizer, [("Question: a", " c")], "s"),
        ("holds a run with other settings .*weights", other, [("Question: a", " b")], "s"),
        ("no path passed", tokenizer, [], "new"),
        ("the model's context is 256; leave", tokenizer, [("Question: a", " b" * 300)], "new"),
    ):
        refuses(message, sert_min.fit, model, *given, short)
    assert not Path("new").exists()
    with lock_folder("s"):
        last = [("Question: a", " b")], "s", short
        refuses("another process is writing", sert_min.fit, model, tokenizer, *last)
    told, bad = "rules are limits by name: patterns, min_tokens", {"min_perplexty": 3}
    refuses(told, sert_min.sample_paths, model, tokenizer, [], rules=bad)


@pytest.mark.slow
def test_installed_beside_the_other_kernels(tmp_path):
    """Guards the wheel: it needs no checkout, and lets Hugging Face's `kernels` be what it is."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "out", "tests", "build"))
    python = [sys.executable, "-m"]
    subprocess.run([*python, "build", "-o", tmp_path / "dist", source], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    install = [*python, "pip", "install", "-q", "--no-deps", "--target", site]
    subprocess.run([*install, wheel, "kernels"], check=True)
    assert "'extracted'" in run_lines(tmp_path, site, quick())
    for order in ("kernels, transformers, sert_min", "sert_min.kernels, transformers, kernels"):
        told = run_lines(tmp_path, site, f"import {order}\nfrom transformers import GPT2LMHeadModel\n"
                         "import sert_min.kernels as ours\nprint(kernels.__file__, ours.__file__)")  # fmt: skip
        assert told == f"{site}/kernels/__init__.py {site}/sert_min/kernels/__init__.py\n"
