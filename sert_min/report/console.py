"""What the scripts print about their results: the funnel, paths, metrics, before and after."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sert_min import filters, own
from sert_min.io.errors import printable, printable_lines, this_command
from sert_min.io.files import read_jsonl
from sert_min.metrics import summarize
from sert_min.patterns import EARLY_KINDS, PATTERN_KINDS
from sert_min.questions import question_in


def print_sampling(m: Mapping, limits: Mapping, n_params: int, n_questions: int, out: Path) -> None:
    """What sample.py is about to do, with everything that was resolved: `m` are its settings."""
    rules = "; ".join(filters.words(rule, limits[rule.flag]) for rule in filters.RULES)
    blocks = -(-n_questions // m["block_questions"])
    print(
        f"model {m['model']} ({n_params / 1e6:.1f}M parameters), {m['device']}, {m['dtype']}, "
        f"{m['threads']} thread(s)\n{n_questions:,} questions x {m['branches'] * m['samples']} "
        f"paths of at most {m['max_new_tokens']} tokens, {blocks:,} blocks, to {out}\n"
        f"rules: {rules}; early rejection {'on' if m['early_reject'] else 'off'}"
    )


def print_questions(questions: list, prompts: list[str], lengths: list[int]) -> None:
    """What --dry-run shows of the questions: kinds, the first prompt, the longest in tokens."""
    kinds = Counter(own.kind(q) for q in questions)
    first, longest = (printable(questions[i].name) for i in (0, lengths.index(max(lengths))))
    print(", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items())))
    print(f"the longest prompt has {max(lengths):,} tokens: {longest}")
    print(f"\nprompt of {first}:\n{printable_lines(prompts[0])}")


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    """A title and, if there are any, the counts below it."""
    if counts:
        print(f"{title}:", *(f"  {what:<34}{n:>8,}" for what, n in counts.items()), sep="\n")


def print_funnel(funnel: Mapping) -> None:
    """How many paths each rule saw and dropped; `funnel` is what funnel.json holds."""
    c, limits = funnel["counts"], funnel["rules"]
    print(f"\n{'rule':<22}{'saw':>9}{'dropped':>9}{'share':>8}   limit")
    for rule in [r for r in filters.RULES if r.name in c["seen"]]:  # older files lack newer rules
        saw, dropped = c["seen"][rule.name], c["dropped"][rule.name]
        text = f"{rule.name:<22}{saw:>9,}{dropped:>9,}{dropped / max(saw, 1):>8.1%}"
        print(f"{text}   {filters.words(rule, limits[rule.flag])}")
        for kind in PATTERN_KINDS if rule.name == "pattern" else ():
            print(f"  {kind:<20}{'':>9}{c['dropped'][f'pattern:{kind}']:>9,}")
    print(
        f"{c['passed']:,} of {c['paths']:,} paths passed; {c['selected']:,} of {c['questions']:,} "
        f"questions have a selected path, {c['without_path']:,} have none"
    )


def print_hint(folder: Path, funnel: Mapping, early: bool) -> None:
    """If fewer than a tenth of the questions have a path: the rule that took the largest share, what
    it saw, and a command that filters the stored samples anew."""
    c, again = funnel["counts"], f"{printable(this_command())} --refilter"
    if c["selected"] * 10 >= c["questions"]:
        return
    rule = max(filters.RULES, key=lambda r: c["dropped"][r.name] / max(c["seen"][r.name], 1))
    n, saw, limit = c["dropped"][rule.name], c["seen"][rule.name], rule.limit
    print(f"\nfew paths passed: {rule.name} dropped {n:,} of the {saw:,} paths that it saw")
    if rule.name == "pattern":
        kinds = list(funnel["rules"]["patterns"])
        most = max(kinds, key=lambda kind: c["dropped"][f"pattern:{kind}"])
        limit = ",".join(kind for kind in kinds if kind != most) or "none"
        if early and most in EARLY_KINDS:
            again = f"{printable(this_command())} --no-early-reject --out-dir ANOTHER"
    elif not isinstance(limit, str):
        values = measures(read_jsonl(folder / "paths.jsonl"), rule)
        values = np.quantile([v for v in values if v is not None], (0.1, 0.5, 0.9), method="lower")
        low, limit, high = (f"{v:.3g}" for v in values)
        print(f"a tenth of these are below {low}, half below {limit}, nine tenths below {high}")
    print(f"to loosen this rule: {again} --{rule.flag.replace('_', '-')} {limit}")


def measures(records: Iterable[Mapping], rule: filters.Rule) -> list:
    """What a rule measured of the records of paths.jsonl that reached it (not for the pattern rule)."""
    names = [r.name for r in filters.RULES]
    reached, found = {*names[names.index(rule.name) :], "kept", "selected"}, []
    for r in records:
        if r["verdict"].partition(":")[0] in reached:
            ids, logprobs = r["token_ids"][r["path_start"] : r["path_end"]], r["logprobs"]
            path = filters.Path(ids, logprobs[: r["path_end"]], r["text"], {}, question_in(r))
            found.append(rule.measure(path))
    return found


def print_paths(folder: Path) -> None:
    """Three selected paths of paths.jsonl, and rejected ones of three different verdicts."""
    selected, rejected = [], {}  # of the rejected ones one of each verdict
    for r in read_jsonl(folder / "paths.jsonl"):
        if r["verdict"] == "selected":
            selected.append(r)
        elif r["verdict"] != "kept":
            rejected.setdefault(r["verdict"], r)
        if min(len(selected), len(rejected)) >= 3:
            break
    for title, some in (("selected", selected), ("rejected", list(rejected.values()))):
        print(f"\n{title}:")
        for r in some[:3]:
            p = r["perplexity"]
            facts = "no tokens" if p is None else f"perplexity {p:.2f}, rep-2 {r['rep2']:.2f}"
            print(f"  Q: {printable(r['question'])[:200]}\n"
                  f"     {printable(r['text'])[:300] or '(empty)'}\n"
                  f"     -> {r['verdict']} ({facts}, branch {r['branch']})")  # fmt: skip


def print_rationales(records: list[dict]) -> None:
    """Two rationales that are kept and two that are dropped."""
    for title, want in (("kept", True), ("dropped", False)):
        for r in [r for r in records if r["kept"] is want][:2]:
            print(f"\n{title}: {r['reason']}\n  Q: {printable(r['question'])[:200]}\n"
                  f"     {printable(r['rationale'])[:300] or '(empty)'}\n     teacher's answer: "
                  f"{r['teacher_answer']}, right: {r['answer']}")  # fmt: skip


def print_before_after(questions, before, after, tokenizer, limits) -> None:
    """The table of what training changed in greedy decoding, and three outputs side by side."""
    print(f"\ngreedy decoding, {len(questions)} test questions{'before':>14}{'after':>10}")
    found = []
    for records in (before, after):
        texts = zip(questions, (r["text"] for r in records))
        shown = [filters.reasons(q, text, tokenizer, limits) for q, text in texts]
        found.append(summarize(records, questions, shown))
    for key, name in (("reasoning", "reasoning outputs"),
                      ("acc_lenient", "accuracy (lenient: also other wordings)"),
                      ("acc", "accuracy (strict)")):  # fmt: skip
        note = "   95 % {:.1%} to {:.1%}".format(*found[1][key][1:]) if key == "acc" else ""
        print(f"{name:<40}" + "".join(f"{m[key][0]:>10.1%}" for m in found) + note)
    print(f"{'no readable answer':<40}" + "".join(f"{m['unparseable']:>10}" for m in found))
    for q, b, a in list(zip(questions, before, after))[:3]:
        print(f"\n  Q: {printable(q.text)[:160]}  [{q.answer}]\n"
              f"     before: {printable(b['text'])[:160]}\n"
              f"     after:  {printable(a['text'])[:240]}")  # fmt: skip


NAMES = {  # of the metrics that are printed, in order
    "acc": "Acc, strict", "acc_lenient": "Acc, lenient", "acc_likelihood": "Acc, by likelihood",
    "acc_text_token": "Acc, option text, per token", "acc_text": "Acc, option text, per char.",
    "reasoning": "reasoning, by form", "contradictory": "contradicts itself", "fmt": "Fmt",
    "len": "Len", "rep": "Rep",
}  # fmt: skip
UNITS = {"fmt": ("", 3), "len": (" words", 2), "rep": ("", 3)}  # and digits; the others are in %


def print_metrics(title: str, m: dict) -> None:
    """Print one model's metrics; `judges` (name -> report.judge.summary) is optional in them."""
    answer, share = m["majority"]
    print(f"\n{title}: {m['n']:,} questions")

    def line(name: str, value, unit: str = "", digits: int = 2, note: str = "") -> None:
        mean, low, high = (100 * v if v is not None and unit == " %" else v for v in value)
        text = f"{'-':>8}" if mean is None else f"{mean:>8.{digits}f}{unit:<7}"
        span = "" if low is None else f"95 %: {low:.{digits}f} to {high:.{digits}f}"
        print(f"  {name:<27}{text}{span}{note}")

    right = f"   {round(m['acc'][0] * m['n']):,} right; always {answer}: {100 * share:.2f} %"
    for key in [key for key in NAMES if key in m]:
        line(NAMES[key], m[key], *UNITS.get(key, (" %", 2)), right if key == "acc" else "")
    for name, j in m.get("judges", {}).items():
        for key in [k for k in j if k not in ("parsed", "total")]:
            line(f"judge: {key}", j[key])
        print(f"  judge {name}: all four scores of {j['parsed']:,} of {j['total']:,} responses")
    print(f"  no readable answer in {m['unparseable']:,} of {m['n']:,} outputs")
    print("  " + ", ".join(f"{reason} {n:,}" for reason, n in m["reasons"].items()))


def draw_curve(out: Path, title: str) -> None:
    """Draw loss.png from the log. A picture that fails is one line, and no reason to stop."""
    try:
        from sert_min.report.figures import plot_training  # late: matplotlib takes a second

        plot_training(out / "metrics.jsonl", out / "loss.png", title)
        print(f"wrote {out}/loss.png")
    except Exception as e:  # of matplotlib, its backend or its settings
        print(f"loss.png was not drawn ({type(e).__name__}: {printable(str(e))[:100]})")
