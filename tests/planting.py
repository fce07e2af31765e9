"""Change one place in a function of the project while it runs, as a careless colleague would have written it."""

import inspect
import pkgutil
import textwrap
from collections.abc import Callable
from types import CodeType


def find(name: str) -> Callable:
    """Return the function called module.function or module.Class.method, the library's without "author_dp."."""
    at_the_door = name.startswith(("author_dp.", "dp_utils.", "data_utils.", "test_"))
    return inspect.unwrap(pkgutil.resolve_name(name if at_the_door else f"author_dp.{name}"))


def with_edit(function: Callable, old: str, new: str) -> CodeType:
    """Return the code of `function` with `old`, which stands there once, replaced by `new`.

    To be set as function.__code__, so that whoever imported the function, under whatever name, runs the edited one.
    """
    lines, _ = inspect.getsourcelines(function)
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("def "))  # after the decorators
    source = textwrap.dedent("".join(lines[start:]))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__qualname__}"
    inner = textwrap.indent(source.replace(old, new), "    ")
    namespace: dict = {}
    exec(f"def make(__class__=None):\n{inner}\n    return {function.__name__}", function.__globals__, namespace)  # for super()
    return namespace["make"]().__code__
