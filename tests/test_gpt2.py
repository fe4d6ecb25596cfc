"""gpt2.py against transformers; damaged folders refused."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_model, refuses, write_tiny_tokenizer
from safetensors.torch import load_file, save_file

from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io.hub import find_model, is_local, model_label, read_sert
from sert_min.models import TRANSPOSED, load_model, save_model

CONFIGS = {
    "one layer": {"n_layer": 1, "n_embd": 48, "n_head": 3, "vocab_size": 97, "n_positions": 40},
    "six layers, epsilon": {"n_layer": 6, "n_head": 8, "layer_norm_epsilon": 1e-2},
    "square mlp": {"n_inner": 64, "n_head": 1},  # all four products square but c_attn
    "n_inner, relu": {"n_inner": 40, "n_layer": 3, "activation_function": "relu"},
    "exact gelu": {"activation_function": "gelu", "vocab_size": 1000, "n_positions": 17},
    "silu": {"activation_function": "silu", "n_layer": 4, "n_head": 16},
    "tanh gelu of torch": {"activation_function": "gelu_pytorch_tanh"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 5},
    "untied": {"tie_word_embeddings": False, "n_head": 2},
}
STYLES = ("prefix", "bare", "sharded")  # the forms that are met on the hub


def make_loud(model, std: float):
    """Every parameter random: zero biases would hide mistakes, and so would nearly even attention."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(1.0 if p.dim() == 1 and float(p.data[0]) == 1 else 0.0, std)
    return model.eval()


def hf_model(**config):
    """A transformers GPT-2."""
    small = {"vocab_size": 131, "n_positions": 33, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return make_loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(**small | config)), 0.1)


def write_hf(model, folder, style: str) -> None:
    """transformers' own folder, in one of the STYLES."""
    model.save_pretrained(folder, max_shard_size="60KB" if style == "sharded" else "1GB")
    if style == "sharded":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    if style == "bare":  # as openai-community/gpt2: no prefix, the causal masks stored
        file, c = folder / "model.safetensors", model.config
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        for layer in range(c.n_layer):
            mask = torch.ones(c.n_positions, c.n_positions).tril()[None, None]
            tensors[f"h.{layer}.attn.bias"] = mask
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors.setdefault("lm_head.weight", tensors["wte.weight"].clone())  # stored twice: fine
        save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def logit_difference(ours: GPT2, theirs) -> float:
    c = ours.config
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(c.vocab_size, (3, c.n_positions), generator=g)
    return float((ours.logits(ours(ids)) - theirs(ids).logits).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    """Guards the import: a forgotten transpose, scale, activation, epsilon, bias or shard."""
    theirs = hf_model(**CONFIGS[name])
    for style in STYLES:
        write_hf(theirs, tmp_path / style, style)
        assert logit_difference(load_model(tmp_path / style), theirs) < 1e-4, style


@pytest.mark.parametrize("name", ["one layer", "n_inner, relu", "scaled by layer", "untied"])
def test_our_folder_opens_in_transformers(name, tmp_path):
    """Guards the export, and `tokenizer_from` being the very folder that is replaced."""
    folder, n_vocab = tmp_path / "model", write_tiny_tokenizer(tmp_path)
    config = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64, **CONFIGS[name]}
    model = make_loud(GPT2(GPT2Config(**{**config, "vocab_size": n_vocab})), 0.1)
    save_model(model, folder, tmp_path, {})
    save_model(model, folder, folder, {"method": "sert"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert logit_difference(model, theirs) < 1e-5
    assert tokenizer.decode(tokenizer("Is the answer yes?")["input_ids"]) == "Is the answer yes?"
    assert read_sert(folder) == {"method": "sert"}
    again = load_model(folder)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert (folder / "model.safetensors").stat().st_mode & 0o044, "others can't read the weights"


@torch.no_grad()
def bf16_errors(config: GPT2Config, rows: int, length: int) -> list[tuple[float, float]]:
    """Median and largest difference of log-probs, bf16 against fp32, of ours and of transformers."""
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**vars(config))).eval()
    ours = GPT2(config).init_weights_(0).eval()
    common = torch.randn(config.n_embd, generator=torch.Generator().manual_seed(1))
    common /= common.norm()
    ours.wte.weight.data = 7 * ours.wte.weight.data + 2 * common  # 0.14, as real GPT-2's
    ours.ln_f.bias.data -= 50 * common  # logits near -100, as real GPT-2's
    state = {}
    for name, p in ours.state_dict().items():
        state[f"transformer.{name}"] = p.t() if name.endswith(TRANSPOSED) else p
    theirs.load_state_dict(state | {"lm_head.weight": ours.wte.weight})
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (rows, length), generator=g)
    exact = ours.logits(ours(ids)).log_softmax(-1)
    assert (theirs(ids).logits.log_softmax(-1) - exact).abs().max() < 1e-3
    logits = ours.cast_(torch.bfloat16).logits(ours(ids)), theirs.to(torch.bfloat16)(ids).logits
    errors = [(x.float().log_softmax(-1) - exact).abs() for x in logits]
    return [(x.median().item(), x.max().item()) for x in errors]


def test_bf16_network_is_no_worse_than_transformers():
    """Guards bf16 logits, which are 0.5 apart at -100: residual stream, LayerNorm and head are fp32."""
    ours, theirs = bf16_errors(GPT2Config(2000, 64, 256, 4, 4), rows=4, length=64)
    assert ours[0] < min(0.02, theirs[0]) and ours[1] < theirs[1]


@pytest.fixture
def folder(tmp_path):
    write_hf(hf_model(), tmp_path / "hf", "bare")
    return tmp_path / "hf"


@pytest.mark.parametrize("change, named", [
    ({"model_type": "bert"}, "bert"), ({"add_cross_attention": True}, "add_cross_attention"),
    ({"activation_function": "quick_gelu"}, "quick_gelu"), ({"n_head": 5}, "n_head"),
    ({"activation_function": ["relu"]}, "activation_function"), ({"n_layer": "2"}, "n_layer"),
    ({"n_layer": 2**23}, "n_layer"), ({"n_embd": 2**40}, "n_embd"),  # memory
    ({"n_positions": None}, "n_positions"), ({"n_head": None}, "n_head"), ({"n_inner": 99}, "mlp.c_fc"),
    ({"n_layer": 3}, "h.2."), ({"n_layer": 1}, "h.1."),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
])  # fmt: skip
def test_configs_are_refused_by_name(change, named, folder):
    """Guards against computing something else than the config asks for."""
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    refuses(named, load_model, folder)


@pytest.mark.parametrize("change, named", [
    ({"h.0.ln_1.weight": torch.full((64,), math.nan)}, "h.0.ln_1.weight holds NaN"),
    ({"h.1.mlp.c_fc.bias": None}, "h.1.mlp.c_fc.bias is missing"),
    ({"h.2.ln_1.bias": torch.ones(64)}, "h.2.ln_1.bias"),
    ({"wpe.weight": torch.ones(9, 64)}, "wpe.weight has shape"),
    ({"lm_head.weight": torch.ones(131, 64)}, "tie_word_embeddings"),
])  # fmt: skip
def test_tensors_are_checked(change, named, folder):
    """Guards NaN, missing, extra and misshapen tensors, and a head that is not the tied one."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    refuses(named, load_model, folder)


def test_damaged_folders_are_refused(folder):
    """Guards tracebacks, huge memory, or worse a model, from garbled files, an index, pickles."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    garbage = struct.pack("<Q", 50) + b"\xff" * 50 + whole[58:]
    long, empty = struct.pack("<Q", 2**60) + whole[8:], struct.pack("<Q", 2) + b"{}"
    for damaged in (b"", whole[:500], whole[:-1], whole + b"x", garbage, long, empty):
        file.write_bytes(damaged)
        refuses("again|missing", load_model, folder)
    file.rename(folder.parent / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    elsewhere = ("../x.safetensors", str(folder.parent / "x.safetensors"), "x.bin", ["x"], 3)
    for weight_map in (*({"wte.weight": name} for name in elsewhere), {}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refuses("no usable weight_map", load_model, folder)
    index.write_text(json.dumps({"weight_map": {"wte.weight": "model-00001.safetensors"}}))
    refuses("model-00001.safetensors is missing", load_model, folder)
    index.rename(folder / "pytorch_model.bin")
    refuses("pickle files are refused", load_model, folder)
    (folder / "config.json").write_text("[" * 100000)
    refuses("config.json", load_model, folder)
    (folder / "config.json").unlink()
    refuses("config.json does not exist", load_model, folder)
    for name in ("./nowhere", "/nowhere", "a/b/c", "~/model"):
        refuses("no such folder", find_model, name)


@pytest.mark.parametrize("at, prefix", [
    ("", "_orig_mod.transformer."), ("", "transformer._orig_mod."), ("", "module."),
    ("", "module._orig_mod.transformer."), ("", "_fsdp_wrapped_module.transformer."),
    ("h.0.", "h.0._orig_mod."),
])  # fmt: skip
def test_names_of_compiled_and_parallel_models(at, prefix, tmp_path):
    """Guards the loss of a training that transformers would have saved under these names."""
    folder = make_tiny_model(tmp_path / "m")
    wanted = load_model(folder).state_dict()
    tensors = load_file(folder / "model.safetensors").items()
    save_file({k.replace(at, prefix, 1): v for k, v in tensors}, folder / "model.safetensors")
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_older_files_have_no_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_type")
    right = (["GPT2LMHeadModel"], ["GPT2Model"], "GPT2DoubleHeadsModel")
    for told in (*right, ["BertModel"], [["x"]], [], None, 3, ["GPT2Other"]):
        config["architectures"] = told
        (folder / "config.json").write_text(json.dumps(config), "utf-8-sig")
        if told in right:
            assert not load_model(folder).training
        else:
            refuses("set model_type", load_model, folder)


@pytest.mark.parametrize("files, message", [
    (["adapter_config.json"], "is an adapter; merge it"),
    (["adapter_config.json", "adapter_model.safetensors", "config.json"], "is an adapter; merge it"),
    (["checkpoint-500/config.json"], "give --model run/checkpoint-500$"),
    (["checkpoint-1000/config.json", "checkpoint-900/config.json", "checkpoint-800/config.json",
      "config.json", "checkpoint-best/config.json"], "give --model run/checkpoint-1000$"),
    ([f"checkpoint-{n}/adapter_config.json" for n in (300, 900, 500)], "run/checkpoint-900$"),
])  # fmt: skip
def test_folders_that_hold_no_whole_model(files, message, empty_folder):
    for path in (Path("run", file) for file in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    refuses(message, find_model, "run")
    Path("run/model.safetensors").touch()  # a whole model lies beside them
    assert find_model("run") == Path("run")


def test_a_folder_hides_a_named_model_only_if_it_holds_one(empty_folder, capsys):
    """Guards also models of one folder name, and a local folder called gpt2, sharing outputs."""
    for name in ("gpt2", "openai-community/gpt2", "run"):
        Path(name).mkdir(parents=True)
        assert is_local(name) == (name == "run")
    make_tiny_model(Path("distilgpt2"))
    assert is_local("distilgpt2") and find_model("distilgpt2").is_dir()
    assert "the folder ./distilgpt2 here, not the hub's" in capsys.readouterr().out
    Path("gpt2").rmdir()
    folders = "a/gpt2", "b/gpt2", "gpt2"
    for seed, where in enumerate(folders):
        make_tiny_model(Path(where), seed)
    labels = {model_label(where, find_model(where)) for where in folders}
    assert len(labels) == 3 and all(label.startswith("gpt2-") for label in labels)


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_gpt2.py: of a network of gpt2's size
    ours, theirs = bf16_errors(GPT2Config(), rows=2, length=64)
    print(f"bf16 log-prob errors (median, largest): {ours}, of transformers {theirs}")
