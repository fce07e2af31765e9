"""Ghost clipping with book-keeping: per-author clipping at nearly the speed and memory of ordinary training.

Promise: the same clipped sums as a plain loop over authors, to rounding, from one forward and one backward, without storing
per-author gradients, but where they are smaller than what they are made of. A tap behind each trained layer hands its inputs and
output gradients to the layer's rule (rules.py); what the rule returns knows its norms and its clipped sum (contributions.py).
Autograd is asked for the gradients of the layers' outputs only, which spares it the ordinary weight gradients.

Whatever no rule follows (a mixer's own parameters, the weights of experts, a layer that hides its samples) is taken author by
author: the ordinary gradient of one author's loss, which is exact whatever the layer does. In a microbatch of one author that
costs nothing more; with several, a backward for each. `apart` names these parameters, for whoever cuts the microbatches.

Example:

    >>> engine = GhostClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679 (ghost norm)
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

import functools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.author_groups import AuthorIndex
from author_dp.clipping.grad_factors import (
    GradFactors,
    MaterializedGrad,
    mask_authors,
    merge_factors,
    squared_norms,
    total_squared_norms,
)
from author_dp.clipping.layer_rules import conv1d, embedding, linear, rule_for, vmap_rule
from author_dp.errors import UserError

MATRIX_LAYERS = {linear, conv1d, embedding}  # rules whose contributions to one matrix add up, from whichever layers they come
SAVE_NO_OUTPUT = (nn.Linear, nn.LayerNorm, Conv1D)  # their backward does not look at what they returned
EXPERT_LAYERS = r"experts\.\d+\."


class CaptureGrad(torch.autograd.Function):
    """Change nothing; in the backward pass, hand a layer's inputs and output gradient to the engine.

    The inputs are saved as autograd saves its own, so gradient checkpointing drops and recomputes them as it does those.
    """

    @staticmethod
    def forward(
        ctx, output: torch.Tensor, anchor: torch.Tensor, collect: Callable, copy: bool, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        ctx.collect = collect
        # No view, which must not be changed in place as CTRL, Falcon and Llama 4 do; the same memory where no one saved it.
        return output.clone() if copy else torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        inputs = ctx.saved_tensors
        ctx.collect(inputs, gradient)
        return gradient, None, None, None, *[None] * len(inputs)


class GhostClipping:
    """Clip per-author gradients without storing large ones.

    Guarantee: each call adds to every `parameter.summed_grad` a sum over authors in which each author has L2 norm
    at most `clip_norm`, to rounding, over all trainable parameters together; tied embeddings count once, as the sum
    of their uses. An author whose gradient is not finite contributes zero. `norms` and the sums are not private.

    Args:
        model: its trainable parameters are clipped. Samples are along its inputs' first dimension, tokens along the second.
        clip_norm: C.
    Attributes:
        apart: the parameters that are taken author by author; what no rule follows joins them when that shows.
    """

    def __init__(self, model: nn.Module, clip_norm: float):
        self.module, self.clip_norm = model, clip_norm
        self.parameters: dict[Any, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        owners: dict[Any, list] = defaultdict(list)
        for name, layer in model.named_modules():
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    owners[parameter].append((name, layer))
        self._rules: dict[nn.Module, Any] = {}
        self.apart: set[Any] = set()
        behind = [re.escape(n) for n, m in model.named_modules() if n.endswith("lora_magnitude_vector") and any(m.children())]
        # DoRA subtracts its layer's bias once more, behind the tap; experts see some tokens only, in an order of their own.
        unfit = re.compile("|".join([EXPERT_LAYERS, *(name.replace("lora_magnitude_vector", "base_layer") for name in behind)]))
        for parameter, uses in owners.items():
            # A head may hold its layer's bias once more, under a name of its own.
            uses = [(n, layer) for n, layer in uses if not any(other.startswith(f"{n}.") for other, _ in uses)]
            rules = {rule_for(layer) for _, layer in uses}
            self._rules |= {layer: rule_for(layer) for _, layer in uses}
            add_up = None not in rules and (len(uses) == 1 or rules <= MATRIX_LAYERS)
            if not add_up or any(unfit.search(f"{n}.") for n, _ in uses):
                self.apart.add(parameter)
        self._trained = {layer: {p for p in layer.parameters(recurse=False) if p.requires_grad} for layer in self._rules}
        # Of a model in shares, a layer holds others while it runs: they are known by their names.
        self._named = {
            layer: {n: p for n, p in layer.named_parameters(recurse=False) if p in own} for layer, own in self._trained.items()
        }
        self.tied = {parameter for parameter, uses in owners.items() if len(uses) > 1}
        self._settled = False
        # Every tap has this leaf as an input: what autograd must visit to reach it are the taps, and no weight.
        self._anchor = torch.zeros((), requires_grad=True, device=next(iter(self.parameters)).device)
        self._contributions: dict[nn.Parameter, list[GradFactors]] = defaultdict(list)
        self._authors: AuthorIndex | None = None  # while taps are to collect
        self._collected = (0, 0)  # samples and tokens of what they collect
        self._given, self._in_rule = torch.zeros(0, 0), False  # the last forward's input ids, (samples, tokens)
        self._hooks: list[Any] = [layer.register_forward_hook(self._tap, with_kwargs=True) for layer in self._rules]
        self._hooks.append(model.register_forward_pre_hook(self._remember_inputs, with_kwargs=True))

    def settle(self, apart: set[Any]) -> None:
        """Take these parameters apart, as another engine found on this model, and from now on no others."""
        self.apart, self._settled = self.apart | apart, True

    def _remember_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled() and given is not None:
            self._given = given.detach()

    def _tap(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._in_rule or not torch.is_grad_enabled() or self._trained[layer] <= self.apart:
            return output
        rule, collect = self._rules[layer], functools.partial(self._collect, layer, self._given)
        inputs = [value.detach() for value in args if isinstance(value, torch.Tensor)]
        if rule is embedding:  # OPT computes its positions inside the layer: take what was really looked up
            lookup = find_lookup(output)
            if lookup is None or lookup._saved_padding_idx != (2**64 - 1 if layer.padding_idx is None else layer.padding_idx):
                return self._fall_back(layer, output)
            if lookup is not output.grad_fn:
                collect = functools.partial(self._collect, layer, self._given, behind=(GradientEdge(lookup, 0), output))
            ids, (samples, tokens) = lookup._saved_indices, self._given.shape[:2]
            if ids.shape == (1, tokens) and lookup is output.grad_fn:  # positions that all samples share
                output, ids = output.expand(samples, -1, -1), ids.expand(samples, -1)
            return CaptureGrad.apply(output, self._anchor, collect, True, ids)
        plain = isinstance(output, torch.Tensor) and not kwargs and len(inputs) == len(args)
        if not plain or (rule is not vmap_rule and len(inputs) > 1):
            return self._fall_back(layer, output)
        if not output.requires_grad:
            return output
        if isinstance(layer, nn.Linear | Conv1D):
            inputs = [inputs[0].to(output.dtype)]  # as autocast does inside the layer
        return CaptureGrad.apply(output, self._anchor, collect, type(layer) not in SAVE_NO_OUTPUT, *inputs)

    def _fall_back(self, layer: nn.Module, output: Any = None) -> Any:
        """Take the layer's parameters apart from here on."""
        if self._settled:
            raise UserError(
                f"--clipping ghost: a {type(layer).__name__} is called otherwise than in the check at the start: use "
                "--clipping grad_sample, or --enable_lora"
            )
        self.apart |= self._trained[layer]
        return output

    def backward(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """Backpropagate one microbatch, clip, and add to `summed_grad`.

        Args:
            losses: (authors,), attached to the graph of `self.module`.
            author: int64 (samples,), ascending, the author of each sample.
        Returns:
            norms before clipping, (authors,); inf for an author who contributes nothing.
        """
        with torch.autocast(losses.device.type, enabled=False):  # around a call it would round what is clipped
            return self._clip(losses, author)

    def _clip(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """As `backward`, in float32."""
        self._contributions.clear()
        authors = AuthorIndex(author, len(losses))
        known = self._single_author_params(authors)
        found = self._backward(losses, authors, known, retain_graph=not self._settled or (bool(self.apart) and not known))
        apart = self._find_fallback(losses, self._contributions)
        contributions = {p: merge_factors(self._contributions.pop(p, []), authors) for p in self.parameters if p not in apart}
        contributions |= {
            p: [MaterializedGrad(gradient.float()[None])] for p, gradient in zip(known, found) if gradient is not None
        }
        norms = total_norms([total_squared_norms(parts, authors) for parts in contributions.values() if parts], losses)
        if apart and not known:
            norms = self._clip_fallback(losses, norms, [p for p in self.parameters if p in apart])
        factors = (self.clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||), (authors,)
        non_finite = None if norms.isfinite().all() else ~norms.isfinite()
        self._add_up(contributions, factors, non_finite, authors)
        return norms

    def _add_up(
        self,
        contributions: dict[Any, list[GradFactors]],
        factors: torch.Tensor,
        non_finite: torch.Tensor | None,
        authors: AuthorIndex,
    ) -> None:
        """Add the clipped sums of these authors, each times its factor, (authors,), to `summed_grad`."""
        for parameter in list(contributions):  # let go of each tensor once it is used
            for part in contributions.pop(parameter):
                add_clipped(part, parameter.summed_grad, factors, non_finite, authors)

    def _single_author_params(self, authors: AuthorIndex) -> list[Any]:
        """Return the parameters whose ordinary gradients are what is asked for: with one author, they are the author's."""
        return [p for p in self.parameters if p in self.apart] if self._settled and authors.count == 1 else []

    def _backward(self, losses: torch.Tensor, authors: AuthorIndex, known: list[Any], retain_graph: bool) -> list[Any]:
        """Go back through the taps, which collect; return the gradients of `known`, None for one that is not used."""
        self._authors, self._collected = authors, (0, 0)
        try:
            return list(
                torch.autograd.grad(losses.sum(), [self._anchor, *known], retain_graph=retain_graph, allow_unused=True)[1:]
            )
        finally:
            self._authors = None

    def _find_fallback(self, losses: torch.Tensor, collected: Container[Any]) -> set[Any]:
        """Return what is to be taken apart: what no rule follows, and in a first call what was used behind the taps' back."""
        if self._settled:
            return self.apart
        samples, tokens = self._collected
        if samples == tokens > 1:  # a table of positions would pass for samples: trust no tap
            return set(self.parameters)
        missing = [p for p in self.parameters if p not in collected and p not in self.apart]
        if missing:
            found = torch.autograd.grad(losses.sum(), missing, retain_graph=True, allow_unused=True)
            self.apart |= {parameter for parameter, gradient in zip(missing, found) if gradient is not None}
        return self.apart

    def _clip_fallback(self, losses: torch.Tensor, norms: torch.Tensor, apart: list[Any]) -> torch.Tensor:
        """Add the clipped gradients of these parameters, by a backward an author; return the norms over all parameters.

        Infinite activations of one author reach the others here, as zero times infinity: DPTrainer takes such models one author
        at a time (`Proof.max_authors`), and so must others.

        Args:
            norms: (authors,), over the other parameters.
        """
        norms = norms.clone()
        for i in range(len(losses)):
            found = torch.autograd.grad(losses[i], apart, retain_graph=True, allow_unused=True)
            gradients = {p: gradient.float() for p, gradient in zip(apart, found) if gradient is not None}
            norms[i] = torch.stack([norms[i], *(squared_norms(g[None])[0].sqrt() for g in gradients.values())]).norm()
            norms[i] = norms[i].where(norms[i].isfinite(), torch.inf)
            if norms[i].isfinite():
                for parameter, gradient in gradients.items():
                    parameter.summed_grad.add_(gradient * (self.clip_norm / norms[i]).clamp(max=1.0))
        return norms

    def _collect(
        self, layer: Any, given: torch.Tensor, inputs: tuple, gradient: torch.Tensor, behind: tuple | None = None
    ) -> None:
        """Apply the layer's rule to one call of it; called by its tap in the backward pass.

        Args:
            given: the input ids of that forward, (samples, tokens).
            behind: the edge and the output that an embedding's lookup hides behind.
        """
        if self._authors is None or self._trained[layer] <= self.apart:
            return
        self._collected = shape = (len(given), given.shape[1])
        if behind is not None:  # the lookup is scaled, or more, before it leaves the layer
            (gradient,) = torch.autograd.grad(behind[1], [behind[0]], gradient, retain_graph=True)
        rule, rows = self._rules[layer], []
        for tensor in (*inputs, gradient):
            if (row := to_samples(tensor, *shape, len(self._authors.author))) is None:
                return self._fall_back(layer)
            rows.append(row)
        self._in_rule = True
        known = {layer.get_parameter(name): parameter for name, parameter in self._named[layer].items()}
        try:
            if rule is vmap_rule:
                parts = vmap_rule(layer, rows[:-1], rows[-1], self._authors)
            else:
                rows = [rows[0].flatten(1) if rule is embedding else rows[0].flatten(1, -2), rows[-1].flatten(1, -2)]
                parts = rule(layer, *rows, self._authors, self._most_explicit(known.get(layer.weight)))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if rule is not vmap_rule or isinstance(error, torch.OutOfMemoryError):
                raise
            return self._fall_back(layer)  # vmap cannot follow everything
        finally:
            self._in_rule = False
        for parameter, part in parts.items():
            if parameter in known and known[parameter] not in self.apart:
                self._store(known[parameter], part, given)

    def _most_explicit(self, weight: Any) -> int:
        """Return the elements of a layer's per-author gradients up to which they may be formed, if that is the cheaper way."""
        return sys.maxsize

    def _store(self, parameter: Any, part: GradFactors, given: torch.Tensor) -> None:
        """Keep what a layer adds to a parameter's gradient, until all norms are known."""
        self._contributions[parameter].append(part)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def add_clipped(
    part: GradFactors, total: torch.Tensor, factors: torch.Tensor, non_finite: torch.Tensor | None, authors: AuthorIndex
) -> None:
    """Add a contribution, each author's times the author's factor, to a total of the parameter's shape.

    Args:
        factors: (authors,).
        non_finite: bool (authors,), whose gradients are not finite; None where there is none.
    """
    if non_finite is not None:  # their factor is zero, but zero times nan would be nan
        part = mask_authors(part, non_finite, authors.author)
    part.add_clipped(total, factors, authors)


def total_norms(squares: list[torch.Tensor], losses: torch.Tensor) -> torch.Tensor:
    """Return the norms of all parameters together, (authors,), of each one's squared norms, (authors,); inf for no number."""
    every = torch.stack([losses.new_zeros(len(losses), dtype=torch.float32), *squares], 1)  # (authors, parameters)
    # Rounding may leave a small one below zero, which must take nothing from the others; overflow must not pass for one. The sum
    # is along the rows: of columns, the order of a vectorized sum follows from the author's place.
    return every.clamp(min=0).where(every.isfinite(), torch.inf).sum(1).sqrt()


def find_lookup(output: torch.Tensor) -> Any:
    """Return the node of the graph in which an embedding's output was looked up, None where there is no one such."""
    node = output.grad_fn
    while node is not None and node.name() != "EmbeddingBackward0":
        before = [other for other, _ in node.next_functions if other is not None]
        node = before[0] if len(before) == 1 else None
    return node


def to_samples(tensor: torch.Tensor, samples: int, tokens: int, expected: int) -> torch.Tensor | None:
    """Return (samples, calls, ...) of (samples, ...), or of samples and tokens that were joined; None where neither is certain.

    A tensor of shape (samples, features) might as well be one row for each token: it is not certain.
    """
    if samples != expected:
        return None
    if len(tensor) == samples and tensor.dim() > (2 if tensor.is_floating_point() else 1):
        return tensor.unsqueeze(1)
    if len(tensor) and len(tensor) % (samples * tokens) == 0:
        return tensor.unflatten(0, (samples, -1))
    return None
