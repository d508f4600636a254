"""The house stands as planned: six files at the root, rooms, budgets, widths, imports one way."""
import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGETS = {  # lines at most, blank ones and comments included
    "model.py": 680, "side.py": 200, "prune.py": 170, "data.py": 300, "train.py": 260,
    "bench_memory.py": 411, "methods": 572, "vision": 1000, "llm": 565, "memory": 797, "run": 1949,
    "exercises": 900, "tests": 9129,
}
SIX = {name for name in BUDGETS if name.endswith(".py")}
LAYERS = [  # a module imports from its own layer, without cycles, and from the ones above it here
    ["run.hub", "run.metrics", "run.beam", "run.processes", "run.report",
     "run.folder", "run.prompts", "run.spans"],
    ["model"],
    ["side", "prune", "data", "run.kernels", "run.gradients", "run.cache"],
    ["methods", "vision", "llm"],
    ["memory"],
    ["run.backbones", "run.options", "run.pairs", "run.tasks", "run.predict", "run.settings",
     "run.start", "run.sweep"],
    ["train", "bench_memory"],
    ["exercises", "experiments", "assets"],
]


def python_files():
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return [path for path in found if not any(part.startswith((".", "runs")) for part in path.parts)
            and "site-packages" not in path.parts]


FILES = python_files()
CODE = [path for path in FILES if path.parts[0] != "tests" and path != Path("run/__init__.py")]


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """The project's modules that a file imports, at its top or anywhere below."""
    ours = {module_name(file) for file in CODE}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in ours)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & ours
            yield from inside or {node.module} & ours


def layer_of(module):
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"{module} has no place in LAYERS")


def test_the_root_has_the_six_files_and_no_other_python():
    assert {path.name for path in FILES if len(path.parts) == 1} == SIX


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lines_are_at_most_100_columns_wide(path):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("place", BUDGETS)
def test_every_place_keeps_its_budget(place):
    files = [path for path in FILES if path.parts[0] == place and "fixtures" not in path.parts]
    lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines <= BUDGETS[place], f"{place} has {lines} lines"


@pytest.mark.parametrize("path", CODE, ids=str)
def test_imports_run_one_way(path):
    here = layer_of(module_name(path))
    for module in imported(path):
        there = layer_of(module)
        assert there <= here, f"{path} imports {module}, which stands above it"
        assert "train" != module or here > layer_of("train"), f"{path} imports train"


def test_imports_have_no_cycles():
    package = {module_name(path) for path in CODE if path.name == "__init__.py"}
    graph = {module_name(path): set(imported(path)) - {module_name(path)} for path in CODE
             if module_name(path) not in package}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names them


def test_python_3_10_has_its_own_pins_where_newer_ones_refuse_it():
    pins = [(ROOT / f"requirements{more}.txt").read_text() for more in ("", "-vl")]
    for name in ("numpy", "Pillow"):
        assert re.search(f'^{name}==.*; python_version < "3.11"$', "".join(pins), re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_python_3_10_can_read_it(path):
    ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 10))
