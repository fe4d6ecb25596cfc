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
        f"{m['threads']} thread(s)\n{n_questions:,} questions x {m['branches'] * m['samples']} paths "
        f"of at most {m['max_new_tokens']} tokens, {blocks:,} blocks, to {out}\n"
        f"rules: {rules}; early rejection {'on' if m['early_reject'] else 'off'}"
    )


def print_questions(questions: list, prompts: list[str], lengths: list[int]) -> None:
    """What --dry-run shows of the questions: their kinds, the first prompt, the longest in tokens."""
    kinds = Counter(own.kind(q) for q in questions)
    longest = max(range(len(questions)), key=lengths.__getitem__)
    print(", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items())))
    print(
        f"the longest prompt has {lengths[longest]:,} tokens: {printable(questions[longest].name)}"
    )
    print(f"\nprompt of {printable(questions[0].name)}:\n{printable_lines(prompts[0])}")


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    """A title and, if there are any, the counts below it."""
    if counts:
        print(f"{title}:", *(f"  {what:<34}{n:>8,}" for what, n in counts.items()), sep="\n")


def print_funnel(funnel: Mapping) -> None:
    """How many paths each rule saw and dropped; `funnel` is what funnel.json holds."""
    c, limits = funnel["counts"], funnel["rules"]
    print(f"\n{'rule':<22}{'saw':>9}{'dropped':>9}{'share':>8}   limit")
    for rule in filters.RULES:
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
    """If fewer than a tenth of the questions have a path: the rule that took most, what it saw, and a
    command that filters the stored samples anew."""
    c, again = funnel["counts"], f"{printable(this_command())} --refilter"
    if c["selected"] * 10 >= c["questions"]:
        return
    rule = max(filters.RULES, key=lambda rule: c["dropped"][rule.name])
    flag, kinds = f"--{rule.flag.replace('_', '-')}", list(funnel["rules"]["patterns"])
    print(f"\nfew paths passed: {rule.name} dropped {c['dropped'][rule.name]:,} of the "
          f"{c['seen'][rule.name]:,} paths that it saw")  # fmt: skip
    if rule.name == "pattern":
        most = max(kinds, key=lambda kind: c["dropped"][f"pattern:{kind}"])
        limit = ",".join(kind for kind in kinds if kind != most) or "none"
        if early and most in EARLY_KINDS:
            again = f"{printable(this_command())} --no-early-reject --out-dir ANOTHER"
    elif isinstance(rule.limit, str):
        limit = rule.limit
    else:
        stored = read_jsonl(folder / "paths.jsonl")
        values = [v for v in measures(stored, rule) if v is not None]
        low, limit, high = (
            f"{v:.3g}" for v in np.quantile(values, (0.1, 0.5, 0.9), method="lower")
        )
        print(f"a tenth of these are below {low}, half below {limit}, nine tenths below {high}")
    print(f"to loosen this rule: {again} {flag} {limit}")


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
    columns = []
    for records in (before, after):
        texts = zip(questions, (r["text"] for r in records))
        shown = [filters.reasons(q, text, tokenizer, limits) for q, text in texts]
        m = summarize(records, questions, shown)
        shares = m["reasoning"][0], m["acc_lenient"][0], m["acc"][0]
        columns.append([*(f"{x:>10.1%}" for x in shares), f"{m['unparseable']:>10}"])
    columns[1][2] += f"   95 % {m['acc'][1]:.1%} to {m['acc'][2]:.1%}"
    names = ("reasoning outputs", "accuracy (lenient: also other wordings)", "accuracy (strict)",
             "no readable answer")  # fmt: skip
    for name, *cells in zip(names, *columns):
        print(f"{name:<40}{''.join(cells)}")
    for q, b, a in list(zip(questions, before, after))[:3]:
        print(f"\n  Q: {printable(q.text)[:160]}  [{q.answer}]\n"
              f"     before: {printable(b['text'])[:160]}\n"
              f"     after:  {printable(a['text'])[:240]}")  # fmt: skip


def print_metrics(title: str, m: dict) -> None:
    """Print one model's metrics; `judges` (name -> report.judge.summary) is optional in them."""
    answer, share = m["majority"]
    print(f"\n{title}: {m['n']:,} questions")

    def line(name: str, value, scale: float = 1, unit: str = "", digits: int = 2, note="") -> None:
        mean, low, high = (None if v is None else scale * v for v in value)
        text = f"{'-':>8}" if mean is None else f"{mean:>8.{digits}f}{unit:<7}"
        if low is not None:
            text += f"95 %: {low:.{digits}f} to {high:.{digits}f}"
        print(f"  {name:<27}{text}{note}")

    right = f"   {round(m['acc'][0] * m['n']):,} right; always {answer}: {100 * share:.2f} %"
    line("Acc, strict", m["acc"], 100, " %", note=right)
    line("Acc, lenient", m["acc_lenient"], 100, " %")
    likelihoods = {"acc_likelihood": "by likelihood", "acc_text_token": "option text, per token",
                   "acc_text": "option text, per char."}  # fmt: skip
    for key, name in likelihoods.items():
        if key in m:
            line(f"Acc, {name}", m[key], 100, " %")
    if "reasoning" in m:
        line("reasoning, by form", m["reasoning"], 100, " %")
    line("contradicts itself", m["contradictory"], 100, " %")
    line("Fmt", m["fmt"], digits=3)
    line("Len", m["len"], unit=" words")
    line("Rep", m["rep"], digits=3)
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
