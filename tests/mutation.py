"""Mutation tests: plant a privacy bug of one line and rerun the test that must notice it, with that test's own fixtures.

`@catches(bug, function, old, new, **case)` declares at a test that it fails where `old`, which stands once in the source of
`function`, is replaced by `new`; `case` are values of the test's parameters. `pytest --tier mutation` runs them all, and
`pytest --tier mutation --cached` those whose test, or anything that it imports, has changed since they were last noticed.
"""

import ast
import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from planting import find, with_edit

from author_dp.errors import MechanismError, UserError

ROOT = Path(__file__).parent.parent
NOTICED = (AssertionError, pytest.fail.Exception, MechanismError, UserError)  # the last two: the run itself notices
OF_A_CHECK = ("differ from the reference", "when they ran again")  # a UserError of the model check, or of a second pass
FOLDERS = (ROOT, *(folder for folder in (ROOT / "tests").rglob("*") if folder.is_dir()), ROOT / "tests", ROOT / "benchmarks")


@dataclasses.dataclass(frozen=True)
class Bug:
    name: str
    function: str
    old: str
    new: str
    case: dict
    spawned: bool


def catches(name: str, function: str, old: str, new: str, /, *, spawned: bool = False, **case) -> pytest.MarkDecorator:
    """Declare a bug that a test must notice.

    Args:
        name: What a careless colleague did.
        function: module.function or module.Class.method; a module of the library without "author_dp.".
        old: What stands once in the function's source.
        new: What it becomes.
        spawned: Whether the bug is planted in the processes that the test starts by run_processes.
        case: Values of the test's parameters.
    """
    return pytest.mark.catches(Bug(name, function, old, new, case, spawned))


class Mutant(pytest.Function):
    """A test that passes if the test fails with a bug."""

    bug: Bug

    @property
    def noted(self) -> Path:
        """The file that holds the hash of all that the test imported when the bug was last noticed."""
        return self.config.cache.mkdir("mutants") / hashlib.sha256(self.nodeid.encode()).hexdigest()

    @functools.cached_property
    def hash(self) -> str:
        return hash_files(self.path)

    @property
    def is_cached(self) -> bool:
        return self.noted.exists() and self.noted.read_text() == self.hash


def make_mutants(items: list[pytest.Item]) -> Iterator[Mutant]:
    """Return one item for each bug declared at the tests in `items`."""
    seen = set()
    for item in items:
        if not isinstance(item, pytest.Function) or (item.parent, item.originalname) in seen:
            continue
        seen.add((item.parent, item.originalname))
        for mark in item.iter_markers("catches"):
            yield make_mutant(item, mark.args[0])


def make_mutant(item: pytest.Function, bug: Bug) -> Mutant:
    """Return the test of `item` as one that plants `bug` first."""
    callspec = getattr(item, "callspec", None)
    if bug.case:
        unknown = bug.case.keys() - (callspec.params if callspec else {}).keys()
        assert not unknown, f"{item.nodeid} has no parameter {unknown}, which {bug.name!r} sets"
        callspec = dataclasses.replace(callspec, params=callspec.params | bug.case)
    name = f"{item.originalname}[bug: {bug.name}]"
    mutant = Mutant.from_parent(
        item.parent,
        name=name,
        originalname=name,  # from which pytest makes the node's id
        callobj=item.obj,
        callspec=callspec,
        fixtureinfo=item._fixtureinfo,
    )
    mutant.bug = bug
    return mutant


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """Plant a mutant's bug, run its test, and pass if that fails."""
    if not isinstance(pyfuncitem, Mutant):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        plant(pyfuncitem.bug, patch)
        np.random.seed(0)
        try:
            yield
        except NOTICED as noticed:
            if isinstance(noticed, UserError) and not any(words in str(noticed) for words in OF_A_CHECK):
                raise
            pyfuncitem.noted.write_text(pyfuncitem.hash)
            return True
    pytest.fail(f"not noticed: {pyfuncitem.bug.name}")


def plant(bug: Bug, patch: pytest.MonkeyPatch) -> None:
    """Set the code of the bug's function, or tell run_processes to do so in the processes that it starts."""
    function = find(bug.function)
    if not bug.spawned:
        patch.setattr(function, "__code__", with_edit(function, bug.old, bug.new))
        return
    import test_processes  # by which tests start processes

    run = functools.partial(test_processes.run_processes, plant=[bug.function, bug.old, bug.new])
    patch.setattr(test_processes, "run_processes", run)


@functools.cache
def hash_files(test: Path) -> str:
    """Return a hash of the door, of a test module, and of all files of the project that these import."""
    files, waiting = set(), [test, *ROOT.glob("*.py"), ROOT / "tests" / "one_step.py"]
    while waiting:
        if (path := waiting.pop()) not in files:
            files.add(path)
            waiting += imported_files(path)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


@functools.cache
def imported_files(path: Path) -> list[Path]:
    """Return the files of the project that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    stems = [folder / name.replace(".", "/") for name in names for folder in FOLDERS]
    candidates = [candidate for stem in stems for candidate in (stem.with_suffix(".py"), stem / "__init__.py")]
    return [candidate for candidate in candidates if candidate.is_file()]
