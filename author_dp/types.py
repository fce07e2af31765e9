"""A batch of tokens, and the label that is not learned."""

from typing import Any

IGNORE_INDEX = -100  # label of a position that counts in no loss; cross_entropy's ignore_index


Batch = dict[str, Any]  # input_ids, labels, (samples, tokens); author, (samples,); num_authors
