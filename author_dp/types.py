"""Define a batch of tokens, and the label that is ignored."""

from typing import Any

IGNORE_INDEX = -100  # label of a position that no loss counts; cross_entropy's ignore_index


Batch = dict[str, Any]  # input_ids, labels, int64 (samples, tokens); author, int64 (samples,); num_authors, num_dummies
