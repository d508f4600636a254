"""Make the course's folder from the source as it stands, or check the course.

    python exercises/make.py DIR        # what students get, in a new or an empty folder
    python exercises/make.py --check    # do stubs and wrong solutions fail, does the source pass?

The bodies of the functions that grade.ASSIGNMENTS names are left out. The source has no marks.
"""
import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import by_hand  # noqa: E402
import grade  # noqa: E402
import source  # noqa: E402
from grade import ASSIGNMENTS  # noqa: E402

GIVEN = ["LICENSE", "requirements.txt", "model.py", "data.py", "assets/nano", "assets/sample"]
GIVEN += [f"run/{x}.py" for x in "beam folder hub kernels metrics processes prompts report".split()]
OURS = ["README.md", "grade.py", "by_hand.py", "questions.txt", "tests"]
PARTS = {  # a file of some definitions of another one, which holds answers, too
    "equations.py": ("bench_memory.py", "ACTIVATIONS", "backward_by_hand"),
    "train.py": ("train.py", "loss_of", "backward"),
    "run/tasks.py": ("run/tasks.py", "collate"),
    "rung.py": ("methods/sides.py", "CrossAttention"),
}
SPOILERS = {"side.py": ["LadderT5.start", "LadderT5.step"], "prune.py": ["aligned"],
            "by_hand.py": ["answer"]}  # no assignments, but they give answers away
EDITED = {*PARTS, *SPOILERS, *grade.FILES} - {"answers.txt"}


def solved(file: str) -> str:
    """A file of the course with nothing left out."""
    origin, *names = PARTS.get(file, (file,))
    text = ((HERE if file in OURS else ROOT) / origin).read_text(encoding="utf-8")
    about = f'"""{", ".join(names)}: a part of the project\'s {origin}."""\n'
    return about + source.part(text, names) if names else text


def handed_out(file: str) -> str:
    """A file as students get it: without answers, and without imports of what they do not get."""
    text = source.blank(solved(file), SPOILERS.get(file, []), "not part of the course")
    for number, assignment in ASSIGNMENTS.items():
        if assignment.file == file:
            text = source.blank(text, assignment.functions, f"assignment {number}")
    return re.sub(r"^from (run\.gradients|vision\.features) import .*\n", "", text, flags=re.M)


def make(folder: Path) -> None:
    for name in [*GIVEN, *OURS]:
        origin = (HERE if name in OURS else ROOT) / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, folder / name)
    for file in EDITED:
        (folder / file).write_text(handed_out(file), encoding="utf-8")
    key = [by_hand.marks(i, variant, by_hand.answer(i, **by_hand.numbers(i, variant))).pop()
           for i in range(len(by_hand.TEXTS)) for variant in range(by_hand.VARIANTS)]
    (folder / "tests" / "key.json").write_text(json.dumps(sorted(key)), encoding="utf-8")


# -------------------------------------------------------------------------------------------- check

def check(student: str = "ada") -> bool:
    """Print a line for each assignment. A solution is swapped in by running its text in the module
    that the tests have imported; what students do not write comes from the repository."""
    answers = {i: by_hand.answer(i, **by_hand.numbers(i, by_hand.variant_of(student, i)))
               for i in range(len(by_hand.TEXTS))}
    lines = (HERE / "wrong.txt").read_text(encoding="utf-8").splitlines()
    wrong = [[cell.strip() for cell in line.split(" |")] for line in lines]
    truths = {file: solved(file) for file in grade.FILES if file != "answers.txt"}
    truths["answers.txt"] = by_hand.sheet(student, answers)

    def put(file: str, text: str) -> None:
        Path(file).write_text(text, encoding="utf-8")
        if file[:-3] in sys.modules:
            exec(compile(text, file, "exec"), vars(sys.modules[file[:-3]]))

    def missed(number: int) -> list[bool]:
        return [bool(reason) for reason in grade.run(number, student).values()]

    well = True
    for file, truth in truths.items():
        put(file, truth)
    for number, (title, _, file, functions) in ASSIGNMENTS.items():
        truth, began = truths[file], time.time()
        passes, seconds = not any(missed(number)), time.time() - began
        put(file, source.blank(truth, functions, "") if functions else by_hand.sheet(student))
        fails = [n for n in ASSIGNMENTS if (all if n == number else any)(missed(n))] == [number]
        survivors, mine = [], [changes for of, *changes in wrong if of == str(number)]
        for function, what, old, new in mine:
            put(file, source.change(truth, function, old, new) if function else
                by_hand.sheet(student, {i: float(new) * x for i, x in answers.items()}))
            survivors += [] if any(missed(number)) else [what]
        put(file, truth)
        well &= passes and fails and len(mine) >= 5 and not survivors and seconds < 20
        print(f"{number} {title:22} the source {'passes' if passes else 'FAILS'}, {seconds:.1f} s;"
              f" its stub {'fails' if fails else 'DOES NOT FAIL'} these tests only;"
              f" {len(mine) - len(survivors)} of {len(mine)} wrong ones fail", *survivors)
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
            make(Path(folder))
            os.chdir(folder)
            sys.path += [folder, str(HERE / "tests")]  # the repository's modules come first
            well = check()
            os.chdir(ROOT)
        sys.exit(not well)
    if args.folder.exists() and not (args.folder.is_dir() and not any(args.folder.iterdir())):
        parser.error(f"{args.folder} is not empty: name a new folder")
    make(args.folder)
    print(f"{args.folder} is ready; students begin with its README.md")


if __name__ == "__main__":
    main()
