"""What the model writes before and after a run, for the report: a few texts, the first that come, none of them chosen.

Promise: two kinds are kept apart. *Free* texts begin as every training text does, by a token that says nothing: those of the
trained model are post-processing of its weights, covered by the same (epsilon, delta) [1], those of the model before are the
base model's own. *Continued* texts go on where held-out authors began: what these wrote is shown word for word and
protected by nothing, so they are private, whatever epsilon is. Nothing private decides how free texts are drawn: no prompt,
length or number.

A run is the same with them and without: its random numbers and its model are as they were.

Example:

    >>> specimens = Specimens(tokenizer, held_out, start=[], sequence_len=64)
    >>> specimens.write(model, "before")
    >>> specimens.found["free"]["before"]
    ['Honestly, the oven is too crisp for me!', ...]

References:
    [1] Dwork and Roth 2014, The Algorithmic Foundations of Differential Privacy, Proposition 2.1
"""

from typing import Any, Optional

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from author_dp.models.modes import deterministic_eval
from author_dp.types import IGNORE_INDEX

logger = logging.get_logger(f"transformers.{__name__}")

TEXTS, TOKENS = 4, 40  # of each kind, and tokens of each at most
HELDOUT_PROMPTS = 6  # tokens that a held-out author has begun with, at most a half of the text
SEED = 1  # what is drawn protects nobody


class TextSamples:
    """Texts of one run.

    Args:
        tokenizer: of the model.
        held_out: `data_utils.AuthorDataset` of held-out authors; None: no continued texts.
        start: the tokens that every training text began with.
        sequence_len: tokens of a text in training, at most.
        answers: whether only parts of texts are learned: such a model was not taught to begin, and writes no free texts.
    Attributes:
        found: of each kind, "free" and "continued", the texts "before" and "after", and of the latter their "prompts".
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, held_out: Any, start: list[int], sequence_len: int, answers: bool = False
    ):
        self.tokenizer, self.sequence_len = tokenizer, sequence_len
        nothing = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
        free = start or ([nothing] if nothing is not None else [])
        self.begun: dict[str, list[list[int]]] = {"free": [free] * TEXTS if free and not answers else []}
        self.begun["continued"] = [] if held_out is None else heldout_prompts(held_out, sequence_len)
        self.found: dict[str, dict[str, list[str]]] = {kind: {} for kind, begun in self.begun.items() if begun}
        if "continued" in self.found:
            self.found["continued"]["prompts"] = self.decode(self.begun["continued"])

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def write(self, model: Any, when: str) -> None:
        """Write the texts of each kind, `when` "before" or "after" training; a model that cannot, writes none."""
        for kind, texts in self.found.items():
            rows = self.begun[kind]
            tokens = min(TOKENS, self.sequence_len - max(map(len, rows)))
            try:
                texts[when] = self.decode(generate_rows(model, rows, tokens, self.tokenizer.eos_token_id))
            except Exception as error:  # whatever a model's own code raises: a run is not to fail for its report
                logger.warning(f"The report shows no texts: the model does not write any ({type(error).__name__}: {error}).")
                return


def generate_rows(model: Any, rows: list[list[int]], tokens: int, end: Optional[int]) -> list[list[int]]:
    """Return what follows each row as the model has it (temperature 1), at most `tokens` up to `end`, as token ids.

    Rows of one length are written together, so that none is padded.
    """
    ends = [-1] if end is None else [end]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens, eos_token_id=ends,
        pad_token_id=max(0, ends[0]),
    )  # fmt: skip
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, GenerationConfig()  # whatever else it says, beams and all
    written: list[list[int]] = [[] for _ in rows]
    try:
        with deterministic_eval(model), torch.no_grad():  # no inference mode: layers may keep tensors for training
            for length in sorted(set(map(len, rows))):
                places = [place for place, row in enumerate(rows) if len(row) == length]
                begun = torch.tensor([rows[place] for place in places], device=model.device)  # (texts, length)
                torch.manual_seed(SEED)
                longer = model.generate(input_ids=begun, attention_mask=torch.ones_like(begun), generation_config=config)
                for place, row in zip(places, longer[:, length:].tolist()):
                    written[place] = row[: row.index(end)] if end in row else row
    finally:
        base.generation_config = own
    return written


def heldout_prompts(held_out: Any, sequence_len: int) -> list[list[int]]:
    """Return what texts of the first held-out authors begin with: what is not learned, or else their first tokens."""
    draws = [held_out.indices[start : start + 1] for start in held_out.offsets[:-1][: 4 * TEXTS]]
    found: list[list[int]] = []
    for (sample,) in held_out.__getitems__(draws):
        ids, labels = sample["input_ids"].tolist(), sample.get("labels")
        learned = first_learned(labels)
        end = min(HELDOUT_PROMPTS, len(ids) // 2) if learned is None or learned < 2 else learned
        if 0 < end < sequence_len:
            found.append(ids[:end])
    return found[:TEXTS]


def first_learned(labels: Optional[Any]) -> Optional[int]:
    """Return the place of the first token that is a target; None where all are."""
    return None if labels is None else int((labels != IGNORE_INDEX).argmax())
