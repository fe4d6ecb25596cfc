"""Teacher files of every form, cleaning, and which rationales are kept."""

import json
from dataclasses import replace

import pytest
from conftest import refuses, shared

from sert_min import tasks, teacher_files
from sert_min.io.files import read_jsonl, to_line
from sert_min.questions import Question, with_choices
from sert_min.rationales import Output, clean, rationale_records, teacher_answer
from sert_min.teacher_files import read_teacher_file

YES = Question("strategy_qa", "42", "Is water wet?", "yes")
NO = Question("strategy_qa", "7", "Do dogs fly?", "no")
FIVE = ("home", "mall", "sea", "sky", "car")
MALL = Question("commonsense_qa", "ab", with_choices("Where?", FIVE), "B", FIVE)
UNKNOWN, NOTHING = "none of the known forms", "no output for any"


def read_rows(path, rows, questions):
    """What a teacher file of these rows gives."""
    path.write_text("".join(map(to_line, rows)))
    return read_teacher_file(str(path), questions)


def records(questions, outputs, keep="right", fits=lambda q, text: len(text) < 1000):
    outputs = {name: [output] for name, output in outputs.items()}
    return rationale_records(questions, outputs, keep, fits)


def test_rows_join_by_id_row_number_and_text(tmp_path):
    names = ("index", "question", "rationale", "teacher_completion")
    told = [(42, " Is water wet? ", "It is.", "Yes."), (9, "Do dogs fly?", "No wings.", "No."),
            (42, "Is water wet?", "Again.", "Yes."), (42, "Another one?", "x", "Yes.")]  # fmt: skip
    rows = [dict(zip(names, row)) for row in told]
    rows.append({"id": "ab", **dict(zip(names[1:], ("Where?", "Shop.", "(b) mall.")))})
    found, left = read_rows(tmp_path / "t.jsonl", rows, [YES, NO, MALL])
    rationales = {i: o.rationale for i, o in found.items()}
    assert rationales == {"42": "It is.", "7": "No wings.", "ab": "Shop."}
    assert left == {"repeated questions": 1, "other questions": 1}
    assert [teacher_answer(found[q.id], q) for q in (YES, NO, MALL)] == ["yes", "no", "B"]
    # The original StrategyQA release has the same questions in another order.
    rows = [{"index": 7, "question": "Is water wet?", "rationale": "Wet.", "teacher_answer": "yes"}]
    found, _ = read_rows(tmp_path / "t.jsonl", rows, [YES, NO])
    assert list(found) == ["42"]


def test_our_own_records_are_read_back_unchanged(tmp_path):
    """Cleaning twice took another sentence off; an unreadable answer became a guess."""
    outputs = {
        "42": Output("Water is wet, I think so", "Yes.", "stop", "t"),
        "7": Output("Yes, some do. Others do not.", "moot.", None, "t"),
        "ab": Output("It is near the mall. So the answer is (B).", None, "stop", "t"),
    }
    first, _ = records([YES, NO, MALL], outputs)
    found, _ = read_rows(tmp_path / "rationales.jsonl", first, [YES, NO, MALL])
    again, _ = records([YES, NO, MALL], found)
    assert again == [r | {"source": "rationales.jsonl"} for r in first]
    assert [r["kept"] for r in first] == [True, False, True]


def log_of(rows) -> str:
    """A log as zero_shot_cot printed it."""
    blocks = [
        f"*************************\n{n}st data\n1_th_sampling\nQ: {r['question']}\nA: Let's think "
        f"step by step. \n\n{r['rationale']} \nTherefore, the answer (Yes or No) is "
        f"{r['teacher_completion']}\npred_before : {r['teacher_completion']}\n"
        f"pred_after : {r['teacher_answer']}\npred_list : ['']\npred_mode : \nGT : {r['answer']}\n"
        "*************************\n"
        for n, r in enumerate(rows, 1)
    ]
    return f"{'*' * 29}\nNamespace()\n{'*' * 29}\n{''.join(blocks)}accuracy : 54.7\n"


def test_log_of_zero_shot_cot(tmp_path):
    """A rationale was cut at its own first "Therefore, the .. is" (45 of 1,603 real ones)."""
    dog = "Therefore, the dog is an animal.\nTherefore, the wing is absent."
    told = [("Do dogs fly?", dog, "No."), ("Is water wet?", "Water wets. It", "Yes, it is.\nReally."),
            ("Is this of the test split?", "Perhaps.", "moot.")]  # fmt: skip
    names = ("question", "rationale", "teacher_completion")
    path = tmp_path / "strategyqa_zero_shot_cot.log"
    path.write_text(log_of(dict(zip(names, row), teacher_answer="", answer="no") for row in told))
    found, left = read_teacher_file(str(path), [YES, NO])
    assert found["7"][:2] == (dog, "No.") and left == {"other questions": 1}
    assert found["42"][:2] == ("Water wets. It", "Yes, it is.\nReally.")
    assert clean(found["42"])[0] == "Water wets."
    assert [teacher_answer(found[q.id], q) for q in (YES, NO)] == ["yes", "no"]


def test_davinci_by_name(empty_folder, tmp_path, monkeypatch):
    """Downloaded once, told whole by its number of entries; a cut download is not kept."""
    said = dict(rationale="R.", teacher_completion="Yes.", teacher_answer="yes", answer="yes")
    log, urls = log_of([{"question": f"q{i}?", **said} for i in range(2290)]).encode(), []
    monkeypatch.setenv("SERT_CACHE", str(tmp_path))
    q = Question("strategy_qa", "3", "q3?", "yes")
    monkeypatch.setattr(teacher_files, "download", lambda url: urls.append(url) or log[:-3000])
    refuses("instead of 2290", read_teacher_file, "davinci", [q])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(teacher_files, "download", lambda url: urls.append(url) or log)
    for _ in range(2):
        found, left = read_teacher_file("davinci", [q])
        assert found["3"].rationale == "R." and left == {"other questions": 2289}
    url = ("https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/"
           "5ef330fcdeec0cd26aee27943504f91f8ec1c33c/log/strategyqa_zero_shot_cot.log")  # fmt: skip
    assert urls == [url] * 2
    refuses("--task strategy_qa", read_teacher_file, "davinci", [MALL])


def write_step_by_step(folder, change=lambda text: text):
    folder.mkdir()
    outputs = [f"Reason {i}. So the answer is (b) mall." for i in range(1200)]
    outputs[1] += "\n\nQ: A made-up question?\nA: No. So the answer is (c) sea."
    outputs[2] = "I do not know"
    outputs = [change(o) for o in outputs]
    (folder / "train_CoT_0.json").write_text(json.dumps(outputs[:1000]))
    (folder / "train_CoT_1.json").write_text(json.dumps(outputs[1000:]))
    (folder / "test_CoT_0.json").write_text(json.dumps(["of the test split"]))


def test_distilling_step_by_step(tmp_path):
    write_step_by_step(tmp_path / "llm")
    questions = [replace(MALL, id=f"i{n}", text=f"{n}?") for n in range(1200)]
    found, _ = read_teacher_file(str(tmp_path / "llm"), questions)
    assert len(found) == 1200 and found["i1100"].rationale == "Reason 1100."
    assert found["i1"][:2] == ("Reason 1.", "(b) mall.")  # without the made-up question
    assert found["i2"][:2] == ("I do not know", None)
    _, counts = records(questions, found)
    assert counts["kept"] == 1199 and counts["dropped: answer not readable"] == 1
    one, _ = read_teacher_file(str(tmp_path / "llm" / "train_CoT_1.json"), questions)
    assert list(one) == [f"i{n}" for n in range(1000, 1200)]
    # Nothing but their order ties these outputs to the questions.
    write_step_by_step(tmp_path / "other", lambda text: text.replace("mall", "moon"))
    refuses("name no option", read_teacher_file, str(tmp_path / "other"), questions)


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"question": "Is water wet?"}', UNKNOWN),
    ("a.jsonl", '{"question": 5, "rationale": "x"}', UNKNOWN),
    ("a.jsonl", '{"question": "Is water wet?", "rationale": ["x"]}', UNKNOWN),
    ("a.jsonl", '{"question": "Is earth flat?", "rationale": "x"}', NOTHING),
    ("a.jsonl", None, "does not exist"), ("a.log", "nothing", NOTHING),
    ("a_0.json", '{"a": 1}', UNKNOWN), ("a.json", "[]", UNKNOWN),
])  # fmt: skip
def test_files_of_another_kind_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    refuses(message, read_teacher_file, str(tmp_path / name), [YES])


def test_davinci_counts():
    """Somebody else's parse: 875 right, 234 without an answer. Ours differs in four rows: it reads
    "YES!", and not "3. Yes, eliminating ..", "Santa Claus .. is Yes." and "both Yes and No."."""
    questions = tasks.load("strategy_qa", "train", shared("data"))
    path = shared("data", "teacher", "strategy_qa.train.text-davinci-002.jsonl")
    outputs, left = read_teacher_file(str(path), questions)
    assert not left and len(outputs) == len(questions)
    rows, counts = records(questions, outputs, fits=None)
    pairs = zip((row["teacher_answer"] or None for row in read_jsonl(path)), rows)
    differ = [(a, r["teacher_answer"]) for a, r in pairs if a != r["teacher_answer"]]
    assert sorted(differ, key=str) == [*[("yes", None)] * 3, (None, "yes")]
    assert counts["answer right"] == counts["kept"] == 874
    assert counts["answer not readable"] == 236
    assert counts["lost a half sentence at the end"] == 414
    assert counts["lost a closing answer sentence"] == 155 and "dropped: empty" not in counts


@pytest.mark.parametrize("text, finish, cleaned", [
    ("It is wet. So the answer is yes.", "stop", "It is wet."), ("The answer is yes.", "stop", ""),
    *(("It is wet. It also", finish, "It is wet.") for finish in ("length", None, "MAX_TOKENS")),
    *(("It is wet. It also", finish, "It is wet. It also") for finish in ("stop", "end_turn")),
    *((f"It is wet. So the answer is{x}", "length", "It is wet.") for x in ("", " yes. And on")),
    ("no full sentence", "length", "no full sentence"),
    ("  It\nis \n\n wet. ", "stop", "It is wet."),
    ("It \x1b[31mis\x1b[0m wet.\x07", "stop", "It [31mis [0m wet."),
    ("<think>\nIs it? No. </think>\n\nIt is wet.", "stop", "It is wet."),
    ("<think> Is it? The answer is yes.", "length", ""),
])  # fmt: skip
def test_cleaning(text, finish, cleaned):
    assert clean(Output(text, None, finish, ""))[0] == cleaned


@pytest.mark.parametrize("q, text, completion, answer", [
    (MALL, "<think> The answer is (A).", None, None),  # no more than thought
    (MALL, "<think> Say (A)? </think> The answer is (B).", None, "B"),
    (YES, "### Answer\n\n**Yes**, it is.", None, "yes"),  # lenient
    (YES, "Yes, some do.", "moot.", None),  # an answer that came apart is read strictly only
    (YES, "Yes, some do.", "", None),
])  # fmt: skip
def test_the_answer_of_a_reply(q, text, completion, answer):
    assert teacher_answer(Output(text, completion, "stop", ""), q) == answer


def test_every_drop_is_counted():
    told = {"42": ("It is wet.", "Yes."), "7": ("They do.", "Yes."), "l": ("long " * 999, "Yes."),
            "m": ("It depends.", "moot."), "n": ("No.", None), "ab": ("", None)}  # fmt: skip
    outputs = {name: Output(*said, "stop", "t") for name, said in told.items()}
    more = [Question("strategy_qa", i, f"{i}?", "yes") for i in ("l", "m", "n", "none")]
    questions = [YES, NO, MALL, *more]
    rows, counts = records(questions, outputs)
    reasons = "ok, answer wrong, empty, too long, answer not readable, bare answer"
    assert [r["reason"] for r in rows] == reasons.split(", ")
    assert counts["kept"] == counts["no output"] == counts["dropped: empty"] == 1
    assert sum(n for what, n in counts.items() if what.startswith(("kept", "dropped"))) == 6
    rows, counts = records(questions, outputs, keep="all")
    assert [r["kept"] for r in rows] == [True, True, False, False, True, False]
    names = "task id question rationale teacher_answer answer kept reason source"
    assert list(rows[0]) == names.split()
