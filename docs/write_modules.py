"""Write docs/modules.md from the docstrings of the library: python docs/write_modules.py

A test fails where the page is out of date.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, LIBRARY = ROOT / "docs" / "modules.md", ROOT / "author_dp"
HEAD = """# Modules

Where is what? Each module of [author_dp/](../author_dp) with the start of its docstring, and the functions and classes that
it defines, to be searched. [Architecture](architecture.md) has what each package promises, and in which order to read it.
`python docs/write_modules.py` writes this page.
"""


def package_order() -> list[str]:
    """Return the packages in the order of the table in architecture.md, which is that of imports."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \[(\w+)\]\(\.\./author_dp/\w+\)", page, re.M)


def row(path: Path) -> str:
    """Return a module's line of the table."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    about = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split()).replace("|", "\\|")
    definitions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = ", ".join(f"`{name}`" for name in definitions if not name.startswith("_"))
    link = f"[`{path.name}`](../{path.relative_to(ROOT)})"
    return f"| {link} | {about} | {names} |"


def make_page() -> str:
    parts = [HEAD]
    for name in ("", *package_order()):
        modules = "\n".join(map(row, sorted((LIBRARY / name).glob("*.py"))))
        parts.append(f"## author_dp/{name}\n\n| module | what it does | definitions |\n|---|---|---|\n{modules}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
