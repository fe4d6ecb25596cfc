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
"""
