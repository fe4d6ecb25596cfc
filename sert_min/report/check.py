"""The loaded model without a task: compare it with the real gpt2, or let it continue a text."""

from dataclasses import replace
from pathlib import Path

import torch

from sert_min.generate import SampleSettings, sample_block
from sert_min.gpt2 import GPT2
from sert_min.io.errors import need, printable_lines
from sert_min.io.files import read_json
from sert_min.io.machine import resolve_machine
from sert_min.models import load_model
from sert_min.script import open_student
from sert_min.tokenizer import load_tokenizer

KNOWN = Path(__file__).with_name("gpt2_known_outputs.json")
LIMIT = 0.05  # of the difference of two log-probs


def check_known_outputs(model: GPT2, tokenizer) -> None:
    """Compare next-token log-probs of gpt2 124M with known ones of the real weights."""
    errors = []
    for row in read_json(KNOWN)["prompts"]:
        ids = tokenizer.encode(row["prompt"])
        need(ids == row["token_ids"], f"token ids differ at {row['prompt']!r}; is this gpt2's?")
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor([ids], device=model.wte.weight.device))[0, -1])
        logprobs = logits.log_softmax(-1).cpu()  # [V]
        errors.append((logprobs[row["ids"]] - torch.tensor(row["logprobs"])).abs().max().item())
        best = logprobs.topk(len(row["ids"])).indices.tolist()
        same = sum(a == b for a, b in zip(best, row["ids"]))
        shown = f"{row['prompt'][:50]:50}  {same}/{len(best)} of the top in place"
        print(f"{shown}, off by {errors[-1]:.4f}")
    worst = torch.tensor(errors).max()  # NaN if one is
    need(worst < LIMIT, f"log-probs are off by up to {worst:.3f} (limit {LIMIT}): these are not "
         "gpt2's 124M weights (use --model gpt2 --dtype fp32)")  # fmt: skip
    print(f"the weights are gpt2's: all log-probs within {LIMIT} of the known ones")


def print_prompt_samples(model: GPT2, tokenizer, text: str, settings: SampleSettings) -> None:
    """Print `settings.samples` plain samples that continue `text`."""
    settings = replace(settings, raw=True, branches=1)
    prompts = [tokenizer.encode_prompt(text)]
    for row in sample_block(model, tokenizer, prompts, ["the prompt"], settings):
        mean = sum(row.logprobs) / max(1, len(row.logprobs))
        said = printable_lines(tokenizer.decode(row.token_ids))
        print(f"--- sample {row.sample}: {len(row.token_ids)} tokens, mean log-prob {mean:.2f}")
        print(text + said)


def run(args, settings: SampleSettings) -> None:
    """sample.py's --prompt and --check."""
    student = open_student(args.model or ("gpt2" if args.check else None), args.task)
    tokenizer, model = load_tokenizer(student.folder), load_model(student.folder)
    dtype = "fp32" if args.check else args.dtype  # there the right weights are far inside the limit
    device, machine = resolve_machine(args.device, dtype, {}, model.n_params())
    model.cast_(torch.bfloat16 if machine["dtype"] == "bf16" else torch.float32).to(device)
    if args.check:
        return check_known_outputs(model, tokenizer)
    return print_prompt_samples(model, tokenizer, args.prompt, settings)
