"""docs/example.md says what the program does today: written again, it is the same page.

Guards against a page that went stale. Texts, ids and verdicts have to be equal, numbers close. On
a CPU other than the one named at the page's end a draw may flip, so a few lines may differ there.
"""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

NUMBER = re.compile(r"-?\d+\.\d+")
FEW = 3  # lines of about 250: a flipped draw changes one or two, a changed rule more


def same(a: str, b: str) -> bool:
    """Do two lines say the same?"""
    numbers = (map(float, NUMBER.findall(text)) for text in (a, b))
    close = all(abs(x - y) <= 0.01 + 0.02 * abs(x) for x, y in zip(*numbers))
    return close and NUMBER.sub("#", a) == NUMBER.sub("#", b)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[str, str]:
    """(the committed page, the page written now)"""
    path = tmp_path_factory.mktemp("example") / "example.md"
    subprocess.run([sys.executable, ROOT / "docs" / "example.py", path], check=True, cwd=ROOT)
    return tuple(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "example.md", path))


def test_the_page_is_what_the_program_says(pages):
    old, new = (page.splitlines() for page in pages)
    found = [b for a, b in zip(old, new) if not same(a, b)] if len(old) == len(new) else new
    told = "run `python docs/example.py`:\n" + "\n".join(found[:20])
    assert len(found) <= (0 if old[-1] == new[-1] else FEW), told
    for a, b in (("| selected |", "| kept |"), ("-2.959", "-2.859"), ("| 921 |", "| 922 |")):
        assert not same(a, b) and same("-2.959", "-2.957")  # the comparison sees a change


def test_the_functions_that_the_page_names_exist(pages):
    """Guards a page that leads its reader to functions which have moved."""
    named = set(re.findall(r"`((?:[A-Za-z_0-9]+\.)+[A-Za-z_0-9]+)`", pages[0]))
    named = {n for n in named if n.rpartition(".")[2] not in ("jsonl", "json", "md", "py")}
    assert len(named) > 15
    for name in named:
        module, *attributes = name.split(".")
        places = (p + module for p in ("", "sert_min.", "sert_min.micro."))
        found = importlib.import_module(next(p for p in places if importlib.util.find_spec(p)))
        for attribute in attributes:
            found = getattr(found, attribute)
