"""authors.py and data_utils.group_by_author: who is the same author."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from mutation import catches

from author_dp.errors import UserError
from data_utils import group_by_author


@pytest.mark.parametrize(
    "authors", [["b", "a", "b", "c"], [7, -1, 7, 2**62], np.array(["b", "a", "b", "c"]), np.array([7, 1, 7, 2]),
                pa.chunked_array([["b", "a"], ["b", "c"]]), [True, False, True], [1.5, 0.5, 1.5, 2.5]]
)  # fmt: skip
def test_group_by_author(authors):
    offsets, indices = group_by_author(authors)
    assert offsets.dtype == indices.dtype == np.int64
    groups = [indices[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
    assert groups == ([[0, 2], [1]] if len(authors) == 3 else [[0, 2], [1], [3]])


@catches("authors without their blanks", "data.authors.encode_authors", "values.dictionary_encode()",
    "(pc.utf8_trim_whitespace(values) if pa.types.is_string(values.type) else values).dictionary_encode()")  # fmt: skip
def test_blanks_and_case_make_another_author():
    offsets, _ = group_by_author([" alice", "alice", "Alice", "alice "])
    assert len(offsets) - 1 == 4


def test_group_by_author_against_a_dictionary():
    authors = np.random.default_rng(0).zipf(1.5, 5_000) % 700
    expected = {}
    for i, author in enumerate(authors.tolist()):
        expected.setdefault(author, []).append(i)
    offsets, indices = group_by_author(authors)
    assert [indices[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == list(expected.values())


DAY = datetime(2020, 1, 1)


@pytest.mark.parametrize(
    "authors",
    [
        ["a", None], [1.0, float("nan")], [1, "1"], [["a"], ["b"]], ["a", b"a"], [1, 1.0], ["\ud800", "a"], [2**64, 1],
        [DAY, DAY.date()], [DAY, DAY.replace(tzinfo=UTC)],
    ],
)  # fmt: skip
@catches("Arrow decides which authors are equal", "data.authors.encode_authors", "check_author_types(authors)", "pass",
    authors=["a", b"a"])  # fmt: skip
def test_group_by_author_refuses_what_is_no_author(authors):
    with pytest.raises(UserError):
        group_by_author(authors)


def test_scalars_of_one_kind_are_of_one_type():
    for authors in ([1, np.int64(2)], ["a", np.str_("b")], [pd.Timestamp(2020, 1, 1), DAY, None][:2], [True, np.bool_(False)]):
        assert len(group_by_author(authors)[0]) in (2, 3)
