"""What is proven on the user's own model before anything is trained or written.

Promise: a model that passes keeps samples apart and does not see the future, so that an author's loss depends on that author's
samples only; and the clipping engine's norms and clipped sum on it are those of a plain loop over authors, to rounding. The texts
are random tokens, never the user's. The model, its modes and buffers, and the random generators are as before, afterwards.

Example:

    >>> proof = prove(model, "ghost", sequence_len=128)
    >>> proof.error
    1.4e-07
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from transformers.utils import logging

from author_dp.clipping import ENGINES, ClippingEngine
from author_dp.clipping.ghost import GhostClipping
from author_dp.errors import UserError
from author_dp.guards.precision import float32_products
from author_dp.guards.random_ops import BATCH, ModelCall, check_random_ops, training_mode
from author_dp.mechanism.fsdp import (
    FSDP_REMEDY,
    autograd_gradients,
    backward_on_one_rank,
    global_norm,
    is_sharded,
    local_shard,
    make_engine,
)
from author_dp.mechanism.losses import needs_position_ids
from author_dp.models.quantization import computes_in_float32, float32_compute
from author_dp.types import IGNORE_INDEX, Batch

logger = logging.get_logger(f"transformers.{__name__}")

TOLERANCE = 5e-4  # of an author's norm, and of a parameter's share of the clipped sum: what rounding may do to a deep model
SAME_TOLERANCE = 1e-4  # of logits that are to be the same: what another order of summation may do
SAME_QUANTIZED_TOLERANCE = 1e-7  # of logits of one text, computed twice: kernels on a GPU may not be deterministic
NEGLIGIBLE = 1e-5  # of the whole clipped sum: a parameter's share below it may be nothing but rounding (biases of keys)
COUNTS = (1, 2, 4)  # samples of the proof's authors: seven, so that neither heads nor experts are as many
LENGTHS = (9, 7)  # longest sample, in tokens: once another number than the samples, and once the same
MANY = 64  # samples beside a short one, for what begins to mix in larger batches
TOKENS = 7  # of the samples whose random operations are looked at
LONGEST = 512  # tokens of a further text, if samples are as long: mixers and local attention cut long texts into chunks

TRANSFORMERS_MODULE = {"every_n_layers", "offload"}  # of --activation_checkpointing_kwargs; the others are torch's


class ModelCheck(NamedTuple):
    """What was found; public, as it depends on the model only."""

    error: float  # largest relative difference between the engine and a plain loop
    apart: set[Any]  # the parameters that the engine takes author by author
    unused: list[str]  # trainable parameters that the loss does not use; frozen

    def settle(self, engine: ClippingEngine) -> None:
        """Tell an engine what was found, so that it need not find it again."""
        if isinstance(engine, GhostClipping):
            engine.freeze_fallback(self.apart)

    def max_authors(self, most: int) -> int:
        """Return how many authors a microbatch is to have: taken apart, one costs one backward, of several each costs one."""
        return 1 if self.apart else most

    def in_words(self) -> str:
        """Return what the log says of it."""
        words = f"Samples are apart; clipping checked against a plain loop: {self.error:.1e}."
        if self.apart:
            words += f" {len(self.apart)} parameters have no rule: authors are taken one at a time, exact but slower."
        if self.unused:
            shown = ", ".join(self.unused[:3]) + (", ..." if len(self.unused) > 3 else "")
            words += f" The loss does not use {len(self.unused)} trainable parameters, which are frozen: {shown}."
        return words


def verify_model(
    model: Any,
    clipping: str,
    sequence_len: Optional[int] = None,
    checkpointing: Optional[dict[str, Any]] = None,
    bf16: bool = False,
) -> ModelCheck:
    """Prove that the model keeps samples apart and that the engine clips it rightly; freeze what the loss does not use.

    Args:
        model: in float32; anything trainable is compared.
        clipping: the engine's name in ENGINES.
        sequence_len: tokens of the longest sample; default: 128, or as many positions as the model has.
        checkpointing: --activation_checkpointing_kwargs where the run checkpoints its layers: the engine then sees them so.
        bf16: whether the run is under autocast; random operations are then looked at under it.
    Raises:
        UserError: naming the property that does not hold, or the parameters that differ.
    """
    longest = longest_sample(model, sequence_len)
    check_sample_independence(model, longest, bf16)
    with deterministic_train_mode(model), perturb_zero_params(model):
        with as_user_error(f"--clipping {clipping} cannot follow this model: {alternative(clipping, model.parameters())}"):
            batches = [random_authors(model, length) for length in LENGTHS]
            batches.append(random_authors(model, max(4, min(longest, LONGEST)), (1, 1)))
            unused = freeze_unused(model, batches[0])
            error, apart = check_engine(model, clipping, batches, checkpointing)
    return ModelCheck(error, apart, unused)


def check_sample_independence(model: Any, sequence_len: Optional[int] = None, bf16: bool = False) -> None:
    """Raise UserError where the model mixes samples, shares random numbers among them, sees the future or saves texts."""
    longest = longest_sample(model, sequence_len)
    what = (
        f"--model_name: this model cannot be called with {longest} token ids alone: lower --sequence_len, or choose another one"
    )
    with perturb_zero_params(model), as_user_error(what):
        ids = random_tokens(model, BATCH * min(longest, TOKENS), 5).view(BATCH, -1)
        with exact_reference(model):
            coarser = 100.0 if bf16 else rounding(model)
            check_random_ops(
                ModelCall(model, needs_position_ids(model), bf16), ids, min(longest, LONGEST), SAME_TOLERANCE * coarser
            )
        with deterministic_train_mode(model):
            check_buffers(model, longest)
            check_samples_apart(model, longest)
            check_memory(model, longest)


def longest_sample(model: Any, sequence_len: Optional[int]) -> int:
    return max(4, sequence_len or 0) if sequence_len else min(getattr(model.config, "max_position_embeddings", None) or 128, 128)


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Say what an error of the model's own code is about; the user can mend it by other options."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{what} ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})") from error


# --- the model, as it is compared -----------------------------------------------------------------------


@contextmanager
def exact_reference(model: nn.Module) -> Iterator[None]:
    """In training mode, as batch norm shows itself only there, without autocast, TF32 or products in bfloat16."""
    autocast = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with training_mode(model), autocast, float32_compute(model), float32_products():
        yield


@contextmanager
def deterministic_train_mode(model: nn.Module) -> Iterator[None]:
    """As `exact`, and without dropout."""
    owners: dict[int, Any] = {id(o): o for m in model.modules() for o in (m, getattr(m, "config", None)) if o is not None}
    rates = [(o, name, v) for o in owners.values() for name, v in list(vars(o).items()) if is_dropout_rate(o, name, v)]
    with exact_reference(model):
        try:
            for owner, name, value in rates:
                setattr(owner, name, type(value)(0))
            yield
        finally:
            for owner, name, value in rates:
                setattr(owner, name, value)


def is_dropout_rate(owner: Any, name: str, value: Any) -> bool:
    """Whether an attribute says how much is dropped, or shaken, at random in training."""
    is_dropout = isinstance(owner, nn.modules.dropout._DropoutNd) and name == "p"
    return isinstance(value, float) and value > 0 and (is_dropout or "drop" in name or "jitter" in name or name == "pdrop")


@contextmanager
def perturb_zero_params(model: nn.Module) -> Iterator[None]:
    """With small random numbers in what is all zero: LoRA's second factor would hide every gradient of the first."""
    zeros = [
        local_shard(parameter) for parameter in model.parameters() if parameter.requires_grad and not local_shard(parameter).any()
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(torch.empty(parameter.shape).normal_(std=0.02, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def rounding(model: nn.Module) -> float:
    """Return how much coarser the model computes than float32: a frozen base may do so in bfloat16."""
    return 1.0 if computes_in_float32(model) else 100.0


def random_tokens(model: Any, count: int, seed: int) -> torch.Tensor:
    """Return ids (count,) that are no special tokens: an image's would want an image."""
    vocabulary = min(len(model.get_input_embeddings().weight), model.config.get_text_config().vocab_size)
    special = {value for name, value in model.config.to_dict().items() if "token" in name and isinstance(value, int)}
    choice = torch.tensor([i for i in range(min(vocabulary, 2**12)) if i not in special])
    ids = choice[torch.randint(len(choice), (count,), generator=torch.Generator().manual_seed(seed))]
    return ids.to(next(model.parameters()).device)


# --- samples are apart, and causal ----------------------------------------------------------------------


def check_buffers(model: Any, longest: int) -> None:
    """Raise UserError where a forward in training changes what a checkpoint holds beside weights: it would tell of the texts."""
    saved = model.state_dict(keep_vars=True).keys()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
    with torch.no_grad():
        model(input_ids=random_tokens(model, longest, 3)[None])
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(before[name], buffer):
            raise UserError(f"--model_name: {name} changes with the texts, without noise, and is saved; choose another model")


def check_memory(model: Any, longest: int) -> None:
    """Raise UserError where a long text changes what later forwards compute: the next step would depend on this one's authors."""
    ids = random_tokens(model, longest, 3)[None]
    for length in (longest // 2, longest * 3 // 4):
        with torch.no_grad():
            model(input_ids=ids[:, :2])  # whatever was seen before is forgotten, if it ever is
            first, _, again = (model(input_ids=part).logits for part in (ids[:, :length], ids, ids[:, :length]))
        if not torch.equal(first, again) and not (first - again).norm() < SAME_QUANTIZED_TOLERANCE * first.norm():
            raise UserError(
                f"--model_name: after a text of {longest} tokens this model computes others otherwise (dynamic rope?): lower "
                "--sequence_len, or choose another model"
            )


def check_samples_apart(model: Any, longest: int) -> None:
    """Raise UserError where a short sample's logits depend on a longer one beside it, on padding, or on its own later tokens."""
    long = random_tokens(model, longest, 1)
    short = random_tokens(model, max(2, longest // 4), 2)
    padded = torch.cat([short, long.new_zeros(longest - len(short))])
    changed = torch.cat([short, long[len(short) :]])
    with torch.no_grad():
        alone = model(input_ids=short[None]).logits[0]
        ended, went_on = (model(input_ids=ids[None]).logits[0, : len(short)] for ids in (padded, changed))
        beside, behind = (model(input_ids=torch.stack(rows)).logits for rows in ([padded, long], [long, padded]))
        beside = torch.stack([beside[0, : len(short)], behind[1, : len(short)]])
        few = short[:4]
        crowd = model(input_ids=torch.stack([few, *random_tokens(model, MANY * len(few), 4).view(MANY, -1)])).logits[0]
    if not alone.isfinite().all():
        raise UserError("--model_name: the model's logits are not finite: choose another model, or mend the checkpoint")
    mixes = "lets {} in the batch change a shorter one's logits, which mixes authors: lower --sequence_len"
    for what, one, other in (
        ("sees later tokens: it is no causal language model (a BERT needs is_decoder in its config)", ended, went_on),
        (mixes.format("a longer sample"), alone.expand_as(beside), beside),
        (mixes.format("other samples"), alone[: len(few)], crowd),
    ):
        difference = float((other - one).norm() / one.norm())
        if not difference < SAME_TOLERANCE * rounding(model):
            raise UserError(f"--model_name: this model {what}, or choose another one (difference {difference:.1e})")


# --- clipping against a plain loop ----------------------------------------------------------------------


def random_authors(model: Any, longest: int, counts: tuple[int, ...] = COUNTS) -> Batch:
    """Return a microbatch of authors with `counts` ragged samples each of random tokens."""
    samples = sum(counts)
    lengths = [longest, *(2 + (3 * i) % (longest - 1) for i in range(1, samples))]
    ids = random_tokens(model, samples * longest, 10 + longest).view(samples, longest)
    there = torch.arange(longest, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    author = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(ids.device)
    batch = {"input_ids": ids.where(there, 0), "labels": ids.where(there, IGNORE_INDEX), "author": author}
    return {**batch, "num_authors": len(counts)}


def reference_gradient(model: Any, batch: Batch, author: int, parameters: list[Any]) -> tuple[torch.Tensor | None, ...]:
    """Return one author's gradient by ordinary autograd, each sample alone and unpadded; None where nothing is used."""
    rows = [batch["input_ids"][i][batch["labels"][i] != IGNORE_INDEX] for i in (batch["author"] == author).nonzero()[:, 0]]
    targets = sum(len(row) - 1 for row in rows)
    total: list[Any] = [None] * len(parameters)
    for row in rows:
        log_probabilities = model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1)
        loss = -log_probabilities.gather(1, row[1:, None]).sum() / targets
        for i, gradient in enumerate(autograd_gradients(loss, parameters)):
            total[i] = gradient if total[i] is None else total[i] if gradient is None else total[i] + gradient
    return tuple(total)


def freeze_unused(model: Any, batch: Batch) -> list[str]:
    """Freeze trainable parameters that have no gradient, and return their names: cross-attention without an encoder.

    Of experts, which see some tokens only, one may be without by chance: a parameter that has used siblings stays.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = reference_gradient(model, batch, batch["num_authors"] - 1, list(names))
    used = {name for name, gradient in zip(names.values(), found) if gradient is not None}
    of_siblings = {strip_expert_index(name) for name in used}
    unused = [p for p, name in names.items() if name not in used and strip_expert_index(name) not in of_siblings]
    for parameter in unused:
        parameter.requires_grad_(False)
    return [names[parameter] for parameter in unused]


def strip_expert_index(name: str) -> str:
    """Return the name with its last number left out, the same for all experts of a layer."""
    parts = name.split(".")
    place = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), len(parts))
    return ".".join([*parts[:place], *parts[place + 1 :]])


def check_engine(
    model: Any, clipping: str, batches: list[Batch], checkpointing: Optional[dict[str, Any]] = None
) -> tuple[float, set[Any]]:
    """Return the largest relative difference between the engine and a plain loop, and what the engine takes apart."""
    parameters = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {parameter: getattr(parameter, "summed_grad", None) for parameter in parameters}
    for parameter in parameters:
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    try:
        norms, apart = run_engine(model, clipping, 1.0, [batches[0], batches[-1]], None, checkpointing)
        kinds = {strip_expert_index(parameters[parameter]) for parameter in apart}  # other texts may reach other experts
        apart |= {parameter for parameter, name in parameters.items() if strip_expert_index(name) in kinds}
        clip_norm = float(norms[: len(COUNTS)].sort().values[-2:].mean())  # one author at least is clipped, and one is not
        worst = 0.0
        for batch in batches:
            for parameter in parameters:
                parameter.summed_grad.zero_()
            # As in training: what is taken apart comes in microbatches of one author.
            parts = single_authors(batch) if apart else [batch]
            norms, _ = run_engine(model, clipping, clip_norm, parts, apart, checkpointing)
            expected = (reference_gradient(model, batch, author, list(parameters)) for author in range(len(norms)))
            worst = max(
                worst, compare_to_reference(clipping, clip_norm, norms, expected, parameters, TOLERANCE * rounding(model))
            )
    finally:
        for parameter in parameters:
            parameter.grad, parameter.summed_grad = None, before[parameter]
    return worst, apart


def run_engine(
    model: Any, clipping: str, clip_norm: float, batches: list[Batch], apart: set | None, checkpointing: dict[str, Any] | None
) -> tuple[torch.Tensor, set[Any]]:
    """Run a new engine, and take it off: the plain loop is to see a plain model. Returns norms, and what it took apart."""
    with activation_checkpointing(model, checkpointing):
        engine = make_engine(model, clipping, clip_norm, checkpointing is not None)
        try:
            if isinstance(engine, GhostClipping) and apart is not None:
                engine.freeze_fallback(apart)
            norms = [backward_on_one_rank(engine, batch, turn) for turn, batch in enumerate(batches)]
        finally:
            engine.close()
    return torch.cat(norms), set(getattr(engine, "fallback_params", ()))


@contextmanager
def activation_checkpointing(model: Any, options: dict[str, Any] | None) -> Iterator[None]:
    """With the model's layers checkpointed as the Trainer does it; None: as the model is."""
    if options is None or model.is_activation_checkpointing:
        yield
        return
    of_transformers = {name: value for name, value in options.items() if name in TRANSFORMERS_MODULE}
    of_torch = {name: value for name, value in options.items() if name not in TRANSFORMERS_MODULE}
    with as_user_error("--activation_checkpointing does not work with this model: leave it out"):
        model.activation_checkpointing_enable(of_torch or None, **of_transformers)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def single_authors(batch: Batch) -> list[Batch]:
    parts = []
    for author in range(batch["num_authors"]):
        chosen = batch["author"] == author
        rows = {name: batch[name][chosen] for name in ("input_ids", "labels")}
        parts.append({**rows, "author": torch.zeros_like(batch["author"][chosen]), "num_authors": 1})
    return parts


def compare_to_reference(
    clipping: str,
    clip_norm: float,
    norms: torch.Tensor,
    expected: Iterable[tuple],
    parameters: dict[Any, str],
    tolerance: float,
) -> float:
    """Return the largest relative difference of norms and sums; raise UserError where it is more than rounding.

    One author's plain gradient is in memory at a time, and the sums are compared in the engine's own place.

    Args:
        clipping, clip_norm: the engine whose clipped sum is in `summed_grad`; overwritten by the difference.
        norms: (authors,), as it found them.
        expected: of each author, the plain gradient of each parameter.
        parameters: {parameter: name}.
        tolerance: of relative differences.
    """
    sums = {name: global_norm(parameter.summed_grad) for parameter, name in parameters.items()}
    whole = math.hypot(*sums.values())
    differences = {}
    for author, (norm, found) in enumerate(zip(norms.tolist(), expected)):
        gradients = [(parameter, gradient) for parameter, gradient in zip(parameters, found) if gradient is not None]
        size = math.hypot(*(global_norm(gradient) for _, gradient in gradients))
        differences[f"the norm of author {author + 1}"] = abs(norm - size) / size
        for parameter, gradient in gradients:
            parameter.summed_grad.sub_(gradient, alpha=min(1.0, clip_norm / size))
    left = {name: global_norm(parameter.summed_grad) for parameter, name in parameters.items()}
    differences["the clipped sum"] = math.hypot(*left.values()) / whole
    wrong = [name for name in left if not left[name] <= tolerance * sums[name] + NEGLIGIBLE * whole]
    worst = max(differences.values())
    if wrong or not worst < tolerance:
        named = ", ".join(wrong[:3] or [name for name, value in differences.items() if not value < tolerance][:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"--clipping {clipping} does not clip this model rightly: {named}{more} differ from a plain loop over authors (the "
            f"whole by {worst:.1e}); {alternative(clipping, parameters)}"
        )
    return worst


def alternative(clipping: str, parameters: Iterable[Any]) -> str:
    """Return what the user can do where an engine cannot clip these parameters."""
    if is_sharded(parameters):
        return FSDP_REMEDY
    return f"use --clipping {next(name for name in ENGINES if name != clipping)}, or --enable_lora"
