"""validation.py: ranges, choices and options that exclude each other."""

from types import SimpleNamespace

import pytest

from author_dp.errors import UserError
from author_dp.validation import check_choice, check_exclusive, check_range


@pytest.mark.parametrize(
    ("value", "interval", "words"),
    [
        (1, "[1, inf)", None),
        (0, "[1, inf)", "at least 1$"),
        (float("inf"), "[1, inf)", "at least 1$"),
        (float("nan"), "[0, 1]", "at least 0 and at most 1$"),
        (0, "(0, 1)", "above 0 and below 1$"),
        (1, "(0, 1)", "above 0 and below 1$"),
        (1, "(0, 1]", None),
        (-3, "(-inf, 0)", None),
        (None, "(0, 1)", None),
        (float("inf"), "(-inf, inf)", "finite"),
    ],
)
def test_check_range_refuses_what_lies_outside(value, interval, words):
    if words is None:
        check_range("--option", value, interval)
        return
    with pytest.raises(UserError, match=f"^--option {value}: out of range. Give a value .*{words}"):
        check_range("--option", value, interval)


def test_check_choice_names_the_choices():
    check_choice("--option", "a", ("a", "b"))
    with pytest.raises(UserError, match=r"^--option c: no such choice\. Give one of a, b$"):
        check_choice("--option", "c", ("a", "b"))


def test_check_exclusive_takes_one_at_most():
    check_exclusive(SimpleNamespace(a=None, b=0), "a", "b")
    with pytest.raises(UserError, match=r"^--a, --b: they exclude each other\. Give one of them$"):
        check_exclusive(SimpleNamespace(a=1, b=0, c=None), "a", "b", "c")
