"""sample.py as a user runs it: records, resume, filtering anew, refusal, older folders, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ROOT, make_checkpoint, make_tiny_model, refuses, start

import sample
from sert_min import filters, script
from sert_min.io.files import read_json, read_jsonl
from sert_min.tokenizer import Tokenizer

FIELDS = ["task", "id", "question", "answer", "branch", "sample", "text", "token_ids", "logprobs",
          "path_start", "path_end", "finish", "perplexity", "rep2", "verdict"]  # fmt: skip
# A random model's babble passes these rules now and then.
LOOSE = ["--patterns", "none", "--min-tokens", "2", "--min-perplexity", "0", "--max-rep2", "0.9"]
STRICT = ["--max-rep2", "0.1", "--min-tokens", "3"]
MICRO = ["--model", "micro", "--max-new-tokens", "40", "--limit", "4", "--patterns"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sample") / "model", n_positions=512)


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    base = ["--model", str(model), "--out-dir", str(out), "--max-new-tokens", "6", "--limit", "6"]
    return [*base, "--block-questions", "2", "--device", "cpu", *LOOSE, *more]


def run(model: Path, out: Path, *more: str) -> list[dict]:
    start(sample, *arguments(model, out, *more))
    return list(read_jsonl(out / "paths.jsonl"))


def derived(out: Path) -> dict:
    return {name: (out / name).read_bytes() for name in sample.DERIVED}


@pytest.fixture
def sampled(monkeypatch) -> list:
    """The number of questions of each block that is sampled from here on."""
    made, real = [], sample.sample_paths
    monkeypatch.setattr(sample, "sample_paths", lambda *a: made.append(len(a[2])) or real(*a))
    return made


@pytest.mark.parametrize("raw", [False, True])
def test_records_and_selection(model, tmp_path, raw):
    """Guards the record format that other tools read, and Fig. 1's 25 plain samples, branch -1."""
    records = run(model, tmp_path, *["--raw"] * raw)
    assert [list(r) for r in records] == [FIELDS] * 6 * 25
    for r in records:
        assert len(r["token_ids"]) == len(r["logprobs"]) <= 6
        assert 0 <= r["path_start"] <= r["path_end"] <= len(r["token_ids"])
        assert all(lp == round(lp, 5) <= 0 for lp in r["logprobs"])
    order = [(-1, i) if raw else divmod(i, 5) for i in range(25)]
    assert [(r["branch"], r["sample"]) for r in records] == 6 * order
    selected = [r for r in records if r["verdict"] == "selected"]
    assert list(read_jsonl(tmp_path / "selected.jsonl")) == selected
    assert 0 < len(selected) == len({r["id"] for r in selected})
    assert read_json(tmp_path / "funnel.json")["counts"]["selected"] == len(selected)


def test_no_block_is_sampled_twice_and_limits_may_move(model, tmp_path, sampled):
    """Guards sampling twice, and a short last block under a larger --limit: as in a fresh run."""
    fresh = {}
    for n in ("3", "5"):
        run(model, tmp_path / n, "--limit", n)
        fresh[n] = derived(tmp_path / n)
    sampled.clear()
    for n, made in (("3", [2, 1]), ("3", []), ("5", [2, 1]), ("3", []), ("5", [])):
        run(model, tmp_path / "a", "--limit", n)
        assert derived(tmp_path / "a") == fresh[n] and sampled == made
        sampled.clear()


def test_other_thresholds_filter_the_stored_samples_anew(model, tmp_path, sampled):
    """Guards stale verdicts and sampling again: the bytes are a fresh run's, there and back."""
    run(model, tmp_path / "a")
    run(model, tmp_path / "b", *STRICT)
    first, strict = derived(tmp_path / "a"), derived(tmp_path / "b")
    assert first != strict
    sampled.clear()
    for flags, want in ((STRICT, strict), ([*STRICT, "--refilter"], strict), ([], first)):
        run(model, tmp_path / "a", *flags)
        assert derived(tmp_path / "a") == want and not sampled


def test_other_settings_are_refused_with_both_values(model, tmp_path):
    """Guards samples of two temperatures in one folder (caches of lm-eval mixed them)."""
    run(model, tmp_path)
    before = derived(tmp_path)
    for flag, old, new in (("--temperature", 1.0, "0.5"), ("--split", "train", "test")):
        told = f"{old} there, {new} now.*"
        refuses(f"{told}--out-dir", run, model, tmp_path, flag, new)
        refuses(f"{told}rules only", run, model, tmp_path, flag, new, "--refilter")
    assert derived(tmp_path) == before


@pytest.mark.parametrize("damage", ["torn line", "line lost", "another id", "another question"])
def test_a_damaged_block_is_made_again(model, tmp_path, sampled, damage):
    """Guards a block that is torn or of other questions: it alone is made again, same bytes."""
    run(model, tmp_path)
    before, block = derived(tmp_path), tmp_path / "blocks/000001-2.jsonl"
    whole = block.read_text()
    first, _, rest = whole.partition("\n")
    if damage == "torn line":
        block.write_text(whole[:-30])
    elif damage == "line lost":
        block.write_text(rest)
    else:
        block.write_text(sample.to_line(json.loads(first) | {damage.split()[1]: "another"}) + rest)
    sampled.clear()
    run(model, tmp_path)
    assert sampled == [2] and block.read_text() == whole and derived(tmp_path) == before


def test_an_unfinished_run_has_no_selection(model, tmp_path, monkeypatch):
    """Guards training on a part: what is derived goes away before a missing block is made."""
    run(model, tmp_path, "--limit", "2")
    monkeypatch.setattr(sample, "sample_paths", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, "--limit", "4")
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"paths.jsonl", "selected.jsonl", "funnel.json"}


def test_refilter_works_on_another_machine_and_on_a_part(model, tmp_path, sampled, capsys):
    """Guards filtering a GPU's or older samples on a laptop; missing blocks are left out, told."""
    a = tmp_path / "a"
    run(model, tmp_path / "b", *STRICT)
    run(model, a)
    there = {**read_json(a / "settings.json"), "device": "cuda", "torch": "1.0", "dtype": "bf16"}
    (a / "settings.json").write_text(json.dumps(there))
    sampled.clear()
    run(model, a, *STRICT, "--refilter")
    assert derived(a) == derived(tmp_path / "b") and read_json(a / "settings.json") == there
    (a / "blocks/000002-2.jsonl").unlink()
    assert len(run(model, a, "--refilter")) == 100 and not sampled
    assert "2 of 3 blocks are there" in capsys.readouterr().out
    before = derived(a)
    told = "of these questions; give the --limit"
    refuses(told, run, model, a, "--limit", "1", "--refilter")
    shutil.rmtree(a / "blocks")
    refuses("of these questions; run without --refilter", run, model, a, "--refilter")
    refuses("no samples; run without --refilter", run, model, tmp_path / "new", "--refilter")
    assert not (tmp_path / "new").exists()
    assert derived(a) == before  # what was there is not emptied


def test_early_rejection_is_a_setting_of_the_samples(tmp_path):
    """Guards against verdicts on rows that were stopped early by rules that are off now, against
    mixing both kinds of samples, and against a rejection that is not what the rules say."""
    full_out, out = tmp_path / "full", tmp_path / "early"
    full = run("micro", full_out, *MICRO, "imitative,options,direct")
    early = run("micro", out, *MICRO, "imitative,options", "--early-reject")
    told = "early rejection of imitative,options.*looser --patterns"
    refuses(told, run, "micro", out, *MICRO, "options")
    told = r"\['imitative', 'options'\] there, \[\] now"
    refuses(told, run, "micro", out, *MICRO, "imitative,options", "--no-early-reject")
    told = r"early_reject: \[\] there, \['imitative'\] now"
    refuses(told, run, "micro", full_out, *MICRO, "imitative", "--early-reject")
    assert sum(r["finish"] == "rejected" for r in early) > 20
    assert run("micro", full_out, *MICRO, "imitative,options,direct") == full
    # No row is stopped for a direct answer: that rule may come and go.
    again = run("micro", out, *MICRO, "imitative,options,direct")
    assert [r["verdict"] for r in again] == [r["verdict"] for r in full]
    assert run("micro", out, *MICRO, "imitative,options") == early


def make_older(out: Path) -> None:
    """Make a folder the earlier version's: all in paths.jsonl, no blocks/, rules as settings."""
    older = read_json(out / "settings.json") | read_json(out / "funnel.json")["rules"]
    (out / "settings.json").write_text(json.dumps(older))
    (out / "funnel.json").unlink()
    shutil.rmtree(out / "blocks")


@pytest.mark.parametrize("flags", [[], ["--refilter"]])
def test_an_older_folder_is_converted(model, tmp_path, sampled, flags):
    """Guards hours of sampling that an earlier version paid for; also for a --limit inside a block,
    and under a smaller --limit, which must not drop what it does not ask for."""
    run(model, tmp_path, "--limit", "5")
    before = derived(tmp_path)
    make_older(tmp_path)
    sampled.clear()
    for limit in ("2", "5"):
        run(model, tmp_path, "--limit", limit, *flags)
    assert derived(tmp_path) == before and not sampled
    assert "min_tokens" not in read_json(tmp_path / "settings.json")


@pytest.mark.parametrize("torn, made", [(0, []), (40, [2])])
def test_an_older_run_that_was_killed_goes_on(model, tmp_path, sampled, monkeypatch, torn, made):
    """Guards blocks beside an older paths.jsonl, with verdicts of their time, and its torn line."""
    run(model, tmp_path)
    before, paths = derived(tmp_path), tmp_path / "paths.jsonl"
    make_older(tmp_path)
    lines = paths.read_text().splitlines(keepends=True)
    there, rest = "".join(lines[:100]), "".join(lines[100:])
    paths.write_text(there[: len(there) - torn])
    (tmp_path / "blocks").mkdir()
    old = rest.replace('"verdict":"kept"', '"verdict":"length"')
    (tmp_path / "blocks/000002-2.jsonl").write_text(old)
    sampled.clear()
    with monkeypatch.context() as m:
        m.setattr(script, "WORLD", 2)
        refuses("once without torchrun", run, model, tmp_path)
    run(model, tmp_path)
    assert derived(tmp_path) == before and sampled == made


def test_a_new_rule_is_one_entry(model, tmp_path, monkeypatch, capsys):
    """Guards the promise that flag, funnel, verdict and limit follow from an entry of RULES."""
    rule = filters.Rule(
        "stops", "max_stops", 1, filters.number(0, 100), lambda path: path.text.count("."),
        lambda n, most: n > most, "at most {} full stops", "ours: 1")  # fmt: skip
    monkeypatch.setattr(filters, "RULES", (*filters.RULES, rule))
    flags = ["--model", "micro", "--limit", "2", "--min-tokens", "2", "--max-rep2", "1"]
    records = run(model, tmp_path, *flags, "--max-new-tokens", "30", "--max-stops", "1")
    assert "at most 1 full stops" in capsys.readouterr().out
    dropped = [r for r in records if r["verdict"] == "stops"]
    assert dropped and all(r["text"].count(".") > 1 for r in dropped)
    assert read_json(tmp_path / "funnel.json")["counts"]["dropped"]["stops"] == len(dropped)
    refuses("--max-stops must be from 0 to 100", run, model, tmp_path, *flags, "--max-stops", "-1")


def test_two_processes_give_the_same_bytes(model, tmp_path):
    """Guards bytes that show which process made a block, and deriving before all are there."""
    run(model, tmp_path / "one")
    command = [sys.executable, str(ROOT / "sample.py"), *arguments(model, tmp_path / "two")]
    envs = [{**os.environ, "RANK": rank, "WORLD_SIZE": "2"} for rank in "10"]
    assert [p.wait() for p in [subprocess.Popen(command, env=env) for env in envs]] == [0, 0]
    assert derived(tmp_path / "two") == derived(tmp_path / "one")


def test_a_trained_student_has_its_own_folder_and_prompt(model, empty_folder, monkeypatch, capsys):
    """Guards Raw SERT of Fig. 1, whose default folder was that of the raw student, which refused it;
    and a student of a teacher's rationales that is sampled without its `Let's think ..`."""
    student, texts, real = "out/micro/m/sert/seed0", [], Tokenizer.encode
    about = {"method": "sert", "root": "m", "parents": ["m"], "prompt_suffix": " Let's think."}
    make_checkpoint(model, Path(student, "last"), **about)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, t: texts.append(t) or real(self, t))
    flags = ["--model", student, "--limit", 1, "--max-new-tokens", 2, *LOOSE, "--min-tokens", 1]
    start(sample, *flags)
    told = capsys.readouterr().out
    assert "1 of 1 questions have a selected path" in told
    assert "next:" not in told  # its default folder is that of the student itself
    start(sample, *flags, "--split", "test", "--raw")
    assert Path(f"{student}/paths-raw-test/paths.jsonl").exists()
    assert len(texts) > 1 and all(text.endswith("\nAnswer: Let's think.") for text in texts)


@pytest.mark.parametrize("flag, value, message", [
    ("--top-p", "0", "--top-p must be above 0"), ("--seed", "-1", "--seed must be from 0"),
    ("--temperature", "nan", "--temperature must be from 0"),
    ("--branches", "999", "--branches 999 exceeds the vocabulary"),
    ("--max-new-tokens", "600", "exceeds the context of 512; lower --max-new-tokens"),
    ("--model", "./nowhere", "no such folder"), ("--html", "x/y.html", "its folder does not exist"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(model, tmp_path, flag, value, message):
    """Guards against tracebacks, and against half-made folders after a typo."""
    refuses(message, run, model, tmp_path / "out", flag, value)
    assert not (tmp_path / "out/paths.jsonl").exists()


def test_dry_run_and_prompt(model, tmp_path, capsys):
    """Guards a --dry-run that writes or hides the prompt, and a --prompt with end-of-text in it."""
    start(sample, *arguments(model, tmp_path / "out", "--dry-run"))
    shown = capsys.readouterr().out
    assert "Question: " in shown and "\nAnswer:" in shown and "3 blocks" in shown
    flags = ["--prompt", "Say <|endoftext|> twice", "--samples", "3"]
    start(sample, *arguments(model, tmp_path / "out", *flags))
    shown = capsys.readouterr().out
    assert shown.count("--- sample") == 3 and shown.count("Say <|endoftext|> twice") == 3
    assert not (tmp_path / "out").exists()
