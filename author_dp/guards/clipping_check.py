"""Compare a clipping engine with a reference loop over authors, on the user's own model.

Guarantees: on a model that passes, the engine's norms and clipped sum equal those of the reference, to rounding, and an author
whose values are not finite does not change those of others. The reference calls ordinary autograd on each sample alone, unpadded.

The texts are random tokens: a few authors with several ragged samples each. At least one author is clipped, and one is not.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch

from author_dp.clipping import ENGINES
from author_dp.clipping.ghost import GhostClipping
from author_dp.errors import UserError
from author_dp.guards.precision import precision_tolerance_factor
from author_dp.guards.probing import model_errors_as_user_error, random_tokens
from author_dp.mechanism.fsdp import FSDP_REMEDY, autograd_gradients, global_norm, is_sharded
from author_dp.mechanism.fsdp_clipping import backward_on_one_rank, make_engine
from author_dp.types import IGNORE_INDEX, Batch
from author_dp.wording import format_names

TOLERANCE = 5e-4  # relative error of an author's norm, and of a parameter's clipped sum, that rounding may cause in a deep model
NEGLIGIBLE = 1e-5  # of the norm of the clipped sum: a parameter below it may be nothing but rounding (biases of keys)
SAMPLES_PER_AUTHOR = (1, 2, 4)  # of the compared authors: seven samples, so that neither heads nor experts are as many
MAX_SHOWN_NAMES = 3  # parameters named in an error

TRANSFORMERS_MODULE = {"every_n_layers", "offload"}  # of --activation_checkpointing_kwargs; the others are torch's


def make_clipping_check_batch(model: Any, max_len: int, samples_per_author: tuple[int, ...] = SAMPLES_PER_AUTHOR) -> Batch:
    """Return a microbatch of random tokens, with ragged samples of up to `max_len` tokens.

    Args:
        samples_per_author: number of samples of each author.
    """
    num_samples = sum(samples_per_author)
    lengths = [max_len, *(2 + (3 * i) % (max_len - 1) for i in range(1, num_samples))]
    ids = random_tokens(model, num_samples * max_len, 10 + max_len).view(num_samples, max_len)
    is_token = torch.arange(max_len, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    author = torch.arange(len(samples_per_author)).repeat_interleave(torch.tensor(samples_per_author)).to(ids.device)
    batch = {"input_ids": ids.where(is_token, 0), "labels": ids.where(is_token, IGNORE_INDEX), "author": author}
    return {**batch, "num_authors": len(samples_per_author)}


def split_clipping_batch(batch: Batch) -> list[Batch]:
    """Return a microbatch for each author of a microbatch."""
    microbatches = []
    for author in range(batch["num_authors"]):
        rows = batch["author"] == author
        tensors = {name: batch[name][rows] for name in ("input_ids", "labels")}
        microbatches.append({**tensors, "author": torch.zeros_like(batch["author"][rows]), "num_authors": 1})
    return microbatches


# --- the reference --------------------------------------------------------------------------------------


def reference_gradient(model: Any, batch: Batch, author: int, parameters: list[Any]) -> tuple[torch.Tensor | None, ...]:
    """Return one author's gradient by ordinary autograd, each sample alone and unpadded; None for unused parameters."""
    rows = [batch["input_ids"][i][batch["labels"][i] != IGNORE_INDEX] for i in (batch["author"] == author).nonzero()[:, 0]]
    num_targets = sum(len(row) - 1 for row in rows)
    total: list[Any] = [None] * len(parameters)
    for row in rows:
        log_probabilities = model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1)
        loss = -log_probabilities.gather(1, row[1:, None]).sum() / num_targets
        for i, gradient in enumerate(autograd_gradients(loss, parameters)):
            total[i] = gradient if total[i] is None else total[i] if gradient is None else total[i] + gradient
    return tuple(total)


def freeze_unused(model: Any, batch: Batch) -> list[str]:
    """Freeze trainable parameters that the loss does not use, and return their names.

    Cross-attention without an encoder is one example. An expert sees some tokens only, and may have no gradient by chance: it
    stays trainable if the loss uses another expert of its layer.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = reference_gradient(model, batch, batch["num_authors"] - 1, list(names))
    used = {name for name, gradient in zip(names.values(), gradients) if gradient is not None}
    used_layers = {strip_expert_index(name) for name in used}
    unused = [p for p, name in names.items() if name not in used and strip_expert_index(name) not in used_layers]
    for parameter in unused:
        parameter.requires_grad_(False)
    return [names[parameter] for parameter in unused]


def strip_expert_index(name: str) -> str:
    """Return a parameter's name without its last number, the same for all experts of a layer."""
    parts = name.split(".")
    index = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), len(parts))
    return ".".join([*parts[:index], *parts[index + 1 :]])


# --- the engine -----------------------------------------------------------------------------------------


def check_engine(
    model: Any, clipping: str, batches: list[Batch], checkpointing: Optional[dict[str, Any]] = None, bf16: bool = False
) -> tuple[float, set[Any]]:
    """Compare the engine with the reference on microbatches.

    Args:
        clipping: the engine's name in ENGINES.
        batches: several authors each; the last one may be longer.
        checkpointing: as in `activation_checkpointing`.
        bf16: whether the run uses autocast. On a GPU the engine then has to run under it, too, where other kernels compute.
    Returns:
        the largest relative error, and the parameters that the engine clips one author at a time.
    Raises:
        UserError: naming the parameters that differ.
    """
    parameters = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with temporary_clipped_sums(parameters):
        norms, fallback = run_engine(model, clipping, 1.0, [batches[0], batches[-1]], None, checkpointing)
        layers = {strip_expert_index(parameters[parameter]) for parameter in fallback}  # other texts may reach other experts
        fallback |= {parameter for parameter, name in parameters.items() if strip_expert_index(name) in layers}
        # Between the two largest norms of the first microbatch: at least one author is clipped, and one is not.
        clip_norm = float(norms[: len(SAMPLES_PER_AUTHOR)].sort().values[-2:].mean())
        max_error = 0.0

        def run(microbatches: list[Batch]) -> torch.Tensor:
            return run_engine(model, clipping, clip_norm, microbatches, fallback, checkpointing)[0]

        for batch in batches:
            for parameter in parameters:
                parameter.summed_grad.zero_()
            # As in training: fallback parameters come with microbatches of one author.
            microbatches = split_clipping_batch(batch) if fallback else [batch]
            norms = run(microbatches)
            expected = (reference_gradient(model, batch, author, list(parameters)) for author in range(len(norms)))
            tolerance = TOLERANCE * precision_tolerance_factor(model)
            max_error = max(max_error, compare_clipping_to_reference(clipping, clip_norm, norms, expected, parameters, tolerance))
        with torch.autocast(next(iter(parameters)).device.type, torch.bfloat16, enabled=bf16):
            if not fallback:
                check_clipping_of_non_finite(model, clipping, batches[0], bf16, lambda: run(batches[:1]))
            elif bf16:
                run(split_clipping_batch(batches[0])[:1])
    return max_error, fallback


def check_clipping_of_non_finite(model: Any, clipping: str, batch: Batch, bf16: bool, compute_norms: Callable[[], Any]) -> None:
    """Raise UserError if an author whose values are nan changes another author's norm, or reaches the clipped sum.

    A kernel that multiplies by zero what lies beyond its row would do so, and nan stays nan.

    Args:
        compute_norms: runs the engine on `batch` and returns its norms, (authors,).
    """
    expected, rtol = compute_norms().cpu(), TOLERANCE * precision_tolerance_factor(model) * (100 if bf16 else 1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parity in (1, 0):  # the author in the middle, then the first and the last one
        broken = torch.arange(batch["num_authors"]) % 2 == parity
        with nan_embeddings(model, broken.to(batch["author"].device)[batch["author"]]):
            norms = compute_norms().cpu()
        is_equal = torch.allclose(norms[~broken], expected[~broken], rtol=rtol, atol=0)
        if not is_equal or not all(math.isfinite(global_norm(parameter.summed_grad)) for parameter in parameters):
            remedy = "Leave out --bf16" if bf16 else clipping_remedy(clipping, parameters)
            raise UserError(f"--clipping {clipping}: an author whose gradient is not finite reaches other authors. {remedy}")


@contextmanager
def nan_embeddings(model: Any, is_broken: torch.Tensor) -> Iterator[None]:
    """Make the token embeddings of some samples nan.

    Args:
        is_broken: bool (samples,). Other microbatches, such as another process' dummy, stay as they are.
    """

    def replace(_: Any, __: Any, embeddings: torch.Tensor) -> torch.Tensor:
        if len(embeddings) != len(is_broken):
            return embeddings
        return embeddings.masked_fill(is_broken[:, None, None], torch.nan)

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def temporary_clipped_sums(parameters: Iterable[Any]) -> Iterator[None]:
    """Give the parameters a `summed_grad` of zeros; restore what they had."""
    before = {parameter: getattr(parameter, "summed_grad", None) for parameter in parameters}
    for parameter in before:
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    try:
        yield
    finally:
        for parameter, summed_grad in before.items():
            parameter.grad, parameter.summed_grad = None, summed_grad


def run_engine(
    model: Any, clipping: str, clip_norm: float, batches: list[Batch], fallback: Optional[set], checkpointing: Optional[dict]
) -> tuple[torch.Tensor, set[Any]]:
    """Run a new engine on the microbatches and remove it, as the reference needs a model without hooks.

    Args:
        fallback: the parameters to clip one author at a time; None lets the engine find them.
    Returns:
        norms (authors of all microbatches,), and the fallback parameters.
    """
    with activation_checkpointing(model, checkpointing):
        engine = make_engine(model, clipping, clip_norm, checkpointing is not None)
        try:
            if isinstance(engine, GhostClipping) and fallback is not None:
                engine.freeze_fallback(fallback)
            norms = [backward_on_one_rank(engine, batch, rank) for rank, batch in enumerate(batches)]
        finally:
            engine.close()
    return torch.cat(norms), set(engine.fallback_params) if isinstance(engine, GhostClipping) else set()


@contextmanager
def activation_checkpointing(model: Any, options: Optional[dict[str, Any]]) -> Iterator[None]:
    """Checkpoint the model's layers as the Trainer does.

    Args:
        options: --activation_checkpointing_kwargs; None leaves the model as it is.
    """
    if options is None or model.is_activation_checkpointing:
        yield
        return
    for_transformers = {name: value for name, value in options.items() if name in TRANSFORMERS_MODULE}
    for_torch = {name: value for name, value in options.items() if name not in TRANSFORMERS_MODULE}
    with model_errors_as_user_error("--activation_checkpointing: this model does not support it. Leave it out"):
        model.activation_checkpointing_enable(for_torch or None, **for_transformers)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


# --- the comparison -------------------------------------------------------------------------------------


def compare_clipping_to_reference(
    clipping: str, clip_norm: float, norms: torch.Tensor, expected: Iterable[tuple], parameters: dict[Any, str], tolerance: float
) -> float:
    """Return the largest relative error of norms and clipped sum; subtract the reference from the sum in place.

    So one author's reference gradient is in memory at a time.

    Args:
        clipping, clip_norm: the engine whose clipped sum is in `summed_grad`.
        norms: (authors,), of the engine.
        expected: for each author, the reference gradient of each parameter.
        parameters: {parameter: name}.
        tolerance: of relative errors.
    Raises:
        UserError: where an error is more than rounding.
    """
    sums = {name: global_norm(parameter.summed_grad) for parameter, name in parameters.items()}
    total = math.hypot(*sums.values())
    errors = {}
    for author, (norm, of_author) in enumerate(zip(norms.tolist(), expected), start=1):
        gradients = [(parameter, gradient) for parameter, gradient in zip(parameters, of_author) if gradient is not None]
        expected_norm = math.hypot(*(global_norm(gradient) for _, gradient in gradients))
        errors[f"the norm of author {author}"] = abs(norm - expected_norm) / expected_norm
        for parameter, gradient in gradients:
            parameter.summed_grad.sub_(gradient, alpha=min(1.0, clip_norm / expected_norm))
    residuals = {name: global_norm(parameter.summed_grad) for parameter, name in parameters.items()}
    errors["the clipped sum"] = math.hypot(*residuals.values()) / total
    max_error = max(errors.values())
    wrong = [name for name in residuals if not residuals[name] <= tolerance * sums[name] + NEGLIGIBLE * total]
    if wrong := wrong or [name for name, error in errors.items() if not error < tolerance]:
        raise UserError(
            f"--clipping {clipping}: {format_names(wrong, MAX_SHOWN_NAMES)} differ from the reference loop over authors (max. "
            f"relative error {max_error:.1e}), so this model would be clipped wrongly. {clipping_remedy(clipping, parameters)}"
        )
    return max_error


def clipping_remedy(clipping: str, parameters: Iterable[Any]) -> str:
    """Return what the user can do where an engine cannot clip these parameters."""
    if is_sharded(parameters):
        return FSDP_REMEDY.capitalize()
    return f"Use --clipping {next(name for name in ENGINES if name != clipping)}, or --enable_lora"
