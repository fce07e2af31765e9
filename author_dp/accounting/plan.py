"""Compute the parameters of a run: sample rate, steps, noise multiplier and noise bands.

Guarantees: everything in a `PrivacyPlan` is public. It follows from options and the numbers of authors and samples alone. With
`hide_counts` it follows from options alone, except for these two numbers, which `to_public_dict` then leaves out.

Example:

    >>> plan = make_plan(privacy, args, offsets)
    >>> plan.event(steps=154)
    MechanismEvent(noise_multiplier=0.72, sample_rate=0.02, steps=154)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Optional

import numpy as np

from author_dp.accounting.accountant import find_noise_multiplier, round_down
from author_dp.accounting.banded_mf import BAND_CHOICES, choose_bands, prefix_sum_rmse, toeplitz_coefficients
from author_dp.accounting.events import MechanismEvent, check_delta, cyclic_event, cyclic_sample_rate, slot_event
from author_dp.accounting.slot_certificates import (
    MAX_SLOTS,
    CertificateClaim,
    choose_slot_bands,
    guess_slot_noise_multiplier,
    make_certificate,
    rough_slot_error,
    slot_segment_of,
)
from author_dp.errors import UserError
from author_dp.logs import get_logger
from author_dp.wording import format_count

logger = get_logger(__name__)

SAMPLINGS = ("poisson", "balls-in-bins")
WORTH_SLOTS = 0.9  # of the error with Poisson sampling: auto takes balls-in-bins sampling below it
MUCH_MORE_NOISE = 1.5  # noise multiplier of a resumed run over that before: the log warns


@dataclass(frozen=True)
class PrivacyPlan:
    """The public parameters of a run; privacy.json and the ledger's header repeat them.

    Attributes:
        steps: the number of steps that the noise is calibrated for.
        noise_bands: b, the number of steps over which the noise is correlated; 1 for independent noise.
        part_of_search: whether the run is one of many, of which only the best will be released (tuning.py).
        slots: n, the steps of an epoch in which each author takes part once, in a secret slot; None for Poisson sampling.
        certificate: of the noise with slots, from `slot_certificates.make_certificate`.
    """

    target_epsilon: Optional[float]
    delta: float
    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch_size: int
    steps: int
    num_authors: int
    num_samples: int
    samples_per_author: int
    clipping: str
    world_size: int
    disable_dp: bool
    hide_counts: bool = False
    noise_bands: int = 1
    part_of_search: bool = False
    slots: Optional[int] = None
    certificate: Optional[dict[str, Any]] = None

    @property
    def sampling(self) -> str:
        """The name of the sampling in privacy.json."""
        return "balls-in-bins" if self.slots else "poisson" if self.noise_bands == 1 else "cyclic-poisson"

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which an author is sampled once, on average."""
        return self.slots or math.ceil(1 / self.sample_rate)

    def event(self, steps: int) -> MechanismEvent:
        """Return the mechanism event of `steps` steps of one training; with slots, one that costs more."""
        if self.slots:
            return slot_event(self.noise_multiplier, self.slots, steps)
        return cyclic_event(self.noise_multiplier, self.sample_rate, steps, self.noise_bands)

    def coefficients(self) -> np.ndarray:
        """Return the band coefficients of a training, float64 (bands,)."""
        return toeplitz_coefficients(self.noise_bands, self.steps)

    def to_public_dict(self) -> dict[str, Any]:
        """Return the parameters that public files may hold."""
        public, hidden = asdict(self), ["num_authors", "num_samples"] if self.hide_counts else []
        if self.slots:
            hidden.append("sample_rate")  # no step is Poisson sampling at that rate: an older version must not account for it
        else:
            del public["slots"], public["certificate"]
        return public | dict.fromkeys(hidden)


def plan_of(header: dict[str, Any]) -> PrivacyPlan:
    """Return the plan in a ledger's header. With --hide_counts its numbers of authors and samples are None."""
    names = {field.name for field in fields(PrivacyPlan)}
    values = {name: value for name, value in header.items() if name in names}
    return PrivacyPlan(**values | ({"sample_rate": 1 / values["slots"]} if values.get("slots") else {}))


def make_plan(
    privacy: Any, args: Any, offsets: np.ndarray, earlier: Optional[dict[str, Any]] = None, max_bands: int = BAND_CHOICES[-1]
) -> PrivacyPlan:
    """Compute sample rate, steps and noise from options and data.

    Args:
        privacy: dp_utils.PrivacyArguments.
        args: transformers.TrainingArguments, not imported here because that takes `author_dp.ledger` a second.
        offsets: (authors + 1,), from `data_utils.group_by_author`.
        earlier: the header of the run to resume, if any. Its noise multiplier is kept unless one is given.
        max_bands: the largest number of noise bands that fits in memory.
    Raises:
        UserError: for fewer than two authors, a target that cannot be reached, or a delta that promises nothing.
    """
    num_authors = len(offsets) - 1
    if num_authors < 2:
        raise UserError("--author_column: the data have one author only, and no noise can hide one. Give data of many authors")
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sample_rate = privacy.sample_rate or min(1.0, batch_size / num_authors)
    slots = None if privacy.disable_dp else resolve_plan_slots(privacy, earlier, sample_rate)
    sample_rate = 1 / slots if slots else sample_rate
    steps = planned_steps(args, sample_rate, slots)
    delta = privacy.target_delta if privacy.target_delta is not None else 1 / num_authors
    bands = 1 if privacy.disable_dp else resolve_plan_bands(privacy, earlier, sample_rate, steps, delta, max_bands, slots)
    event = None if slots else cyclic_event(0.0, sample_rate, steps, bands)
    if earlier is None and plan_has_guarantee(privacy):  # a resumed run may be finished: `Budget.start` checks it when it trains
        check_delta([slot_event(0.0, slots, steps) if slots else MechanismEvent(0.0, sample_rate, steps)], delta)
    return PrivacyPlan(
        target_epsilon=None if privacy.disable_dp else privacy.target_epsilon,
        delta=delta,
        noise_multiplier=resolve_noise_multiplier(privacy, earlier, event, delta),
        clip_norm=math.inf if privacy.disable_dp else privacy.per_sample_max_grad_norm,
        sample_rate=sample_rate,
        expected_batch_size=batch_size,
        steps=steps,
        num_authors=num_authors,
        num_samples=int(offsets[-1]),
        samples_per_author=privacy.samples_per_author,
        clipping=privacy.clipping,
        world_size=args.world_size,
        disable_dp=privacy.disable_dp,
        hide_counts=privacy.hide_counts,
        noise_bands=bands,
        part_of_search=privacy.part_of_search,
        slots=slots,
    )


def certify_plan(plan: PrivacyPlan, runs: Sequence[tuple[dict[str, Any], int]], steps: int) -> PrivacyPlan:
    """Return a plan with slots, with noise that is certified for its target. It takes seconds, or minutes for a long epoch.

    Args:
        runs: header and steps of each run of the ledger.
        steps: that are left; none of a training that has ended, which keeps its noise.
    Raises:
        UserError: if no noise is enough, or an epoch has too many steps.
    """
    earlier = [(header, taken) for header, taken in runs if taken]
    if steps < 1:
        last = earlier[-1][0]
        return replace(plan, noise_multiplier=last["noise_multiplier"], certificate=last["certificate"])
    assert plan.slots is not None and plan.target_epsilon is not None
    segments = tuple(slot_segment_of(header, taken) for header, taken in earlier)
    claim = CertificateClaim(plan.coefficients(), plan.slots, steps, round_down(plan.target_epsilon), plan.delta, segments)
    logger.info(
        f"Certify the noise of {format_count(steps, 'step')} in {plan.slots:,} slots: seconds, or minutes for a long epoch."
    )
    certificate = make_certificate(claim, [(header["name"], taken) for header, taken in earlier])
    ratio = certificate["noise_multiplier"] / earlier[-1][0]["noise_multiplier"] if earlier else 1.0
    if ratio > MUCH_MORE_NOISE:
        logger.warning(
            f"--target_epsilon {plan.target_epsilon:g}: the steps in the ledger leave little of it, so the noise multiplier is "
            f"{ratio:.1f} times that before. Raise it, or use the model of the newest checkpoint."
        )
    return replace(plan, noise_multiplier=certificate["noise_multiplier"], certificate=certificate)


def planned_steps(args: Any, sample_rate: float, slots: Optional[int] = None) -> int:
    """Return the number of steps that --max_steps, or else --num_train_epochs, asks for."""
    if args.max_steps > 0:
        return args.max_steps
    if slots:
        return math.ceil(args.num_train_epochs * slots - 1e-9)
    return math.ceil(args.num_train_epochs / sample_rate * (1 - 1e-12))  # not one more, where this is a whole number, rounded


def check_planned_delta(privacy: Any, args: Any) -> None:
    """Raise UserError for a delta that promises nothing, where options alone tell, so that no data need be loaded."""
    rate, delta = privacy.sample_rate, privacy.target_delta
    is_poisson = privacy.sampling in (None, "poisson")
    if plan_has_guarantee(privacy) and is_poisson and not args.resume_from_checkpoint and rate is not None and delta is not None:
        check_delta([MechanismEvent(0.0, rate, planned_steps(args, rate))], delta)


def plan_has_guarantee(privacy: Any) -> bool:
    """Return whether a run claims any epsilon: --disable_dp and --noise_multiplier 0 do not."""
    return not privacy.disable_dp and privacy.noise_multiplier != 0


def choose_plan_sampling(privacy: Any, args: Any, num_authors: int, max_bands: int = BAND_CHOICES[-1]) -> str:
    """Return which sampling, poisson or balls-in-bins, has less noise in sums of updates: for --sampling auto.

    It takes seconds. The result depends on chance where both are nearly equal, so one process chooses for all.

    Args:
        num_authors: N; privacy, args, max_bands: as for `make_plan`.
    """
    if privacy.target_epsilon is None or privacy.part_of_search:
        return "poisson"
    offsets = np.arange(num_authors + 1)
    poisson = make_plan(replace(privacy, sampling="poisson"), args, offsets, None, max_bands)
    if 1 / poisson.sample_rate > MAX_SLOTS:
        return "poisson"
    in_slots = make_plan(replace(privacy, sampling="balls-in-bins"), args, offsets, None, max_bands)
    assert in_slots.slots is not None
    claim = CertificateClaim(np.ones(1), in_slots.slots, in_slots.steps, privacy.target_epsilon, in_slots.delta)
    error = poisson.noise_multiplier * prefix_sum_rmse(poisson.coefficients(), poisson.steps)
    # Errors are relative to the expected sum, which has fewer authors where 1 / q is no whole number.
    in_slots_error, _ = rough_slot_error(claim, in_slots.noise_bands, guess_slot_noise_multiplier(claim))
    in_slots_error *= poisson.sample_rate / in_slots.sample_rate
    return "balls-in-bins" if in_slots_error < WORTH_SLOTS * error else "poisson"


def check_plan_can_certify(privacy: Any) -> None:
    """Raise UserError where balls-in-bins sampling has no target that its certificate could be of, or is of a search."""
    if privacy.target_epsilon is None:
        raise UserError("--sampling balls-in-bins: its epsilon is certified for a target. Give --target_epsilon, and no noise")
    if privacy.part_of_search:
        raise UserError("--sampling balls-in-bins: a search needs Renyi differential privacy. Leave it out")


def resolve_plan_slots(privacy: Any, earlier: Optional[dict[str, Any]], sample_rate: float) -> Optional[int]:
    """Return n, the whole number of steps of an epoch with balls-in-bins sampling; None for Poisson sampling.

    1 / q is rounded up, so an author is in a step's batch with probability 1 / n, at most q.

    Raises:
        UserError: for another sampling than that of the run to resume, or as `check_plan_can_certify`.
    """
    asked = privacy.sampling
    if earlier is not None:
        before = "balls-in-bins" if earlier.get("slots") else "poisson"
        if asked not in (None, "auto", before):
            raise UserError(f"--sampling {asked}: the resumed run has {before}. Give that, or leave the option out")
        asked = before
    if asked != "balls-in-bins":
        return None
    check_plan_can_certify(privacy)
    slots = math.ceil(1 / sample_rate - 1e-9)
    if slots > MAX_SLOTS:
        raise UserError(
            f"--sampling balls-in-bins: an epoch of {slots:,} steps is too long to certify. Raise the batch options, so that it "
            f"has at most {MAX_SLOTS:,}; or use --sampling poisson"
        )
    return slots


def resolve_noise_multiplier(
    privacy: Any, earlier: Optional[dict[str, Any]], event: Optional[MechanismEvent], delta: float
) -> float:
    """Return --noise_multiplier, or that of the run to resume, or one calibrated to --target_epsilon; 0 without privacy.

    Args:
        event: the steps to calibrate for; its noise multiplier is ignored. None with slots: the result is nan until
            `certify_plan` replaces it.
    """
    if privacy.disable_dp:
        return 0.0
    if event is None:
        return math.nan
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if earlier is not None:
        return earlier["noise_multiplier"]
    return find_noise_multiplier(event.sample_rate, event.steps, privacy.target_epsilon, delta)


def resolve_plan_bands(
    privacy: Any,
    earlier: Optional[dict[str, Any]],
    sample_rate: float,
    steps: int,
    delta: float,
    max_bands: int,
    slots: Optional[int] = None,
) -> int:
    """Return --noise_bands as a number; a resumed run keeps the number it had.

    Raises:
        UserError: for another number than before, or too many.
    """
    asked = privacy.noise_bands
    if earlier is not None:
        before = earlier.get("noise_bands", 1)
        if asked not in (None, "auto", str(before)):
            raise UserError(f"--noise_bands {asked}: the resumed run has {before}. Give that number, or leave the option out")
        asked = str(before)
    if asked == "auto" and slots:
        return choose_slot_bands(CertificateClaim(np.ones(1), slots, steps, privacy.target_epsilon, delta), max_bands)
    if asked == "auto":
        return choose_bands(sample_rate, steps, privacy.target_epsilon, delta, max_bands)
    bands = int(asked or 1)
    cyclic_sample_rate(sample_rate, bands)  # raises if there are too many
    if bands > steps:
        raise UserError(f"--noise_bands {bands}: more than the {format_count(steps, 'step')} of the run. Lower it")
    return bands
