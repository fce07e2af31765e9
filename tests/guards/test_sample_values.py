"""sample_values.py: what no batch could be made of, or would teach another token, is refused before the first step."""

import datasets
import numpy as np
import pytest
from conftest import VOCABULARY, make_dataset, make_trainer
from mutation import catches

from author_dp.errors import UserError
from data_utils import AuthorDataset

ROWS = [[1, 2, 3], [4, 5]]


def dataset_of(input_ids: list[list[int]], **labels: list[list[int]]) -> AuthorDataset:
    columns = {"input_ids": input_ids, **labels}
    return AuthorDataset(datasets.Dataset.from_dict(columns), np.array([0, 1, 2]), np.array([0, 1]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dataset_of([[1, 2, 3], [4, VOCABULARY]]), f"train_dataset: its input_ids are 1 to {VOCABULARY}"),
        (dataset_of([[1, 2, 3], [4, -1]]), "train_dataset: its input_ids are -1 to 4"),
        (dataset_of(ROWS, labels=[[1, 2, 3], [4, 99]]), "train_dataset: its labels are 1 to 99"),
        (dataset_of(ROWS, labels=[[1, 2, -1], [-100, 5]]), "train_dataset: its labels are -1 to 5.* or -100 for no target"),
        (dataset_of(ROWS, labels=[[1, 2], [4, 5]]), "another number of labels than of input_ids"),
    ],
)
def test_values_that_the_model_has_not_are_refused(tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, dataset=given).train()
    with pytest.raises(UserError, match=words.replace("train", "eval")):
        make_trainer(tmp_path, eval_dataset={"a": make_dataset([1]), "b": given}).train()
    assert not (tmp_path / "privacy_ledger.jsonl").exists()


@catches("token ids that the model does not have", "guards.sample_values.check_samples_fit",
    'check_sample_values("train_dataset", trainer.train_dataset, vocabulary)', "pass")  # fmt: skip
def test_a_negative_label_is_no_other_token(tmp_path):
    """Its loss would be that of token 0."""
    with pytest.raises(UserError, match="labels are -1"):
        make_trainer(tmp_path, dataset=dataset_of(ROWS, labels=[[1, 2, -1], [-100, 5]])).train()
        pytest.fail("not noticed")


def test_a_sample_that_is_too_long_is_refused_at_the_start(tmp_path, monkeypatch):
    from author_dp.training import setup

    dataset = make_dataset([1] * 9, longest=12)
    for given in (None, 4, 11):
        monkeypatch.setattr(setup, "resolve_sequence_len", lambda model, asked: asked or 11)
        with pytest.raises(UserError, match=r"sequence_len.*longer than .* tokens. Give sequence_len="):
            setup.check_sample_lengths(dataset, given, setup.resolve_sequence_len(None, given))


def test_lists_of_a_fixed_length_are_lists():
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int64"), length=3)})
    samples = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}, features=features)
    fetched = AuthorDataset(samples, np.array([0, 2, 3]), np.array([0, 2, 1])).__getitems__([np.array([2, 0]), np.array([1])])
    assert [[row["input_ids"].tolist() for row in author] for author in fetched] == [[[7, 8, 9], [1, 2, 3]], [[4, 5, 6]]]
