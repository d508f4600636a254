"""Make the course's folder from the source as it stands, or check the course.

    python exercises/make.py DIR        # what students get, in a new or an empty folder
    python exercises/make.py --check    # do stubs and wrong solutions fail, does the source pass?

The bodies of the functions that grade.ASSIGNMENTS names are left out. The source has no marks.
"""
import argparse
import ast
import json
import os
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "exercises"
sys.path[:0] = [str(HERE), str(ROOT)]

import by_hand  # noqa: E402
import grade  # noqa: E402
from grade import ASSIGNMENTS  # noqa: E402

GIVEN = ["model.py", "data.py", "assets/nano", "assets/sample", "LICENSE", "requirements.txt",
         *(f"run/{name}.py" for name in "__init__ beam folder hub metrics processes report".split())]
OURS = ["README.md", "grade.py", "questions.txt", "study.py", "tests"]
PARTS = {  # a file of definitions from another one, which holds answers, too
    "equations.py": ("bench_memory.py", "ACTIVATIONS", "backward_by_hand"),
    "train.py": ("train.py", "loss_of", "backward"),
    "run/tasks.py": ("run/tasks.py", "collate"),
    "rung.py": ("methods/sides.py", "CrossAttention"),
    "by_hand.py": ("exercises/by_hand.py",),
}
SPOILERS = {"side.py": ["LadderT5.start", "LadderT5.step"], "prune.py": ["aligned"],
            "by_hand.py": ["answer"]}  # no assignments, but their answers


# ------------------------------------------------------------------------------------------- source

def find(source: str, name: str) -> ast.stmt:
    """The definition of a name such as Gate.forward, or of a variable."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(inner for inner in node.body if part == getattr(inner, "name", None)
                    or part in map(ast.unparse, getattr(inner, "targets", [])))
    return node


def blank(source: str, names: list[str], message: str) -> str:
    """Replace the bodies of functions, but for their docstrings, by a NotImplementedError."""
    for name in names:
        node, lines = find(source, name), source.splitlines()
        first = node.body[ast.get_docstring(node) is not None].lineno - 1
        while lines[first - 1].lstrip().startswith("#"):  # a comment on what follows
            first -= 1
        indent = " " * node.body[0].col_offset
        lines[first : node.end_lineno] = [f'{indent}raise NotImplementedError("{message}")']
        source = "\n".join(lines) + "\n"
    return source


def solved(file: str) -> str:
    """A file of the course with nothing left out."""
    origin, *names = PARTS.get(file, (file,))
    source = (ROOT / origin).read_text(encoding="utf-8")
    if not names:
        return source
    lines, pieces, used = source.splitlines(), [], set()
    for node in (find(source, name) for name in names):
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        pieces.append("\n".join(lines[first - 1 : node.end_lineno]))
        used |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    head = f'"""{", ".join(names)}, from {origin}."""\nfrom __future__ import annotations\n'
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            head += f"\n{ast.unparse(node)}" if node.names else ""
    return "\n\n\n".join([head, *pieces]) + "\n"


def handed_out(file: str) -> str:
    """A file as students get it: without answers, and without imports of what they do not get."""
    source = blank(solved(file), SPOILERS.get(file, []), "not part of the course")
    for number, assignment in ASSIGNMENTS.items():
        if assignment.file == file:
            source = blank(source, assignment.functions, f"assignment {number}")
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        path = str(getattr(node, "module", None)).replace(".", "/") + ".py"
        if (ROOT / path).exists() and path not in [*GIVEN, *PARTS, *grade.FILES]:
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines) + "\n"


def write_key(folder: Path) -> None:
    """The hashes of all answers of assignment 8."""
    folder.mkdir(exist_ok=True)
    key = [by_hand.marks(i, variant, by_hand.answer(i, **by_hand.numbers(i, variant))).pop()
           for i in range(len(by_hand.TEXTS)) for variant in range(by_hand.VARIANTS)]
    (folder / "key.json").write_text(json.dumps(sorted(key)), encoding="utf-8")


def make(folder: Path) -> None:
    for name in [*GIVEN, *OURS]:
        source = (HERE if name in OURS else ROOT) / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for file in {*PARTS, *grade.FILES} - {"answers.txt"}:
        (folder / file).write_text(handed_out(file), encoding="utf-8")
    write_key(folder / "tests")


# -------------------------------------------------------------------------------------------- check

def wrong_solutions(number: int, truth: str, answers: dict[int, int], student: str):
    """Yield (what is wrong, the file with it), as wrong.txt has them."""
    for line in (HERE / "wrong.txt").read_text(encoding="utf-8").splitlines():
        of, function, what, old, new = (cell.strip() for cell in line.split(" |"))
        if of == str(number) and function:
            right = ast.get_source_segment(truth, find(truth, function))
            yield what, truth.replace(right, right.replace(old, new))
        elif of == str(number):
            yield what, by_hand.sheet(student, {i: float(new) * x for i, x in answers.items()})


def check(student: str = "ada") -> bool:
    """Print a line for each assignment. A solution is swapped in by running its text in the module
    that the tests have imported; what students do not write comes from the repository."""
    well, draw = True, lambda i: by_hand.numbers(i, by_hand.variant_of(student, i))
    answers = {i: by_hand.answer(i, **draw(i)) for i in range(len(by_hand.TEXTS))}
    truths = {file: solved(file) for file in grade.FILES if file != "answers.txt"}
    truths["answers.txt"] = by_hand.sheet(student, answers)

    def put(file: str, text: str) -> None:
        Path(file).write_text(text, encoding="utf-8")
        if file[:-3] in sys.modules:
            exec(compile(text, file, "exec"), vars(sys.modules[file[:-3]]))

    def missed(number: int) -> list[bool]:
        return [bool(reason) for reason in grade.run(number, student).values()]

    for file, truth in truths.items():
        put(file, truth)
    for number, (title, _, file, functions) in ASSIGNMENTS.items():
        truth, began = truths[file], time.time()
        passes, seconds = not any(missed(number)), time.time() - began
        put(file, blank(truth, functions, "") if functions else by_hand.sheet(student))
        fails = [n for n in ASSIGNMENTS if (all if n == number else any)(missed(n))] == [number]
        survivors, count = [], 0
        for count, (what, text) in enumerate(wrong_solutions(number, truth, answers, student), 1):
            put(file, text)
            survivors += [] if any(missed(number)) else [what]
        put(file, truth)
        well &= passes and fails and count >= 5 and not survivors
        print(f"{number} {title:22} the source {'passes' if passes else 'FAILS'} in {seconds:.1f} s,"
              f" its stub {'fails' if fails else 'DOES NOT FAIL'} these tests only,"
              f" {count - len(survivors)} of {count} wrong ones fail", *survivors, flush=True)
    return well


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a new or an empty one")
    parser.add_argument("--check", action="store_true", help="check the course, make nothing")
    args = parser.parse_args(argv)
    if args.check == bool(args.folder):
        parser.error("name a folder to make, or give --check")
    if args.check:
        with TemporaryDirectory() as folder:
            sys.path[:0] = [folder, str(HERE / "tests")]
            os.chdir(folder)
            write_key(Path("tests"))
            well = check()
            os.chdir(ROOT)
        sys.exit(not well)
    if args.folder.exists() and not (args.folder.is_dir() and not any(args.folder.iterdir())):
        parser.error(f"{args.folder} is not empty: name a new folder")
    make(args.folder)
    print(f"{args.folder} is ready; students begin with its README.md")


if __name__ == "__main__":
    main()
