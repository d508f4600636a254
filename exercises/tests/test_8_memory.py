"""Assignment 8: ten numbers, within 1 % of what bench_memory.py counts (Sec. 3.1)."""
import json
import os
import re
from pathlib import Path

import by_hand


def check(question):
    text = Path("answers.txt").read_text(encoding="utf-8", errors="replace")
    drawn, answers = text.partition("\n")[0][8:].strip(), re.findall(r"^answer:(.*)", text, re.M)
    student = os.environ.get("STUDENT", drawn)
    assert drawn == student, f"answers.txt was drawn for {drawn!r:.40}, not for {student!r}"
    assert len(answers) == 10, f"{len(answers)} lines of answers.txt begin with 'answer:', not 10"
    number = re.sub("[ ,_]", "", answers[question])
    if not number:
        raise NotImplementedError
    assert re.fullmatch(r"\d+(\.\d*)?(e\d\d?)?", number), f"{number!r:.40} is not a number"
    variant, value = by_hand.variant_of(student, question), max(1.0, float(number))
    near = by_hand.marks(question, variant, value, reach=100)
    right = near & {*json.loads(Path("tests", "key.json").read_text(encoding="utf-8"))}
    assert right, f"{number} is not within 1 % of the right number"


for question in range(10):
    globals()[f"test_question_{question + 1}"] = lambda question=question: check(question)
