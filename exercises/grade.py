"""Grade a folder of the course: points, and one line why for every miss.

    python grade.py --student ada                                   # this folder
    python grade.py submissions/ada --student ada --json ada.json   # another, for the lecturer

Only the files that students hand in are taken from the folder; all else is what lies beside this
file. Inputs are drawn for the student. Each assignment runs in its own process, without network.
"""
import argparse
import importlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.distributed  # starts a program while it is imported: before `forbid`

HERE = Path(__file__).resolve().parent


class Assignment(NamedTuple):
    """A row of the table in README.md."""
    title: str
    points: int
    file: str  # what is handed in
    functions: list[str]  # of it, those that students write


ASSIGNMENTS = {
    int(number): Assignment(title, int(points), file, re.findall(r"`([\w.]+)`", functions))
    for number, title, points, file, functions in re.findall(
        r"^\| (\d+) \| (.+?) *\|.*\| *(\d+) \| `(\S+)` *\|(.*)\|$",
        (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)}
FILES = sorted({assignment.file for assignment in ASSIGNMENTS.values()})


# ------------------------------------------------------------------ in the process of an assignment

def run(number: int, student: str) -> dict[str, str]:
    """{what a test claims: why it fails, or ""}; {"all": why} if the tests cannot even start."""
    os.environ["STUDENT"], outcomes = student, {}
    torch.set_num_threads(1)  # small tensors
    try:
        path = next(HERE.glob(f"tests/test_{number}_*.py"))
        tests = vars(importlib.import_module(path.stem))
    except (Exception, SystemExit) as error:
        return {"all": why(error)}
    for name in [name for name in tests if name.startswith("test_")]:
        seed = int(sha256(f"{student} {name}".encode()).hexdigest()[:15], 16)
        torch.manual_seed(seed)
        random.seed(seed)
        claim = name.removeprefix("test_").replace("_", " ")
        try:
            outcomes[claim] = tests[name]() or ""
        except (Exception, SystemExit) as error:
            outcomes[claim] = why(error)
    return outcomes


def why(error: BaseException) -> str:
    """What was found and what expected; or where the student's code stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(frame.filename).name}, line {frame.lineno}: " for frame in frames
             if Path(frame.filename).name in FILES]
    text = " ".join(str(error).split())[:200]
    if isinstance(error, NotImplementedError):
        return "not written yet"
    if isinstance(error, AssertionError) and Path(frames[-1].filename).parent.name == "tests":
        return text
    return f"{''.join(where[-1:])}{type(error).__name__}: {text}"


def forbid(event: str, _) -> None:
    """An audit hook, which Python code cannot take back."""
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix")):
        raise PermissionError(f"{event}: no network and no other programs here")


def child(number: int, student: str, limit: int) -> None:
    """Print what `run` returns, as JSON, and nothing that the student's code prints."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    answer, silence = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.path.append(str(HERE / "tests"))
    sys.addaudithook(forbid)
    json.dump(run(number, student), answer)
    answer.close()


# ------------------------------------------------------------------------------------------ grading

def grade(number: int, student: str, folder: Path, limit: int) -> dict:
    """Return points, seconds, and {claim: why}. limit: processor seconds, ten times by clock."""
    _, points, file, _ = ASSIGNMENTS[number]
    command = [sys.executable, "-c", f"import grade; grade.child({number}, {student!r}, {limit})"]
    began = time.time()
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=10 * limit)
        outcomes = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        outcomes = {"all": f"no result in {limit} s: a loop without an end, or an exit?"}
    if not (folder / file).is_file():
        outcomes = {"all": f"{file} is missing"}
    misses = {claim: reason for claim, reason in outcomes.items() if reason}
    return {"points": points * (len(outcomes) - len(misses)) // len(outcomes), "of": points,
            "seconds": round(time.time() - began, 1), "misses": misses}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="default: this one")
    parser.add_argument("--student", default="nobody", help="inputs and questions are theirs")
    parser.add_argument("--only", type=int, choices=ASSIGNMENTS, help="one assignment")
    parser.add_argument("--limit", type=int, default=60, help="processor seconds for each (60)")
    parser.add_argument("--json", type=argparse.FileType("w"), help="also write all to this file")
    args = parser.parse_args(argv)
    if not (HERE / "model.py").is_file() or not args.folder.is_dir():
        parser.error(f"no course in {args.folder} or {HERE}: first python exercises/make.py DIR")

    result = {"student": args.student, "points": 0, "of": 0, "assignments": {}}
    with TemporaryDirectory() as work:
        work = Path(work, "course")
        left = shutil.ignore_patterns(".*", "*env*", "assets", "__pycache__", "submissions", *FILES)
        shutil.copytree(HERE, work, ignore=left)
        for file in [file for file in FILES if (args.folder / file).is_file()]:
            shutil.copy(args.folder / file, work / file)
        for number in [args.only] if args.only else ASSIGNMENTS:
            graded = grade(number, args.student, work, args.limit)
            result["assignments"][number] = graded
            result["points"], result["of"] = (result[key] + graded[key] for key in ("points", "of"))
            print(f"{number} {ASSIGNMENTS[number].title:24}{graded['points']:3} of "
                  f"{graded['of']:2}{graded['seconds']:7} s", flush=True)
            for reason in dict.fromkeys(graded["misses"].values()):
                claims = [claim for claim, other in graded["misses"].items() if other == reason]
                print(f"    {claims[0]}{' ...' * (len(claims) > 1)}: {reason}")
    print(f"  {'in all':24}{result['points']:3} of {result['of']}")
    if args.json:
        json.dump(result, args.json, indent=2)
    return result


if __name__ == "__main__":
    main()
