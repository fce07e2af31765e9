"""Check on the user's model that an author's loss depends on that author's samples only.

Guarantees: a model that passes computes each sample's logits from that sample's earlier tokens alone. Neither other samples,
padding and later tokens nor texts of earlier batches change them, and no buffer of a checkpoint learns from texts.

Clipping bounds an author's influence only under this condition. The checks compare logits of random tokens in float32, without
dropout; `random_ops` checks dropout itself. A model that mixes samples by chance only, or computes differently beyond the tested
lengths, is not found.

Example:

    >>> check_sample_independence(model, sequence_len=128)
"""

from typing import Any, Optional

import torch

from author_dp.errors import UserError
from author_dp.guards.precision import BFloat16Watch, check_rows_are_separate, precision_tolerance_factor
from author_dp.guards.probing import model_errors_as_user_error, perturb_zero_params, random_tokens, resolve_sequence_len
from author_dp.guards.random_ops import BATCH_SIZE, RandomOpModelCall, check_random_ops
from author_dp.models.modes import deterministic_train_mode, float32_train_mode

LOGIT_TOLERANCE = 1e-4  # relative difference of logits that another order of summation may cause
REPEAT_TOLERANCE = 1e-7  # the same for two computations on one text: kernels on a GPU may not be deterministic
CROWD_SIZE = 64  # samples beside a short one, for models that begin to mix samples in larger batches only
RANDOM_OPS_LEN = 7  # tokens of the samples whose random operations are checked
MAX_LEN = 512  # tokens of the longest text in costly checks: mixers and local attention cut long texts into chunks


def check_sample_independence(model: Any, sequence_len: Optional[int] = None, bf16: bool = False) -> None:
    """Raise UserError if samples influence each other's logits, the past, or what is saved.

    Args:
        model: restored afterwards.
        sequence_len: tokens of the longest sample; default: as in `resolve_sequence_len`.
        bf16: whether the run uses autocast; random operations are then checked under it.
    """
    max_len = resolve_sequence_len(model, sequence_len)
    cannot_run = f"--model_name: this model fails on {max_len} plain token ids. Lower --sequence_len, or choose another model"
    with perturb_zero_params(model), model_errors_as_user_error(cannot_run):
        ids = random_tokens(model, BATCH_SIZE * min(max_len, RANDOM_OPS_LEN), 5).view(BATCH_SIZE, -1)
        with float32_train_mode(model):
            tolerance = LOGIT_TOLERANCE * (100.0 if bf16 else precision_tolerance_factor(model))
            check_random_ops(RandomOpModelCall(model, bf16), ids, min(max_len, MAX_LEN), tolerance)
        with deterministic_train_mode(model):
            with BFloat16Watch() as watch:
                check_saved_buffers(model, max_len)
            if watch.found:
                check_rows_are_separate(ids.device, "--model_name")
            check_logits_independent(model, max_len)
            check_stateless(model, max_len)


def check_saved_buffers(model: Any, max_len: int) -> None:
    """Raise UserError if a forward pass changes a saved buffer: checkpoints would disclose texts."""
    saved = model.state_dict(keep_vars=True).keys()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
    with torch.no_grad():
        model(input_ids=random_tokens(model, max_len, 3)[None])
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(before[name], buffer):
            raise UserError(f"--model_name: {name} changes with the texts, and is saved without noise. Choose another model")


def check_stateless(model: Any, max_len: int) -> None:
    """Raise UserError if a long text changes later outputs: a step would depend on earlier authors' texts."""
    ids = random_tokens(model, max_len, 3)[None]
    for length in (max_len // 2, max_len * 3 // 4):
        with torch.no_grad():
            model(input_ids=ids[:, :2])  # lets a model that ever forgets earlier texts forget them now
            before, _, after = (model(input_ids=text).logits for text in (ids[:, :length], ids, ids[:, :length]))
        if not torch.equal(before, after) and not (before - after).norm() < REPEAT_TOLERANCE * before.norm():
            raise UserError(
                f"--model_name: a text of {max_len} tokens changes this model's later outputs (dynamic rope?). "
                "Lower --sequence_len, or choose another model"
            )


def check_logits_independent(model: Any, max_len: int) -> None:
    """Raise UserError if a short sample's logits depend on other samples, padding, or its own later tokens."""
    long = random_tokens(model, max_len, 1)
    short = random_tokens(model, max(2, max_len // 4), 2)
    padded = torch.cat([short, long.new_zeros(max_len - len(short))])
    continued = torch.cat([short, long[len(short) :]])
    shortest = short[:4]
    crowd = torch.stack([shortest, *random_tokens(model, CROWD_SIZE * len(shortest), 4).view(CROWD_SIZE, -1)])
    with torch.no_grad():
        alone = model(input_ids=short[None]).logits[0]
        with_padding, with_later_tokens = (model(input_ids=ids[None]).logits[0, : len(short)] for ids in (padded, continued))
        in_first_row, in_second_row = (model(input_ids=torch.stack(rows)).logits for rows in ([padded, long], [long, padded]))
        beside_long = torch.stack([in_first_row[0, : len(short)], in_second_row[1, : len(short)]])
        in_crowd = model(input_ids=crowd).logits[0]
    if not alone.isfinite().all():
        raise UserError("--model_name: the model's logits are not finite. Choose another model, or fix the checkpoint")
    mixes = "mixes authors: {} in the batch changes a shorter one's logits. Lower --sequence_len"
    for problem, one, other in (
        ("sees later tokens. Set is_decoder in the config of a BERT", with_padding, with_later_tokens),
        (mixes.format("a longer sample"), alone.expand_as(beside_long), beside_long),
        (mixes.format("another sample"), alone[: len(shortest)], in_crowd),
    ):
        difference = float((other - one).norm() / one.norm())
        if not difference < LOGIT_TOLERANCE * precision_tolerance_factor(model):
            raise UserError(f"--model_name: this model {problem}, or choose another one (relative difference {difference:.1e})")
