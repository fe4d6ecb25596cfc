"""finetune.py: the tensors that enter the loss, the loss against transformers, one step, the state."""

import resource

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import refuses
from safetensors.torch import save

from sert_min import finetune
from sert_min.finetune import IGNORE, TrainSettings, loss_sum, n_supervised, pack, train_step
from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io.errors import SertError
from sert_min.io.state import load_state
from sert_min.models import TRANSPOSED
from sert_min.tokenizer import load_tokenizer

SMALL = {"vocab_size": 61, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIGS = {
    "small": {},
    "one layer, one head": {"n_layer": 1, "n_head": 1},
    "deep, relu, n_inner": {"n_layer": 5, "activation_function": "relu", "n_inner": 24},
    "exact gelu, epsilon": {"activation_function": "gelu", "layer_norm_epsilon": 1e-2},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
}


def random_model(seed=0, **config) -> GPT2:
    """Every parameter random: zero biases and unit LayerNorms would hide mistakes."""
    model = GPT2(GPT2Config(**{**SMALL, **config}))
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(0.0, 0.2, generator=g)
    return model


def random_examples(lengths=((9, 4), (3, 1), (20, 15), (5, 5)), seed=0) -> list:
    """(tokens, supervised tokens) -> examples with random ids; unequal, so that padding exists."""
    g = torch.Generator().manual_seed(seed)
    examples = []
    for n, supervised in lengths:
        ids = torch.randint(0, SMALL["vocab_size"], (n + 1,), generator=g).tolist()
        examples.append((ids[:-1], [IGNORE] * (n - supervised) + ids[1:][n - supervised :]))
    return examples


def assert_close(a: torch.Tensor, b: torch.Tensor, relative: float) -> None:
    """Largest difference, as a share of the largest value."""
    assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_exactly_one_end_is_supervised(tiny_model_folder, loss_on):
    """Guards the shift, masking by token id (the student would never stop), and ends in text."""
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.encode_prompt = lambda text: [7, *tokenizer.encode(text)]  # as a Llama's
    prompt, completion = "Question: what is <|endoftext|>\nAnswer:", " the <|endoftext|> mark. yes"
    ids, targets = finetune.encode_example(tokenizer, prompt, completion, loss_on)
    p, c = tokenizer.encode_prompt(prompt), tokenizer.encode(completion)
    assert ids == p + c  # apart: no merge over the seam, no special token inside
    assert tokenizer.eot not in ids
    assert targets.count(tokenizer.eot) == 1 and targets[-1] == tokenizer.eot
    assert targets[len(p) - 1 :] == c + [tokenizer.eot]
    assert targets[: len(p) - 1] == (p[1:] if loss_on == "all" else [IGNORE] * (len(p) - 1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loss_and_gradients_equal_transformers(config):
    """Guards scale, shift, mask, tying, examples that see each other, and a sparse gradient."""
    model, examples = random_model(**config), random_examples()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**vars(model.config))).eval()

    def ours_of(name: str, t: torch.Tensor) -> torch.Tensor:
        return t.t() if name.endswith(TRANSPOSED) else t

    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            ours_of(name, p).copy_(mine[name.removeprefix("transformer.")])
    T = max(len(ids) for ids, _ in examples)
    # their labels are not shifted: put our target of position t at t + 1
    labels = torch.tensor([[IGNORE] + t + [IGNORE] * (T - len(t)) for _, t in examples])
    ids = torch.tensor([i + [0] * (T + 1 - len(i)) for i, _ in examples])
    mask = torch.tensor([[1] * len(i) + [0] * (T + 1 - len(i)) for i, _ in examples])
    mask[[len(i) == T for i, _ in examples], T] = 1  # a full row still needs its last label
    their_loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    their_loss.backward()
    model.wte.sparse = finetune.sparse_embedding(model)
    loss = loss_sum(model, pack(examples)) / n_supervised(examples)
    loss.backward()
    assert abs(loss.item() / their_loss.item() - 1) < 1e-5
    for name, p in theirs.named_parameters():
        assert_close(mine[name.removeprefix("transformer.")].grad, ours_of(name, p.grad), 1e-5)


def test_head_loss_equals_cross_entropy():
    """Guards the head's own gradient, and a loss of infinity where a target's share rounds to 0."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=g), torch.randn(50, 8, generator=g)
    hidden[0] *= 100  # logits hundreds of nats apart
    targets = torch.randint(0, 50, (7,), generator=g)
    targets[0] = (hidden[0] @ weight.T).argmin()
    plain, found = lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="none"), []
    for losses in (plain, finetune.HeadLoss.apply):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = losses(h, w, targets).sum()
        (loss / 3).backward()
        found.append((loss.detach(), h.grad, w.grad))
    assert found[0][0] > 500
    for a, b in zip(*found):
        assert_close(b, a, 1e-6)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_padding_to_few_sizes_changes_nothing(all_tokens):
    examples, found = random_examples(), []
    if all_tokens:  # then the token that padded losses point to has a target
        examples = [(ids, ids[1:] + [7]) for ids, _ in examples]
    for few_sizes in (False, True):
        model, batch = random_model(), pack(examples, few_sizes=few_sizes)
        loss = loss_sum(model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert batch.grid == (4, 32) and len(batch.supervised) == 64
    for a, b in zip(*found):
        assert_close(b, a, 1e-5)


def test_mean_loss_and_order():
    """Guards a mean of means, and an order without seed or epoch, or of this version alone."""
    model, examples = random_model(), random_examples(((9, 4), (3, 1)) * 40)
    want = sum(loss_sum(model, pack([e])).item() for e in examples) / n_supervised(examples)
    assert abs(finetune.mean_loss(model, examples) / want - 1) < 1e-5
    order = finetune.epoch_order
    assert len({tuple(order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(8, 3, 2) == [2, 3, 5, 7, 4, 0, 6, 1]


def test_bf16_keeps_loss_and_gradients_in_fp32():
    """Guards logits rounded to bf16 (GPT-2's lie near -100, where bf16 steps are 0.5)."""
    model, batch = random_model(), pack(random_examples())
    model.ln_f.bias.data += 30.0  # large logits: a rounded head would be off by whole nats
    full, half = loss_sum(model, batch).item(), loss_sum(model, batch, True)
    assert half.dtype == torch.float32 and abs(half.item() / full - 1) < 5e-3
    half.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_accumulated_equals_whole_batch_also_clipped(monkeypatch):
    """Guards a mean or norm per part, and a sparse gradient. SGD: Adam makes steps of rounding."""
    monkeypatch.setattr(finetune, "CLIP", 1e9)
    examples, moved = random_examples(((9, 4), (3, 1), (20, 15), (5, 5)) * 2), []
    for accumulate in (1, 3, 8):
        model = random_model()
        model.wte.sparse = accumulate > 1
        train_step(model, torch.optim.SGD(model.parameters(), 1.0), examples, 0, accumulate)
        moved.append([a - b for a, b in zip(model.parameters(), random_model().parameters())])
    for whole, *in_parts in zip(*moved):
        for part in in_parts:
            assert_close(part, whole, 1e-5)
    monkeypatch.setattr(finetune, "CLIP", 0.01)
    model, start = random_model(), random_model()
    train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), random_examples(), 0, 2)
    moved = sum((a - b).square().sum() for a, b in zip(model.parameters(), start.parameters()))
    assert abs(moved.sqrt().item() / 0.01 - 1) < 1e-3  # by exactly CLIP


def test_optimizer_is_adam():
    """Guards weight decay, other betas or epsilon: 20 steps with given gradients."""
    ours, theirs = random_model(), random_model()
    adam = torch.optim.Adam(theirs.parameters(), 3e-4)
    for model, optimizer in ((ours, finetune.make_optimizer(ours, 3e-4)), (theirs, adam)):
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert (a - b).abs().max() < 1e-6  # 20 steps of 3e-4 move up to 6e-3


def test_non_finite_stops_before_the_update(tmp_path):
    """Guards a NaN that has ruined the weights when it is seen, and an error without its place."""
    model = random_model()
    model.h[1].mlp.c_fc.bias.data[3] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    told = "epoch 1, questions (a, b|b, a): step 1: loss nan"
    refuses(told, run_fit, model, tmp_path, examples=random_examples()[:2], names=["a", "b"])
    for name, v in model.state_dict().items():
        assert torch.equal(v, before[name]) or name == "h.1.mlp.c_fc.bias"


@pytest.mark.parametrize("flag, value", [
    ("epochs", 0), ("max_steps", 0), ("lr", 0.0), ("lr", float("nan")), ("seed", -1),
])  # fmt: skip
def test_settings_without_meaning_are_refused_by_flag(flag, value):
    refuses(f"--{flag.replace('_', '-')} must be", TrainSettings(**{flag: value}).check)


def run_fit(model, out, epochs=2, examples=None, names="abcde", max_steps=None) -> dict:
    """The weights after a training of five examples, three steps an epoch."""
    out.mkdir(exist_ok=True)
    examples = examples or random_examples(((9, 4), (3, 1), (20, 15), (5, 5), (7, 2)))
    s = TrainSettings(epochs=epochs, batch_size=2, max_steps=max_steps)
    finetune.fit(model, examples, list(names), out, s)
    return model.state_dict()


@pytest.mark.parametrize("n", [2, 3])
def test_a_resumed_run_takes_the_same_steps(tmp_path, n):
    """Guards fresh moments, another order or weights. A killed run's log may hold later steps."""
    want = run_fit(random_model(), tmp_path / "whole")
    out = tmp_path / "run"
    run_fit(random_model(), out, max_steps=n)
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step":4,"epoch":2,"loss":1.0}\n{"step":8,"ep')
    got = run_fit(random_model(seed=9), out)
    assert all(torch.equal(got[k], want[k]) for k in want)
    a, b = ((folder / "metrics.jsonl").read_bytes() for folder in (tmp_path / "whole", out))
    assert a == b and (out / "metrics.jsonl.torn").read_bytes() == b'{"step":8,"ep\n'


def test_states_that_do_not_fit_are_named(tmp_path):
    """Guards a silent start from step 0: of another model, damaged, without a step."""
    run_fit(random_model(), tmp_path)
    for other in ({"n_layer": 3}, {"n_embd": 64}, {"tie_word_embeddings": False}):
        refuses("belongs to another model", run_fit, random_model(**other), tmp_path)
    file = tmp_path / "state" / "state.safetensors"
    for content in (file.read_bytes()[:-4], save({"model.x": torch.ones(1)})):
        file.write_bytes(content)
        told = "state.safetensors is damaged .*remove .* to start again"
        refuses(told, run_fit, random_model(), tmp_path)


def test_kills_and_a_full_disk_keep_the_state_before(tmp_path):
    """Guards the moment between two renames, and half a state under the final name."""
    run_fit(random_model(), tmp_path)
    (tmp_path / "state").rename(tmp_path / ".state.old")
    (tmp_path / ".state.tmp").mkdir()
    optimizer = finetune.make_optimizer(model := random_model(seed=9), 1e-3)
    assert load_state(model, optimizer, tmp_path / "state") == 6
    assert len(optimizer.state) == len(list(model.parameters()))
    before = (tmp_path / "state" / "state.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the state has more bytes
    try:
        with pytest.raises((SertError, OSError), match="(?i)file too large"):
            run_fit(random_model(), tmp_path, epochs=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "state" / "state.safetensors").read_bytes() == before
