"""Known values of one small fixed model: a change of the computation is noticed on any machine.

After a change that is meant to alter them, a failing test prints the new ones.
"""

import pytest
from conftest import MERGES, write_tiny_tokenizer

from sert_min.finetune import encode_example, epoch_order, make_optimizer, train_step
from sert_min.generate import SampleSettings, sample_block
from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.tokenizer import load_tokenizer

TEXTS = [(f"Question: Is {i} even?\nAnswer:", f" {i} is {2 * (i // 2)} + {i % 2}. So the answer is "
          f"{'no' if i % 2 else 'yes'}.") for i in range(9)]  # fmt: skip
LOSSES = [6.01182, 4.78236, 4.0013, 3.34201, 2.94419]
ROWS = [
    ([167, 167, 115, 80, 80, 80], [-3.38339, -3.1937, -4.24495, -3.50576, -3.6828, -3.71984]),
    ([167, 92, 141, 80, 140, 263], [-3.38339, -4.36012, -4.28233, -3.86851, -3.28033, -3.62255]),
    ([209, 30, 154, 98, 167, 167], [-3.98674, -4.34503, -4.37225, -3.69233, -4.16855, -3.50422]),
    ([209, 152, 175, 71, 71, 140], [-3.98674, -3.44308, -3.42136, -3.85095, -3.46002, -3.83932]),
    ([167, 167, 167, 21, 140, 263], [-3.24261, -2.98473, -2.79063, -4.3972, -3.5294, -3.66132]),
    ([167, 167, 167, 179, 126, 263], [-3.24261, -2.98473, -2.79063, -4.33528, -3.36285, -3.43392]),
    ([209, 31, 80, 80, 126, 126], [-3.95435, -4.26948, -3.32356, -2.19323, -3.21553, -3.28493]),
    ([209, 31, 175, 71, 126, 21], [-3.95435, -4.26948, -4.10017, -3.83424, -4.20967, -4.30803]),
]


def model_and_tokenizer(folder):
    """Weights eight times larger than at the start of a training, so that every part matters."""
    n = write_tiny_tokenizer(folder, MERGES)
    config = GPT2Config(vocab_size=n, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    model = GPT2(config).init_weights_(5)
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 8
    return model.eval(), load_tokenizer(folder)


def test_losses_of_five_steps(tmp_path):
    model, tokenizer = model_and_tokenizer(tmp_path)
    examples = [encode_example(tokenizer, *text) for text in TEXTS]
    optimizer, losses = make_optimizer(model, 3e-3), []
    for step in range(5):
        order = epoch_order(len(examples), 1, step // 3)
        chosen = [examples[i] for i in order[step % 3 * 3 : step % 3 * 3 + 3]]
        losses.append(train_step(model, optimizer, chosen, step + 1))
    print("LOSSES =", [round(x, 5) for x in losses])
    assert losses == pytest.approx(LOSSES, abs=1e-4, rel=0)


def test_ids_and_log_probs_of_a_block(tmp_path):
    model, tokenizer = model_and_tokenizer(tmp_path)
    prompts = [tokenizer.encode(prompt) for prompt, _ in TEXTS[:2]]
    s = SampleSettings(branches=2, samples=2, max_new_tokens=6, seed=3, rows=5)
    rows = sample_block(model, tokenizer, prompts, ["golden/0", "golden/1"], s)
    print("ROWS =", [(row.token_ids, row.logprobs) for row in rows])
    for row, (ids, logprobs) in zip(rows, ROWS, strict=True):
        assert row.token_ids == ids and row.logprobs == pytest.approx(logprobs, abs=1e-4, rel=0)
