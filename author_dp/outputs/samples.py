"""Let the model write a few texts before and after training, for the report. They are the first ones, not a selection.

Guarantees: two kinds of texts are kept separate. *Unconditional* texts begin as every training text does, with a token that
carries no information. Those of the trained model are post-processing of its weights and have the same guarantee [1]. Those of
the model before training are the base model's own. *Continuations* begin with what held-out authors wrote, word for word. No
guarantee protects these authors, so continuations are private, whatever epsilon is. Nothing private affects how unconditional
texts are sampled: no prompt, length or number.

Training is the same with and without them: random states and model are left as they were.

Example:

    >>> samples = TextSamples(tokenizer, held_out, sequence_len=64)
    >>> samples.write(model, "before")
    >>> samples.found[UNCONDITIONAL]["before"]
    ['Honestly, the oven is too crisp for me!', ...]

References:
    [1] Dwork and Roth 2014, The Algorithmic Foundations of Differential Privacy, Proposition 2.1
"""

from typing import Any, Optional

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from author_dp.logs import get_logger
from author_dp.models.modes import deterministic_eval, temporarily_set
from author_dp.progress import track_calls
from author_dp.types import IGNORE_INDEX

logger = get_logger(__name__)

UNCONDITIONAL, CONTINUATION = "free", "continued"  # keys in the file of statistics
NUM_TEXTS, MAX_TOKENS = 4, 40  # of each kind, and of each text
MAX_PROMPT_TOKENS = 6  # of a held-out text without a prompt, and at most half of the text
SEED = 1  # public: these random numbers protect nobody


class TextSamples:
    """Texts that the model of a run writes.

    Args:
        tokenizer: of the model.
        held_out: `data_utils.AuthorDataset` of held-out authors; None: no continuations.
        sequence_len: maximum tokens of a training text.
        answers: whether training has a loss on parts of texts only. Such a model has not learned to begin a text, and writes no
            unconditional ones.
    Attributes:
        found: for each kind, UNCONDITIONAL and CONTINUATION, the texts "before" and "after"; for the latter also "prompts".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held_out: Any, sequence_len: int, answers: bool = False):
        self.tokenizer, self.sequence_len = tokenizer, sequence_len
        start = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
        self.prompts: dict[str, list[list[int]]] = {
            UNCONDITIONAL: [start] * NUM_TEXTS if start and not answers else [],
            CONTINUATION: [] if held_out is None else heldout_prompts(held_out, sequence_len),
        }
        self.found: dict[str, dict[str, list[str]]] = {kind: {} for kind, prompts in self.prompts.items() if prompts}
        if CONTINUATION in self.found:
            self.found[CONTINUATION]["prompts"] = self.decode(self.prompts[CONTINUATION])

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def write(self, model: Any, when: str) -> None:
        """Write the texts of each kind; if the model cannot generate, warn and write none.

        Args:
            when: "before" or "after" training.
        """
        for kind, texts in self.found.items():
            rows = self.prompts[kind]
            tokens = min(MAX_TOKENS, self.sequence_len - max(map(len, rows)))
            calls = tokens * len(set(map(len, rows)))  # each batch of `sample_rows` has as many as it generates tokens
            try:
                with track_calls(model, f"Write samples {when} training", calls):
                    texts[when] = self.decode(sample_rows(model, rows, tokens, self.tokenizer.eos_token_id))
            except Exception as error:  # any error of the model's own code: a run must not fail because of its report
                logger.warning(f"The report shows no texts: the model cannot generate ({type(error).__name__}: {error}).")
                return


def sample_rows(model: Any, rows: list[list[int]], max_new_tokens: int, eos_token_id: Optional[int]) -> list[list[int]]:
    """Return the token ids that the model samples after each row, at temperature 1.

    Rows of the same length form a batch, so that none is padded.
    """
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens,
        eos_token_id=[-1 if eos_token_id is None else eos_token_id], pad_token_id=eos_token_id or 0,
    )  # fmt: skip
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The model's own configuration may ask for beams and the like, which `generate` would merge into ours.
    own_config = temporarily_set((base, "generation_config", GenerationConfig()))
    generated: list[list[int]] = [[] for _ in rows]
    with own_config, deterministic_eval(model), torch.no_grad():  # no inference mode: layers may keep tensors for training
        for length in sorted(set(map(len, rows))):
            indices = [index for index, row in enumerate(rows) if len(row) == length]
            prompts = torch.tensor([rows[index] for index in indices], device=model.device)  # (texts, length)
            torch.manual_seed(SEED)
            output = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
            for index, row in zip(indices, output[:, length:].tolist()):
                generated[index] = row[: row.index(eos_token_id)] if eos_token_id in row else row
    return generated


def heldout_prompts(held_out: Any, sequence_len: int) -> list[list[int]]:
    """Return the prompts of texts of held-out authors, as token ids; the first tokens of texts that have no prompt."""
    authors = [held_out.indices[start : start + 1] for start in held_out.offsets[:-1][: 4 * NUM_TEXTS]]  # one text of each
    prompts: list[list[int]] = []
    for (sample,) in held_out.__getitems__(authors):
        ids = sample["input_ids"].tolist()
        labels = sample.get("labels")
        prompt_length = None if labels is None else int((labels != IGNORE_INDEX).argmax())  # the first token that has a loss
        if prompt_length is None or prompt_length < 2:
            prompt_length = min(MAX_PROMPT_TOKENS, len(ids) // 2)
        if 0 < prompt_length < sequence_len:
            prompts.append(ids[:prompt_length])
    return prompts[:NUM_TEXTS]
