"""The mechanism, without any Trainer: DP-SGD whose privacy unit is the author.

Promise: the weights after each step are a function of the weights before it, of public numbers, and of
(sum of clipped per-author gradients + N(0, sigma^2 C^2 I)) / B over a Poisson sample of the authors [1, 2, 3]. That is what
accounting.py accounts for.

A step, in the order of this file:

1. every author enters the batch independently with probability q = B / N (Poisson sampling), and up to k of
   the author's samples are drawn, fresh each time and without replacement (`PoissonAuthorSampler`); with b noise bands
   groups take turns, and an author enters the batches of the own group with probability b q (bands.py);
2. author a's loss is the mean cross-entropy over a's own target tokens (`author_losses`);
3. g_a, the gradient of that loss, is clipped to norm C over all trainable parameters together and summed over
   the authors (an engine of `clipping`: `GhostClipping`, or `GradSampleClipping`, the plain reference);
4. the step is written to the ledger, then one draw of N(0, sigma^2 C^2 I) is added, the sum is divided by the
   constant B, and the optimizer takes it as its gradient (`AuthorDPOptimizer`).

References:
    [1] Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133 (the mechanism)
    [2] McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, arXiv 1710.06963 (users)
    [3] Charles et al. 2024, Fine-Tuning LLMs with User-Level Differential Privacy, arXiv 2407.07737 (user-level sampling)
"""

import inspect
import math
import secrets
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from opacus.optimizers import DPOptimizer
from torch import nn

from author_dp.accounting.accountant import cyclic_rate
from author_dp.accounting.banded_mf import BandedNoise
from author_dp.mechanism.adam_bc import NoiseCorrectedAdamW
from author_dp.mechanism.noise import NoiseSource

PAD = 4_096  # coordinates behind the parameters to which nobody contributes: what is released there is noise alone
IGNORED = -100  # label of a position that counts in no loss; cross_entropy's ignore_index

Batch = dict[str, Any]  # input_ids, labels, (samples, tokens); author, (samples,); num_authors

# --- step 1: which authors, which samples ---------------------------------------------------------------


class AuthorDraw(NamedTuple):
    """One step's batch, as one process sees it."""

    samples: list[np.ndarray]  # of each author in this process' share: the indices of the drawn samples
    batch_size: int  # authors in the whole draw, but for canaries. Private: never divide a gradient by it
    number: int  # of the sampler's draws, from 0


class PoissonAuthorSampler:
    """Draw the authors of each step, independently, and some samples of each.

    Guarantee: every author is in a step's draw with probability `sample_rate`, independently of the other
    authors, of the other steps and of --seed; empty draws are kept. With `groups`, draw t is of group t mod b alone, each author
    of it with probability b x `sample_rate`. This is the sampling that the accountant
    assumes. The processes share the key of the draw, so their shares are disjoint and together the whole draw.

    Args:
        offsets, indices: samples grouped by author, from `data_utils.group_by_author`.
        sample_rate: q.
        samples_per_author: k; an author with fewer samples gives them all.
        steps: number of draws of one iteration (an epoch); the next iteration goes on drawing afresh.
        key: 128 bits from the operating system, the same on all processes, new for each run.
        rank, world_size: which share of the draw is this process'.
        canaries: so many authors, the last ones, are no real ones (gradient_audit.py).
        groups: int (authors,), of each author, from `bands.deal`; the same on all processes. None: one group.
        bands: b, the number of groups.
    Attributes:
        on_draw: if set, called with each global draw, the places of its authors; an exception ends the run.
        on_share: if set, called with these, with the samples of this process' authors, and with the draw's number.
    Raises:
        UserError: for more bands than 1 / sample_rate.
        ValueError: for bands without groups.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        indices: np.ndarray,
        *,
        sample_rate: float,
        samples_per_author: int,
        steps: int,
        key: int,
        rank: int = 0,
        world_size: int = 1,
        canaries: int = 0,
        groups: Optional[np.ndarray] = None,
        bands: int = 1,
    ):
        if bands > 1 and (groups is None or len(groups) != len(offsets) - 1):
            raise ValueError("with several bands every author needs a group: all would be drawn in each step")
        self.offsets, self.indices = offsets, indices
        self.real = len(offsets) - 1 - canaries
        self.on_draw: Optional[Callable[[np.ndarray], None]] = None
        self.on_share: Optional[Callable[[np.ndarray, list[np.ndarray], int], None]] = None
        self.rate = cyclic_rate(sample_rate, bands)  # of the authors of one group
        self.groups = groups
        self.members = None if groups is None else [np.flatnonzero(groups == group) for group in range(bands)]
        self.draws = 0
        self.samples_per_author = samples_per_author
        self.steps = steps
        self.rank, self.world_size = rank, world_size
        self._authors_generator = np.random.Generator(np.random.Philox(key=key))
        self._samples_generator = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[AuthorDraw]:
        for _ in range(self.steps):
            yield self.draw()

    def draw(self) -> AuthorDraw:
        """Return the share of this process in a new draw."""
        authors = self.draw_authors()
        if self.on_draw is not None:
            self.on_draw(authors)
        share = self.draw_samples(authors[self.rank :: self.world_size])
        if self.on_share is not None:
            self.on_share(authors, share, self.draws)
        self.draws += 1
        return AuthorDraw(share, int((authors < self.real).sum()), self.draws - 1)

    def draw_authors(self) -> np.ndarray:
        """Return the authors of a new global draw, the same on every process."""
        if self.members is None:
            return self.draw_places(len(self.offsets) - 1)
        members = self.members[self.draws % len(self.members)]
        return members[self.draw_places(len(members))]

    def draw_places(self, number: int) -> np.ndarray:
        """Return which of so many are in, each with probability `rate`, ascending."""
        drawn = []
        last = -1  # the last one drawn
        while last < number:
            # Of independent draws the gaps between those that are in are geometric; somewhat more of them than are expected.
            expected = (number - 1 - last) * self.rate
            gaps = self._authors_generator.geometric(self.rate, int(expected + 4 * math.sqrt(expected)) + 16)
            places = last + np.cumsum(np.minimum(gaps, number + 1))
            drawn.append(places)
            last = places[-1]
        places = np.concatenate(drawn)
        return places[places < number]

    def draw_samples(self, authors: np.ndarray) -> list[np.ndarray]:
        """Return for each author min(k, all) sample indices, uniformly and without replacement."""
        counts = self.offsets[authors + 1] - self.offsets[authors]
        owners = np.repeat(np.arange(len(authors)), counts)
        starts = np.cumsum(counts) - counts
        # A random order within each author; its first k are the draw.
        order = np.lexsort((self._samples_generator.random(len(owners)), owners))
        place = np.arange(len(owners)) - starts[owners]
        chosen = place < self.samples_per_author
        samples = self.indices[(self.offsets[authors][owners] + order - starts[owners])[chosen]]
        taken = np.minimum(counts, self.samples_per_author)
        return np.split(samples, np.cumsum(taken)[:-1]) if len(authors) else []


# --- step 2: per-author loss ----------------------------------------------------------------------------


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token, a few rows at a time: of the size of the logits there is only their gradient.

    Call apply(logits, targets), (tokens, vocabulary) and (tokens,), for float32 losses (tokens,), 0 where ignored.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = TokenLosses.rows_at_once(logits)
        normalizers = torch.cat([part.float().logsumexp(1) for part in logits.split(rows)])
        ctx.save_for_backward(logits, targets, normalizers)
        picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
        return torch.where(targets == IGNORED, 0.0, normalizers - picked)

    @staticmethod
    def backward(ctx, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        """weight x (softmax - one-hot), in the logits' type."""
        logits, targets, normalizers = ctx.saved_tensors
        rows = TokenLosses.rows_at_once(logits)
        weights = torch.where(targets == IGNORED, 0.0, weights)[:, None]
        gradient = torch.empty_like(logits)
        parts = (tensor.split(rows) for tensor in (logits, targets[:, None], normalizers[:, None], weights, gradient))
        for logit, target, normalizer, weight, result in zip(*parts):
            part = torch.sub(logit, normalizer, out=result if result.dtype == torch.float32 else None).exp_().mul_(weight)
            result.copy_(part.scatter_add_(1, target.clamp(min=0), -weight))  # nothing to copy where they are one
        return gradient, None

    @staticmethod
    def rows_at_once(logits: torch.Tensor) -> int:
        """What stays in a CPU's cache; on a GPU 256 MB, to launch few kernels."""
        return max(1, (2**20 if logits.device.type == "cpu" else 2**26) // logits.shape[1])


def token_losses(model: nn.Module, batch: Batch, needs_positions: Optional[bool] = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each next token's cross-entropy, float32 (samples, tokens), 0 without a target; and bool, where there is one."""
    input_ids = batch["input_ids"]
    inputs = {"input_ids": input_ids}
    if takes_positions(model) if needs_positions is None else needs_positions:
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    logits = model(**inputs).logits  # (samples, tokens, vocabulary)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # (samples, tokens): what comes next
    losses = TokenLosses.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    return losses, targets != IGNORED


def author_losses(model: nn.Module, batch: Batch, needs_positions: Optional[bool] = None) -> torch.Tensor:
    """Return each author's mean cross-entropy over the author's own target tokens.

    Guarantee: an entry depends on that author's samples only. The model's built-in loss does not give this: it
    is a mean over the tokens of the batch, so one author's gradient would depend on the others' token counts.

    Args:
        batch: input_ids, labels (samples, tokens), labels -100 where nothing is predicted; author (samples,), num_authors.
        needs_positions: whether to give the model position_ids; None: as `takes_positions` says.
    Returns:
        losses, float32 (authors,); 0 for an author without target tokens.
    """
    losses, counted = token_losses(model, batch, needs_positions)
    # From (samples, tokens) to (authors,).
    authors = torch.zeros(batch["num_authors"], device=losses.device)
    totals = authors.index_add(0, batch["author"], losses.sum(1))
    counts = authors.index_add(0, batch["author"], counted.sum(1).float())
    return totals / counts.clamp(min=1)


def takes_positions(model: nn.Module) -> bool:
    """Whether `author_losses` is to give the model position_ids: 0, 1, 2, ... for each sample.

    Only where that changes nothing but their shape: GPT-2's own have batch size 1, in which no per-sample gradient can be told
    apart. Found by two calls on a few tokens, once a model; a model whose own positions are others keeps them (RoBERTa's).
    """
    while hasattr(model, "_module") or hasattr(model, "get_base_model"):
        model = model._module if hasattr(model, "_module") else model.get_base_model()  # type: ignore[assignment, operator]
    if model not in _takes_positions:
        _takes_positions[model] = _shares_positions(model)
    return _takes_positions[model]


_takes_positions: MutableMapping[nn.Module, bool] = weakref.WeakKeyDictionary()


def _shares_positions(model: Any) -> bool:
    words = getattr(model, "get_input_embeddings", lambda: None)()
    tables = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.weight.requires_grad]
    tables = [table for table in tables if table is not words]
    if not tables or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.tensor([[3, 1, 4], [2, 5, 3]], device=tables[0].weight.device)
    shared: list[bool] = []
    hooks = [t.register_forward_hook(lambda _, args, __: shared.append(args[0].shape != ids.shape)) for t in tables]
    try:
        with at_rest(model), torch.no_grad():
            own = model(input_ids=ids).logits
            if not any(shared):
                return False
            given = model(input_ids=ids, position_ids=torch.arange(3, device=ids.device).expand_as(ids)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return torch.equal(own, given) or bool((own - given).norm() < 1e-5 * own.norm())


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout; the modes of the model and the random generators are as before, afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True


# --- step 3, the clipping, is in clipping/ --------------------------------------------------------------


# --- step 4: noise and update ---------------------------------------------------------------------------


class AuthorDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer for gradients that a clipping engine has already clipped and summed over authors.

    Guarantee: what reaches the wrapped optimizer is (sum of clipped gradients + N(0, sigma^2 C^2 I)) / B, the sum
    taken over the whole draw and the noise drawn once per step, whatever the number of processes and
    microbatches: each process adds an independent share of variance sigma^2 C^2 / world_size, then all are summed.
    A summed gradient is used once. The step of an empty draw is noise. With `begin`, noise is correlated over steps (bands.py),
    and each process adds all of it in its slice of the coordinates, the sums of the others coming without any.

    The engine adds to `parameter.summed_grad`, float32 and of the parameter's shape; these lie one after another in
    one buffer, `sums`, so that noise and processes each take one pass. Behind them, `PAD` coordinates belong to no parameter:
    there is nothing but noise, by which a run can check itself (selfcheck.py). A step is:
    1) `before_release` is called, which records the step in the ledger (on the first process)
    2) the noise share is added to this process' sum of clipped gradients, and it is divided by the constant B
    3) the processes' buffers are summed: none can go on before all have done 1)
    4) `after_release` is given what was released in the pad, and the wrapped optimizer updates the parameters
    5) `zero_grad` makes the sums zero; without it there is no further step

    Args:
        optimizer: the wrapped torch optimizer.
        noise_multiplier: sigma.
        clip_norm: C.
        expected_batch_size: B, in authors.
        before_release: called at the start of every step; an exception prevents the step.
        after_release: called with the released pad, flat, before the update; an exception prevents it.
        canaries: whose `table.weight` is clipped and noised behind the pad, and never updated (gradient_audit.py).
        secure_noise: harden the noise (`NoiseSource`).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        expected_batch_size: int,
        before_release: Callable[[], None],
        after_release: Optional[Callable[[torch.Tensor], None]] = None,
        canaries: Any = None,
        secure_noise: bool = False,
    ):
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=expected_batch_size,
        )
        self.before_release, self.after_release = before_release, after_release
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.noise = NoiseSource(self.params[0].device, secure_noise)
        self.bands: Optional[BandedNoise] = None
        self.draw: Optional[int] = None  # whose clipped gradients are in the sums, where that matters: AuthorDraw.number
        self._used = False
        self.lay_out(canaries)

    def lay_out(self, canaries: Any) -> None:
        """Give every parameter its place in the sums."""
        behind = [] if canaries is None else [canaries.table.weight]
        sizes = [*(parameter.numel() for parameter in self.params), PAD + sum(c.numel() for c in behind)]
        self.sums = torch.zeros(sum(sizes), device=self.params[0].device)
        *views, self.pad = self.sums.split(sizes)
        for parameter, view in zip(self.params, views):
            parameter.summed_grad = view.view_as(parameter)
        for parameter in behind:
            parameter.summed_grad = self.pad[PAD:].view_as(parameter)

    def begin(self, coefficients: np.ndarray) -> None:
        """Begin a training: the noise of what follows is by these band coefficients, (bands,), with nothing before it.

        Raises:
            ValueError: for coefficients of norm above 1, by which an author would add more than is accounted for.
        """
        if not np.linalg.norm(coefficients) <= 1:
            raise ValueError(f"band coefficients {coefficients} must have norm 1")
        self._slice = self.own_slice()
        several = len(coefficients) > 1 and self.noise_multiplier > 0
        self.bands = BandedNoise(coefficients, len(self._slice), self.sums.device) if several else None

    def own_slice(self) -> torch.Tensor:
        """Return the part of the sums to which this process adds the whole of the noise where noise has bands."""
        return self.sums.tensor_split(self.world_size)[dist.get_rank() if dist.is_initialized() else 0]

    def check_sums(self) -> None:
        """Raise RuntimeError where the sums are not those of the draw whose turn it is."""
        if self._used:
            raise RuntimeError("the summed gradients were used in the last step: call zero_grad before the next one")
        if self.bands is not None and self.draw != self.bands.steps:
            raise RuntimeError(
                f"step {self.bands.steps} with noise bands takes the draw of that number, not {self.draw}: after a draw that was "
                "thrown away, authors would come back too early"
            )

    def pre_step(self, closure: Optional[Callable] = None) -> bool:
        """Steps 1 to 3 of the class' list, and the check of the fourth. Overrides Opacus', which would clip here."""
        self.check_sums()
        self.before_release()
        self._used = True
        std = self.noise_multiplier * self.max_grad_norm / math.sqrt(self.world_size)
        if self.bands is not None:
            self.bands.add_(self._slice, self.noise, std * math.sqrt(self.world_size))
            std = 0.0
        for part in self.sums.split(self.noise.elements):  # while it is in the cache
            if std > 0:
                self.noise.add_(part, std)
            part.div_(self.expected_batch_size)
        if self.world_size > 1:
            dist.all_reduce(self.sums)
        if self.after_release is not None:
            self.after_release(self.pad)
        self.hand_over()
        return True

    def hand_over(self) -> None:
        """Give the wrapped optimizer what was released, and where it wants to know, how noisy that is."""
        if isinstance(self.original_optimizer, NoiseCorrectedAdamW):
            self.original_optimizer.noise_variance = self.released_variance()
        for parameter in self.params:
            parameter.grad = parameter.summed_grad

    def released_variance(self) -> float:
        """Return the variance of the noise in each coordinate of what the last step released."""
        scale = 1.0 if self.bands is None else self.bands.variance
        return scale * (self.noise_multiplier * self.max_grad_norm / self.expected_batch_size) ** 2

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's gradients. Overrides Opacus', which would take the sums' places away."""
        self.original_optimizer.zero_grad(set_to_none)
        self.sums.zero_()
        self._used, self.draw = False, None
