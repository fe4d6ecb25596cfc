"""sert-min: Self-Enhanced Reasoning Training (SERT, arXiv 2502.12744) from scratch.

Data flows one way, from script to script, through JSONL files:

    questions -> sample.py -> paths.jsonl -> train.py -> checkpoint -> distill.py -> checkpoint
              -> evaluate.py -> predictions, table, figures

This folder is the method; io/ is disk, network and machine; report/ is what is made of results; micro/
is the embedded world that makes all of it run on a laptop. Imports go down only: scripts, then report/
and script.py, tasks.py, micro/, the method, io/, kernels/.

One letter set for shapes:
    B rows   T positions   C width   H heads   D head size   V vocabulary   L layers
    Q questions of a block (G: those with live rows)   K branches (first tokens; in kernels: candidates)
    J rows of a question   R rows of a block   n live rows   P prompt tokens
    N tokens of a training batch, M of them with a loss

From Python (api.py; `mine.jsonl` is a file as own.py describes it):

    import sert_min as sm
    model, tokenizer = sm.open_student("gpt2")
    questions = sm.read_questions("mine.jsonl")
    records = sm.sample_paths(model, tokenizer, questions)  # with verdicts; one a question is selected
    sm.fit(model, tokenizer, sm.pairs(records, questions), "out/student")  # in place, and saved there
    print(sm.greedy_answers(model, tokenizer, questions))
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.2.0"
__all__ = ["Question", "SampleSettings", "TrainSettings", "fit", "greedy_answers", "make_question",
           "open_student", "pairs", "read_questions", "sample_paths", "select"]  # fmt: skip

if not (Path(__file__).parent / "kernels").is_dir():
    # In a checkout the kernels lie beside this folder; installed, they lie in it (pyproject.toml).
    __path__.append(str(Path(__file__).resolve().parents[1]))


def __getattr__(name: str):
    """The names of __all__, imported when they are first used: PyTorch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module sert_min has no attribute {name!r}")
    return getattr(import_module("sert_min.api"), name)
