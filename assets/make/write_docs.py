"""Copies code from the source into docs/section3.md and docs/extending.md.

    python assets/make/write_docs.py

The prose is written by hand. A comment says which code belongs below it; the link and the block of
code that follow the comment are replaced:

    <!-- side.py | Gate.forward | mu = self.mu => return -->

This is a file, a function, class or variable in it (or `__doc__`, the file's docstring), and how
the first and the last line begin. More such pieces, or beginnings of single lines, may follow, each
after a |. Without any the whole definition is copied.
"""
import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "docs" / "section3.md", ROOT / "docs" / "extending.md"]
COMMENT = r"<!-- (\S+\.py \| .+?) -->\n"
COPY = r"\[`\S+`\]\(\S+\).*\n\n```python\n(?s:.*?)\n```\n"


def names(node: ast.stmt) -> list[str]:
    """What a statement defines: a function, a class, variables, or a docstring."""
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.Expr):
        return ["__doc__"]
    return [getattr(node, "name", "")]


def definition(file: str, name: str) -> list[str]:
    """The lines that define a name, such as `Gate.forward` in side.py."""
    source = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(source)
    for part in name.split("."):
        node = next((inner for inner in getattr(node, "body", []) if part in names(inner)), None)
    if node is None:
        raise ValueError(f"{file} does not define {name}")
    return source.splitlines()[node.lineno - 1 : node.end_lineno]


def position(begin: str, lines: list[str], where: str) -> int:
    """The index of the first line that begins so."""
    for i, line in enumerate(lines):
        if line.strip().startswith(begin):
            return i
    raise ValueError(f"{where}: no line begins with {begin!r}")


def excerpt(file: str, name: str, pieces: list[str]) -> str:
    """The code of a definition, or these pieces of it in their order; "..." marks a gap."""
    lines, where = definition(file, name), f"{file}, {name}"
    shown = [] if pieces else lines
    for piece in pieces:
        first, _, last = piece.partition(" => ")
        start = position(first, lines, where)
        if shown and start > 0:
            indent = len(lines[start]) - len(lines[start].lstrip())
            shown.append(" " * indent + "...")
        end = start + 1 + position(last, lines[start + 1 :], where) if last else start
        shown += lines[start : end + 1]
        lines = lines[end + 1 :]
    return textwrap.dedent("\n".join(shown))


def fill(page: str) -> str:
    """The page with fresh code below each comment."""
    def copy(match: re.Match) -> str:
        file, name, *pieces = match[1].split(" | ")
        link = f"[`{file}`](../{file})" + (f", `{name}`" if name != "__doc__" else "")
        code = excerpt(file, name, pieces)
        return f"<!-- {match[1]} -->\n{link}\n\n```python\n{code}\n```\n"

    return re.sub(f"{COMMENT}(?:{COPY})?", copy, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
