"""Check before the first step that all samples fit the model: their length, their token ids and their labels.

Otherwise the first batch with such a sample, perhaps after hours, would end the run, or teach another token.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from author_dp.data.columns import get_column
from author_dp.errors import UserError
from author_dp.types import IGNORE_INDEX


def check_samples_fit(trainer: Any) -> None:
    """Check the values of training and evaluation samples; see `check_sample_values`.

    Args:
        trainer: dp_utils.DPTrainer.
    """
    vocabulary, evaluation = len(trainer.model.get_input_embeddings().weight), trainer.eval_dataset
    check_sample_values("train_dataset", trainer.train_dataset, vocabulary)
    for dataset in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        check_sample_values("eval_dataset", dataset, vocabulary)


def check_sample_values(name: str, dataset: Any, vocabulary: int) -> None:
    """Raise UserError for token ids or labels that the model does not have, or another number of labels than of tokens.

    Args:
        name: of the argument that the data set was given as.
        dataset: `data_utils.AuthorDataset`; others have no samples to check.
        vocabulary: number of the model's token embeddings.
    """
    samples = getattr(dataset, "samples", None)
    if samples is None:
        return
    columns = {column: get_column(samples, column) for column in samples.column_names}
    for column, values in columns.items():
        tokens = pc.list_flatten(values)
        if column == "labels":
            tokens = tokens.filter(pc.not_equal(tokens, IGNORE_INDEX))
        found = pc.min_max(tokens).as_py()
        if tokens.null_count or (len(tokens) and not 0 <= found["min"] <= found["max"] < vocabulary):
            but = f", or {IGNORE_INDEX} for no target" if column == "labels" else ""
            raise UserError(
                f"{name}: its {column} are {found['min']} to {found['max']}, but the model has 0 to {vocabulary - 1}{but}. "
                "Tokenize with the tokenizer of the model"
            )
    if "labels" in columns and not have_equal_lengths(columns["input_ids"], columns["labels"]):
        raise UserError(f"{name}: a sample has another number of labels than of input_ids. Give a label for each token")


def have_equal_lengths(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    """Return whether two columns of lists have lists of equal lengths."""
    return bool(pc.all(pc.equal(pc.list_value_length(left), pc.list_value_length(right))).as_py())


def check_sample_lengths(dataset: Any, given: int | None, longest: int) -> None:
    """Raise UserError for a training sample that is longer than microbatches are made for.

    Args:
        given: sequence_len of DPTrainer.
        longest: the same, or its default.
    """
    if (found := getattr(dataset, "longest", 0)) > longest:
        has = f"sequence_len {given}" if given else "sequence_len"
        raise UserError(f"{has} of DPTrainer: a sample is longer than {longest} tokens. Give sequence_len={found}, or cut it")
