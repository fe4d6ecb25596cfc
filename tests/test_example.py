"""docs/example.md says what the program does today: written again, it is the same page. Texts, ids and
verdicts have to be equal, numbers close; on a CPU other than the one that the page names, a draw may
flip."""

import importlib.util
import operator
import re
import subprocess
import sys

from conftest import ROOT

PAGE = (ROOT / "docs/example.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")
FEW = 3  # lines of about 250: a flipped draw changes one or two, a changed rule more


def same(a: str, b: str) -> bool:
    """Do two lines say the same?"""
    numbers = (map(float, NUMBER.findall(text)) for text in (a, b))
    close = all(abs(x - y) <= 0.01 + 0.02 * abs(x) for x, y in zip(*numbers))
    return close and NUMBER.sub("#", a) == NUMBER.sub("#", b)


def test_the_page_is_what_the_program_says(tmp_path):
    """Guards a page that went stale."""
    command = [sys.executable, ROOT / "docs/example.py", tmp_path / "example.md"]
    subprocess.run(command, check=True, cwd=ROOT)
    old, new = PAGE.splitlines(), (tmp_path / "example.md").read_text(encoding="utf-8").splitlines()
    found = [b for a, b in zip(old, new) if not same(a, b)] if len(old) == len(new) else new
    told = "run `python docs/example.py`:\n" + "\n".join(found[:20])
    assert len(found) <= (0 if old[-1] == new[-1] else FEW), told
    for a, b in (("| selected |", "| kept |"), ("-2.959", "-2.859"), ("| 921 |", "| 922 |")):
        assert not same(a, b) and same("-2.959", "-2.957")  # the comparison sees a change


def test_the_functions_that_the_page_names_exist():
    """Guards a page that leads its reader to functions which have moved."""
    named = set(re.findall(r"`((?:[A-Za-z_0-9]+\.)+[A-Za-z_0-9]+)`", PAGE))
    named = {n for n in named if n.rpartition(".")[2] not in ("jsonl", "json", "md", "py")}
    assert len(named) > 15
    for name in named:
        module, _, attributes = name.partition(".")
        places = (p + module for p in ("", "sert_min.", "sert_min.micro."))
        found = importlib.import_module(next(p for p in places if importlib.util.find_spec(p)))
        operator.attrgetter(attributes)(found)
