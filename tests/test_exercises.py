"""The course: what students get holds no answer, the grader is fair to any code, and says why."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exercises import make
from workshop import ROOT, contents

by_hand, grade, source = make.by_hand, make.grade, make.source
LONG = 22  # characters of code: long enough to be an idea, if it is not one of these
PLAIN = {"nn.Dropout(config.dropout_rate)", "contextlib.nullcontext()",
         "importance['embed.weight']"}
CODE = [file for file in grade.FILES if file.endswith(".py")]


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    make.make(folder)
    return folder


@pytest.fixture
def submission(tmp_path):
    """submission(file, name, old, new): a folder of true files, with a change in one of them."""
    def hand_in(file, name, old, new):
        (tmp_path / file).write_text(source.change(make.solved(file), name, old, new))
        return tmp_path
    return hand_in


def graded(course, folder, *options):
    """What grade.py prints and writes."""
    command = [sys.executable, course / "grade.py", folder, "--json", folder / "grades.json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout, json.loads((folder / "grades.json").read_text())


def expressions(tree):
    """The code of everything in a tree that could be an answer, or a part of one."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.expr, ast.stmt))]
    texts = {ast.unparse(node) for node in nodes if not isinstance(node, ast.Attribute)}
    return {text for text in texts if len(text) >= LONG} - PLAIN


def left_out():
    """(function, its definition, its lines but the first) of all that students do not get."""
    for file in CODE:
        text = make.solved(file)
        names = [name for assignment in grade.ASSIGNMENTS.values() if assignment.file == file
                 for name in assignment.functions]
        for name in names + make.SPOILERS.get(file, []):
            node = source.find(text, name)
            yield name, node, text.splitlines()[node.lineno : node.end_lineno]


# -------------------------------------------------------------------------------------- the folder

def test_what_is_left_out_is_nowhere_in_the_folder(course):
    files = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    code = {path: expressions(ast.parse(text)) for path, text in files.items()
            if path.suffix == ".py"}
    assert not [path for path in files if path.suffix == ".pyc"]
    for name, node, lines in left_out():
        body = node.body[ast.get_docstring(node) is not None :]
        for path, given in code.items():
            found = set().union(*map(expressions, body)) & given
            assert not found, f"{path.name} has {found} of {name}"
        first = body[0].lineno - node.lineno - 1
        for line in [line.strip().encode() for line in lines[first:] if len(line.strip()) >= LONG]:
            assert not [path.name for path, text in files.items() if line in text], line


def test_signatures_and_docstrings_stay_and_the_source_is_as_it_was(course, tmp_path):
    before = {path: path.read_bytes() for path in ROOT.glob("*.py")}
    make.make(tmp_path / "again")
    assert {path: path.read_bytes() for path in ROOT.glob("*.py")} == before
    assert contents(tmp_path / "again") == contents(course)
    for file in CODE:
        for name in [name for one in grade.ASSIGNMENTS.values() if one.file == file
                     for name in one.functions]:
            true, given = (source.find(text, name)
                           for text in (make.solved(file), (course / file).read_text()))
            assert ast.dump(true.args) == ast.dump(given.args)
            assert ast.get_docstring(true) == ast.get_docstring(given)
            assert ast.unparse(given.body[-1]).startswith("raise NotImplementedError('assignment")


@pytest.mark.slow
def test_every_module_of_the_folder_can_be_imported(course):
    names = [path.relative_to(course).with_suffix("") for path in course.rglob("*.py")]
    names = [str(name).replace("/", ".") for name in names if name.parts[0] != "tests"]
    command = [sys.executable, "-B", "-c", f"import {', '.join(names)}"]
    subprocess.run(command, cwd=course, check=True)


def test_the_table_has_all_assignments_and_100_points():
    assert list(grade.ASSIGNMENTS) == list(range(1, 10))
    assert sum(assignment.points for assignment in grade.ASSIGNMENTS.values()) == 100
    for number in grade.ASSIGNMENTS:
        assert len(list((ROOT / "exercises" / "tests").glob(f"test_{number}_*.py"))) == 1


def test_a_body_is_left_out_with_its_comments():
    head, tail = 'class A:\n    def f(self):\n        """Doc."""\n', "\n    b = 2\n"
    body, left = "        # how\n        return 1\n", '        raise NotImplementedError("3")\n'
    assert source.blank(head + body + tail, ["A.f"], "3") == head + left + tail


def test_budgets_of_the_two_programs():
    lines = [len((ROOT / "exercises" / f"{name}.py").read_text().splitlines())
             for name in ("make", "grade")]
    assert sum(lines) <= 300


@pytest.mark.parametrize("argv, words", [([], "name a folder"), (["FULL"], "is not empty"),
                                         (["DIR", "--check"], "or give --check")], ids=str)
def test_make_refuses_in_one_line(argv, words, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        make.main([str(tmp_path) if word == "FULL" else word for word in argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------- memory by hand

def test_answers_count_within_one_percent():
    for question in range(10):
        mark = by_hand.marks(question, 0, 123_456)
        near = [by_hand.marks(question, 0, 123_456 * x, reach=100) for x in (0.991, 1.009)]
        far = [by_hand.marks(question, 0, 123_456 * x, reach=100) for x in (0.989, 1.011)]
        assert all(mark & marks for marks in near) and not any(mark & marks for marks in far)


def test_questions_are_drawn_from_the_id_and_their_key_has_no_number(course):
    sheets = {name: by_hand.sheet(name) for name in ("ada", "bob", "eve")}
    assert len(set(sheets.values())) == 3 and by_hand.sheet("ada") == sheets["ada"]
    key = json.loads((course / "tests" / "key.json").read_text())
    assert len(key) == 80 and all(re.fullmatch("[0-9a-f]{16}", mark) for mark in key)


# --------------------------------------------------------------------------------------- the grader

@pytest.mark.parametrize("old, new, points, line", [
    ("return", "return (", 0, "SyntaxError: '(' was never closed (side.py, line "),
    ("mu = self.mu", "mu = self.nu", 1, "AttributeError: 'Gate' object has no attribute 'nu'"),
    ("mu = self.mu", "print('x' * 10**6, end=''); mu = self.mu", 5, ""),
    ("mu = self.mu", "raise SystemExit", 1, "SystemExit"),
    ("mu = self.mu", "import socket; socket.create_connection(('127.0.0.1', 9)); mu = self.mu", 1,
     "no network"),
    ("return", "return h_side[0]; return", 1, "shape: (5, 4), expected (2, 5, 4)"),
], ids=["syntax", "name", "spam", "exit", "network", "shape"])
@pytest.mark.slow
def test_a_miss_has_a_line_why(course, submission, old, new, points, line):
    text, result = graded(course, submission("side.py", "Gate.forward", old, new), "--only", "2")
    assert result["points"] == points and line in text and "Traceback" not in text
    assert max(map(len, text.splitlines())) < 300


@pytest.mark.slow
def test_a_loop_without_an_end_is_stopped(course, submission):
    folder = submission("side.py", "Gate.forward", "mu = self.mu", "while True: pass")
    text, result = graded(course, folder, "--only", "2", "--limit", "8")
    assert result["points"] == 0 and "no result in 8 s" in text


@pytest.mark.slow
def test_a_missing_file_is_named_and_only_what_is_handed_in_counts(course, tmp_path):
    shutil.copytree(course, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rung.py").unlink()
    (tmp_path / "tests" / "test_2_gate.py").write_text("def test_nothing():\n    pass\n")
    for number, line in (("2", "not written yet"), ("9", "rung.py is missing")):
        text, result = graded(course, tmp_path, "--only", number)
        assert result["points"] == 0 and line in text


@pytest.mark.slow
def test_the_source_gets_full_points_in_the_folder_that_students_have(course, tmp_path):
    shutil.copytree(course, tmp_path / "course")
    shutil.copy(ROOT / "run" / "gradients.py", tmp_path / "course" / "run")
    (tmp_path / "ada").mkdir()
    for file in CODE:
        text = make.solved(file).replace("from vision.features import Features\n", "")
        (tmp_path / "ada" / file).write_text(text)
    answers = {i: by_hand.answer(i, **by_hand.numbers(i, by_hand.variant_of("ada", i)))
               for i in range(10)}
    (tmp_path / "ada" / "answers.txt").write_text(by_hand.sheet("ada", answers))
    text, result = graded(tmp_path / "course", tmp_path / "ada", "--student", "ada")
    assert result["points"] == result["of"] == 100, text
    text, result = graded(tmp_path / "course", course, "--student", "ada")
    assert result["points"] == 0 and text.count("not written yet") == 8, text
