"""sample.py as a user runs it: records, resume, refusal, several processes, bad input."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny_model, shared

import sample
from sert_min.gpt2 import GPT2, GPT2Config
from sert_min.io.errors import SertError
from sert_min.io.files import read_jsonl

FIELDS = [
    "task",
    "id",
    "question",
    "answer",
    "branch",
    "sample",
    "text",
    "token_ids",
    "logprobs",
    "path_start",
    "path_end",
    "finish",
    "perplexity",
    "rep2",
    "verdict",
]
# a random model's babble passes these rules now and then
LOOSE = ["--patterns", "none", "--min-tokens", "2", "--min-perplexity", "0", "--max-rep2", "0.9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sample") / "model", n_positions=512)


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    base = ["--model", str(model), "--out-dir", str(out), "--max-new-tokens", "6", "--limit", "6"]
    return [*base, "--block-questions", "2", "--device", "cpu", *LOOSE, *more]


def run(model: Path, out: Path, *more: str) -> list[dict]:
    sample.main(sample.parse_args(arguments(model, out, *more)))
    return list(read_jsonl(out / "paths.jsonl"))


def in_process(model: Path, out: Path, *more: str, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *arguments(model, out, *more)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_records_and_selection(model, tmp_path):
    """Guards the record format that train.py, evaluate.py and other people's tools read."""
    records = run(model, tmp_path)
    assert len(records) == 6 * 25
    assert [list(r) for r in records] == [FIELDS] * 150
    for r in records:
        assert len(r["token_ids"]) == len(r["logprobs"]) <= 6
        assert 0 <= r["path_start"] <= r["path_end"] <= len(r["token_ids"])
        assert all(lp == round(lp, 5) <= 0 for lp in r["logprobs"])
    order = [(r["id"], r["branch"], r["sample"]) for r in records]
    first = list(dict.fromkeys(r["id"] for r in records))
    assert order == [(i, b, s) for i in first for b in range(5) for s in range(5)]
    selected = list(read_jsonl(tmp_path / "selected.jsonl"))
    assert selected == [r for r in records if r["verdict"] == "selected"]
    assert 0 < len(selected) == len({r["id"] for r in selected})
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["top_p"] == 0.95 and settings["dtype"] == "fp32" and settings["weights"]


def test_rerun_changes_nothing_and_a_raised_limit_keeps_whole_blocks(model, tmp_path):
    """Guards against sampling twice, and against a short last block surviving a larger --limit:
    the result must be that of the larger run from the start."""
    run(model, tmp_path / "a", "--limit", "3")
    before = (tmp_path / "a/paths.jsonl").read_bytes()
    run(model, tmp_path / "a", "--limit", "3")
    assert (tmp_path / "a/paths.jsonl").read_bytes() == before
    run(model, tmp_path / "a", "--limit", "5")
    run(model, tmp_path / "b", "--limit", "5")
    assert (tmp_path / "a/paths.jsonl").read_bytes() == (tmp_path / "b/paths.jsonl").read_bytes()
    run(model, tmp_path / "a", "--limit", "2")  # a smaller one takes nothing away
    assert (tmp_path / "a/paths.jsonl").read_bytes() == (tmp_path / "b/paths.jsonl").read_bytes()


def test_a_torn_file_is_mended(model, tmp_path):
    """Guards against a half-written block: bytes cut anywhere must come back the same."""
    run(model, tmp_path)
    whole = (tmp_path / "paths.jsonl").read_bytes()
    rng = random.Random(0)
    for _ in range(4):
        (tmp_path / "paths.jsonl").write_bytes(whole[: rng.randrange(len(whole))])
        run(model, tmp_path)
        assert (tmp_path / "paths.jsonl").read_bytes() == whole


def test_two_processes_merge_to_the_same_bytes(model, tmp_path):
    """Guards a promise: which process computes a block must not show in its bytes."""
    run(model, tmp_path / "one")
    both = [in_process(model, tmp_path / "two", RANK=str(r), WORLD_SIZE="2") for r in (1, 0)]
    for p in both:
        text, _ = p.communicate(timeout=120)
        assert p.returncode == 0, text
    for name in ("paths.jsonl", "selected.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not list((tmp_path / "two/blocks").iterdir())


def test_other_settings_are_refused_with_both_values(model, tmp_path):
    """Guards against mixing samples of two temperatures in one file (lm-eval and inspect_ai had
    caches that did)."""
    run(model, tmp_path)
    before = (tmp_path / "paths.jsonl").read_bytes()
    for flag, old, new in (("--temperature", "1.0", "0.5"), ("--top-k", "10", "3")):
        with pytest.raises(SertError, match=rf"{old} there, {new} now.*--out-dir"):
            run(model, tmp_path, flag, new)
    with pytest.raises(SertError, match="min_tokens: 2 there, 3 now.*--refilter"):
        run(model, tmp_path, "--min-tokens", "3")
    assert (tmp_path / "paths.jsonl").read_bytes() == before


def test_refilter_judges_stored_samples_anew(model, tmp_path):
    """Guards --refilter: new verdicts equal those of a run with these rules from the start, the
    samples stay, and going back gives the first bytes."""
    first = run(model, tmp_path / "a")
    bytes_before = (tmp_path / "a/paths.jsonl").read_bytes()
    again = run(model, tmp_path / "a", "--max-rep2", "0.1", "--refilter")
    assert [r["token_ids"] for r in again] == [r["token_ids"] for r in first]
    assert again == run(model, tmp_path / "b", "--max-rep2", "0.1")
    assert again != first
    assert (tmp_path / "a/selected.jsonl").read_bytes() == (
        tmp_path / "b/selected.jsonl"
    ).read_bytes()
    run(model, tmp_path / "a", "--refilter")
    assert (tmp_path / "a/paths.jsonl").read_bytes() == bytes_before
    with pytest.raises(SertError, match="no samples"):
        run(model, tmp_path / "nothing", "--refilter")
    for flags in (["--temperature", "0.5"], ["--split", "test"]):  # would be ignored, or break
        with pytest.raises(SertError, match="--refilter changes rules only"):
            run(model, tmp_path / "a", *flags, "--refilter")
    assert (tmp_path / "a/paths.jsonl").read_bytes() == bytes_before


def test_refilter_on_another_machine(model, tmp_path):
    """Guards samples of a GPU that a laptop is to judge anew, and of an older PyTorch; what was drawn
    there goes on being refused here."""
    run(model, tmp_path)
    path = tmp_path / "settings.json"
    there = {**json.loads(path.read_text()), "device": "cuda", "torch": "1.0", "dtype": "bf16"}
    path.write_text(json.dumps(there))
    assert len(run(model, tmp_path, "--max-rep2", "0.1", "--refilter")) == 150
    kept = json.loads(path.read_text())
    assert kept == {**there, "max_rep2": 0.1}
    with pytest.raises(SertError, match="torch: 1.0 there"):
        run(model, tmp_path, "--max-rep2", "0.1", "--dtype", "fp32")


def test_refilter_keeps_a_short_last_block(model, tmp_path):
    """Guards stored samples: --limit may end inside a block, which is then no torn one."""
    assert len(run(model, tmp_path, "--limit", "5")) == 125
    assert len(run(model, tmp_path, "--refilter", "--max-rep2", "0.1")) == 125


def test_refilter_drops_blocks_that_wait_with_old_verdicts(model, tmp_path):
    """Guards against old verdicts: a finished block that a kill left unmerged was judged by the
    rules of its time."""
    run(model, tmp_path / "a", "--limit", "2")
    run(model, tmp_path / "b", "--limit", "4")
    lines = (tmp_path / "b/paths.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a/blocks/000001-2.jsonl").write_text("".join(lines[50:100]))
    run(model, tmp_path / "a", "--max-rep2", "0.1", "--refilter")
    found = run(model, tmp_path / "a", "--limit", "4", "--max-rep2", "0.1")
    assert found == run(model, tmp_path / "c", "--limit", "4", "--max-rep2", "0.1")


def test_damage_in_the_middle_is_set_aside(model, tmp_path, capsys):
    """Guards hours of work: a broken line with whole blocks behind it is reported and kept, and
    the run is completed."""
    run(model, tmp_path)
    whole = (tmp_path / "paths.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[60] = b"{broken\n"
    (tmp_path / "paths.jsonl").write_bytes(b"".join(lines))
    run(model, tmp_path)
    assert (tmp_path / "paths.jsonl").read_bytes() == whole
    assert "is damaged" in capsys.readouterr().out
    assert (tmp_path / "paths.jsonl.torn").read_bytes() == b"".join(lines[50:])


def test_an_unfinished_run_has_no_selection(model, tmp_path, monkeypatch):
    """Guards against training on a part: selected.jsonl of a smaller --limit goes away until the
    larger run is done."""
    run(model, tmp_path, "--limit", "2")
    monkeypatch.setattr(
        sample, "block_records", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, "--limit", "4")
    assert not (tmp_path / "selected.jsonl").exists()


def test_looser_patterns_on_an_early_rejected_run_are_refused(model, tmp_path):
    """Guards against judging rows that were stopped early by rules that would have let them on."""
    flags = ["--early-reject", "--patterns", "imitative,options"]
    run(model, tmp_path, *flags)
    with pytest.raises(SertError, match="--no-early-reject"):
        run(model, tmp_path, "--patterns", "options", "--refilter")
    # No row is stopped for a direct answer: that rule may come and go.
    run(model, tmp_path / "all", "--early-reject", "--patterns", "imitative,options,direct")
    again = run(model, tmp_path / "all", "--patterns", "imitative,options", "--refilter")
    assert again == run(model, tmp_path / "two", *flags)


def test_raw_sampling(model, tmp_path):
    """Guards the baseline of Fig. 1: 25 plain samples, branch -1, their own folder by default."""
    from sert_min import filters

    records = run(model, tmp_path, "--raw")
    empty = {**records[0], "token_ids": [], "logprobs": [], "path_end": 0}  # end-of-text at once
    q = sample.tasks.load("micro", "train")[0]
    judged = filters.judge_path(empty, [], q, filters.FilterSettings(min_tokens=0))
    assert judged["verdict"] == "length" and judged["perplexity"] is None
    (tmp_path / "paths.jsonl").write_text(sample.to_line({**empty, **judged}))
    sample.print_summary(sample.prepare(sample.parse_args(arguments(model, tmp_path, "--raw"))))
    assert {r["branch"] for r in records} == {-1}
    assert [r["sample"] for r in records[:25]] == list(range(25))
    assert all(r["path_start"] == 0 for r in records)


def test_a_trained_student_has_its_own_default_folder(model, tmp_path, monkeypatch):
    """Guards Raw SERT of Fig. 1: its default folder was that of the raw student, which refused it,
    and not the one that the figures read."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "out/micro/m/sert/seed0/last")
    about = {"method": "sert", "root": "m", "parents": ["m"]}
    Path("out/micro/m/sert/seed0/last/sert.json").write_text(json.dumps(about))
    for flags, place in (
        (["--raw"], "out/micro/m/sert/seed0/paths-raw-test"),
        (["--raw", "--out-dir", "else"], "else"),
    ):
        words = ["--model", "out/micro/m/sert/seed0", "--split", "test", *flags]
        assert sample.prepare(sample.parse_args(words)).out == Path(place)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--top-p", "nan"], "--top-p"),
        (["--temperature", "-1"], "--temperature must be from 0"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", "-1"], "--top-k"),
        (["--branches", "0"], "--branches must be at least 1"),
        (["--branches", "999"], "--branches 999 is more than the vocabulary"),
        (["--samples", "99999"], "--branches times --samples is 499995"),
        (["--top-k", "9" * 30], "--top-k must be from 0"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-new-tokens", "600"], "exceeds the context of 512; lower --max-new-tokens"),
        (["--seed", "-1"], "--seed"),
        (["--patterns", "rude"], "--patterns"),
        (["--max-rep2", "2"], "--max-rep2"),
        (["--device", "tpu"], "--device tpu is unknown"),
        (["--block-questions", "0"], "--block-questions must be at least 1"),
        (["--model", "./nowhere"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(model, tmp_path, flags, message):
    """Guards against tracebacks, and against half-made folders after a typo."""
    out = tmp_path / "out"
    with pytest.raises(SertError) as e:
        run(model, out, *flags)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (out / "paths.jsonl").exists()


def test_errors_reach_the_shell_in_one_line(model, tmp_path):
    """Guards exit status and stderr of the real script."""
    p = in_process(model, tmp_path / "out", "--top-p", "0")
    text, _ = p.communicate(timeout=60)
    assert p.returncode == 1 and text.startswith("error: --top-p") and text.count("\n") == 1


def test_dry_run_and_prompt(model, tmp_path, capsys):
    """Guards that --dry-run writes nothing and shows the very prompt, and that --prompt works on
    text with a literal end-of-text in it."""
    sample.main(sample.parse_args(arguments(model, tmp_path / "out", "--dry-run")))
    shown = capsys.readouterr().out
    assert "Question: " in shown and "\nAnswer:" in shown and "3 blocks" in shown
    assert not (tmp_path / "out").exists()
    flags = ["--prompt", "Say <|endoftext|> twice", "--samples", "3"]
    sample.main(sample.parse_args(arguments(model, tmp_path / "out", *flags)))
    shown = capsys.readouterr().out
    assert shown.count("--- sample") == 3 and shown.count("Say <|endoftext|> twice") == 3


def test_check_refuses_other_weights(model, monkeypatch):
    """Guards --check: it must fail on anything but gpt2's own weights and tokenizer."""
    with pytest.raises(SertError, match="is this gpt2's tokenizer"):
        sample.main(sample.parse_args(["--check", "--model", str(model), "--device", "cpu"]))


@pytest.mark.parametrize("task", ["commonsense_qa", "strategy_qa"])
def test_real_questions(model, tmp_path, task):
    """Guards the path from the real files through prompts to records."""
    folder = make_tiny_model(tmp_path / "wide", n_positions=1024)
    flags = ["--task", task, "--data-dir", str(shared("data")), "--limit", "2"]
    records = run(folder, tmp_path / "out", *flags)
    assert len(records) == 50 and records[0]["task"] == task
    assert records[0]["answer"] in ("A", "B", "C", "D", "E", "yes", "no")


def test_rows_follow_a_gpus_memory(monkeypatch):
    """Guards a batch that does not fit, one that ignores how large the model is, and a block that
    is over as soon as the first rows are."""
    model, s = GPT2(GPT2Config()), sample.SampleSettings()

    def room(gigabytes, model=model):
        free = int(gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        return sample.room(None, model, s)

    assert room(80) == (2000, 320)
    assert room(2)[0] == 25 and room(2)[1] == sample.BLOCK
    for gigabytes in (4, 8, 16):
        rows, questions = room(gigabytes)
        keys_and_values = rows * s.max_new_tokens * 2 * 12 * 768 * 4
        assert rows % 25 == 0 and keys_and_values < gigabytes * 1e9 / 2
        assert questions * 25 >= 4 * rows
    with torch.device("meta"):
        large = GPT2(GPT2Config(n_layer=48, n_embd=1600, n_head=25))
    assert room(40, large)[0] < room(40)[0] / 4
