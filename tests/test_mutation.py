"""mutation.py and bugs.py: a planted bug stands once, whatever the number of tests that must notice it."""

import ast
from collections import Counter
from collections.abc import Iterator

from conftest import ROOT


def text_of(node: ast.expr, names: dict[str, str]) -> str | None:
    """Return the text of a literal, which may hold names of other texts; None for anything else."""
    used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    if not isinstance(node, ast.Name | ast.Constant | ast.JoinedStr) or not used <= names.keys():
        return None
    value = eval(compile(ast.Expression(node), "", "eval"), dict(names))
    return value if isinstance(value, str) else None


def planted_in(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield function, old and new line of each bug that a file writes out, in tuples and in `catches`."""
    tree, names = ast.parse(source), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if (text := text_of(node.value, names)) is not None:
                names[node.targets[0].id] = text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "catches":
            written = node.args[1:4]
        else:
            written = node.elts[:3] if isinstance(node, ast.Tuple) else []
        texts = [text_of(part, names) for part in written]
        if len(texts) == 3 and None not in texts and "." in texts[0] and " " not in texts[0]:
            yield texts[0].removeprefix("author_dp."), *texts[1:]


def test_planted_in_finds_tables_and_decorators():
    source = 'STEP = "a.b"\nBUGS = {"one": (f"{STEP}.c", "x", "y", "words")}\n'
    source += '@catches("two", "author_dp.a.b", "x", "z" "z", k=3)\ndef test():\n    pass\n'
    assert list(planted_in(source)) == [("a.b", "x", "zz"), ("a.b.c", "x", "y")]


def test_each_planted_bug_stands_once():
    """Else: let bugs.py hold it."""
    planted = Counter(bug for path in (ROOT / "tests").rglob("*.py") for bug in planted_in(path.read_text()))
    assert len(planted) > 300 and not [bug for bug, count in planted.items() if count > 1]
