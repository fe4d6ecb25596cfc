"""sert-min: Self-Enhanced Reasoning Training (SERT, arXiv 2502.12744) from scratch.

Data flows one way, from script to script, through JSONL files:

    questions -> sample.py -> paths.jsonl -> train.py -> checkpoint -> distill.py -> checkpoint
              -> evaluate.py -> predictions, table, figures

Read in the order of the data: tasks.py, prompts.py (what is asked), gpt2.py, tokenizer.py (the
student), generate.py, decode.py, filters.py (stage 1: sample and select), finetune.py (stage 2: learn),
rationales.py, teacher.py (stage 3: distil), evaluate.py, judge.py, table.py, plots.py (what came of
it), micro.py (the embedded world that makes all of it run on a laptop).

One letter set for shapes:
    B rows   T positions   C width   H heads   D head size   V vocabulary   L layers
    Q questions of a block (G: those with live rows)   K branches (first tokens; in kernels: candidates)
    J rows of a question   R rows of a block   n live rows   P prompt tokens   N, M tokens of a batch,
    those with a loss
"""
