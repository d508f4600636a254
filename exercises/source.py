"""Taking source apart by its syntax tree: definitions by name, bodies left out, parts of a file."""
import ast


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


def change(source: str, name: str, old: str, new: str) -> str:
    """Change the text of one definition."""
    text = ast.get_source_segment(source, find(source, name))
    return source.replace(text, text.replace(old, new))


def part(source: str, names: list[str]) -> str:
    """These definitions and the imports that they use. Names in annotations may be missing."""
    lines, pieces, used = source.splitlines(), [], set()
    for node in (find(source, name) for name in names):
        first = min(inner.lineno for inner in [node, *getattr(node, "decorator_list", [])])
        pieces.append("\n".join(lines[first - 1 : node.end_lineno]))
        used |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    head = "from __future__ import annotations\n"
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            head += f"\n{ast.unparse(node)}" if node.names else ""
    return "\n\n\n".join([head, *pieces]) + "\n"
