"""Imports go down only: scripts > report, script > tasks > micro > the method > io > kernels."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

LAYERS = {"io": 1, "micro": 3, "tasks": 4, "script": 5, "report": 5, "api": 5, "teachers": 5}


def layer(name: str) -> int:
    top, part = f"{name}..".split(".")[:2]
    return 0 if top == "kernels" else LAYERS.get(part, 2) if top == "sert_min" else 6  # method: 2


def test_imports_go_down_only():
    """Guards a layer that knows the one above it, and circles. Only distill.py uses another script."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("sert_min/**/*.py")]
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    names, uses = {name.removesuffix(".__init__") for name in paths}, {}
    for name, path in paths.items():
        here, name, found = name.split("."), name.removesuffix(".__init__"), set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                at = (node.module or "").replace("sert_min.kernels", "kernels")
                at = ".".join([*here[: -node.level], at]).strip(".") if node.level else at
                full = {f"{at}.{a.name}" for a in node.names} & names
                found |= full or {at}
            elif isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
        uses[name] = found & names
        up = [n for n in uses[name] if layer(n) > layer(name) or layer(n) == layer(name) == 6]
        assert up == (["train"] if name == "distill" else []), f"{name} imports {up}"
    assert not uses["sert_min.questions"]
    TopologicalSorter(uses).prepare()  # its error names the circle
