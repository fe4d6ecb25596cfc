"""One step of sampling: the next token under temperature, top-k and top-p, and its exact log-prob.

    from kernels import sample_and_score
    tokens, logprobs = sample_and_score(logits, temperature=0.8, top_k=10, top_p=0.95, seed=1)
"""

from kernels.reference import sample_and_score

__all__ = ["sample_and_score"]
