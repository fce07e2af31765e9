"""Ghost clipping with book-keeping: per-author clipping at nearly the speed and memory of ordinary training.

Guarantees: the clipped sums equal those of a plain loop over authors, to rounding. They take one forward and one backward pass.
Per-author gradients are stored only where they are smaller than their factors.

`capture.py` hands the inputs and output gradients of each trained layer to the layer's rule (`layer_rules.py`). The rule returns
factors, which know their norms and their clipped sum (`grad_factors.py`). `factor_store.py` keeps them until the norms are known.
Parameters that no rule follows (a mixer's own parameters, the weights of experts, a layer that hides its samples) are clipped one
author at a time (`fallback.py`); `fallback_params` names them, for the code that makes microbatches.

Example:

    >>> engine = GhostClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679 (ghost norm)
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

import functools
from typing import Any, Optional

import torch
from torch import nn

from author_dp.clipping.author_groups import AuthorClipFactors, AuthorIndex
from author_dp.clipping.capture import LayerCall, LayerCapture
from author_dp.clipping.factor_store import FactorStore, total_norms
from author_dp.clipping.fallback import PerAuthorFallback
from author_dp.clipping.grad_factors import MaterializedGrad
from author_dp.clipping.layer_rules import apply_rule, assign_rules


class GhostClipping:
    """Clip per-author gradients without storing large ones.

    Guarantees: each call adds to every `parameter.summed_grad` a sum over authors in which each author has L2 norm at most
    `clip_norm`, to rounding, over all trainable parameters together. Tied embeddings count once, as the sum of their uses. An
    author whose gradient is not finite contributes zero. `norms` and the sums are not private.

    Args:
        model: its trainable parameters are clipped. Its inputs have samples along the first dimension, tokens along the second.
        clip_norm: C.
    Attributes:
        parameters: {parameter: name} of the trainable parameters.
        store: what is kept between the norms and the clipped sums.
    """

    store_class: type[FactorStore] = FactorStore
    fallback_class: type[PerAuthorFallback] = PerAuthorFallback

    def __init__(self, model: nn.Module, clip_norm: float):
        self.module, self.clip_norm = model, clip_norm
        self.parameters: dict[Any, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self._rules, without_rule, tied = assign_rules(model)
        self._fallback = self.fallback_class(self.parameters, without_rule)
        self.store = self.store_class(model, tied)
        device = next(iter(self.parameters)).device
        self._capture = LayerCapture(model, self._rules, self._fallback, device, self._receive)

    @property
    def fallback_params(self) -> set[Any]:
        """The parameters that need the per-author fallback: no rule applies, or their gradient bypassed the hooks."""
        return self._fallback.params

    def freeze_fallback(self, params: set[Any]) -> None:
        """Use the per-author fallback for these parameters too, as another engine found on this model, and for no others."""
        self._fallback.freeze(params)

    def backward(self, losses: torch.Tensor, author: torch.Tensor, samples_each: Optional[int] = None) -> torch.Tensor:
        """Backpropagate one microbatch, clip, and add to `summed_grad`.

        Args:
            losses: (authors,), attached to the graph of `self.module`.
            author: int64 (samples,), ascending, the author of each sample.
            samples_each: as for `AuthorIndex`.
        Returns:
            norms before clipping, (authors,); inf for an author who contributes nothing.
        """
        with torch.autocast(losses.device.type, enabled=False):  # around a call it would round what is clipped
            return self._clip(losses, AuthorIndex(author, len(losses), samples_each))

    def _clip(self, losses: torch.Tensor, authors: AuthorIndex) -> torch.Tensor:
        """As `backward`, in float32."""
        self._authors = authors
        ordinary = self._fallback.single_author_params(authors.num_authors)
        run_backward = functools.partial(self._backward, losses, ordinary)
        needs_more = not self._fallback.is_frozen or (bool(self.fallback_params) and not ordinary)
        self.store.norm_pass(run_backward, authors, retain_graph=needs_more)
        captured = self.store.squares.keys() | self.store.factors.keys()
        fallback = set() if ordinary else self._fallback.find(losses, captured, self._capture.shape)
        norms = total_norms(self.store.squared_norms([p for p in self.parameters if p not in fallback]), losses)
        if fallback:
            norms = self._fallback.add_clipped(fallback, losses, norms, self.clip_norm)
        self.store.sum_pass(run_backward, AuthorClipFactors(self.clip_norm, norms, authors))
        return norms

    def _backward(self, losses: torch.Tensor, ordinary: list[Any], retain_graph: bool) -> None:
        """Run the captured backward pass; store the ordinary gradients of `ordinary`, each as soon as it is computed."""
        hooks = [parameter.register_hook(functools.partial(self._store_ordinary, parameter)) for parameter in ordinary]
        try:
            self._capture.backward(losses, ordinary, retain_graph)
        finally:
            for hook in hooks:
                hook.remove()

    def _store_ordinary(self, parameter: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Store the gradient of a microbatch of one author; return a stand-in that takes no memory."""
        if self.store.accepts(parameter, [parameter], [gradient]):
            self.store.add(parameter, MaterializedGrad(gradient.float()[None]), self._capture.input_ids)
        return gradient.new_zeros(()).expand_as(gradient)

    def _receive(self, call: LayerCall, inputs: tuple, gradient: torch.Tensor) -> None:
        """Apply the rule of a layer to one captured call."""
        rule, params = self._rules[call.layer]
        if not self.store.accepts(call.layer, params.values(), (*inputs, gradient)) or self._fallback.covers(params.values()):
            return
        rows = call.to_rows(inputs, gradient, len(self._authors.author))
        max_materialized = self.store.max_materialized(params.get("weight"))
        grads = None if rows is None else apply_rule(rule, call.layer, rows, self._authors, max_materialized)
        if grads is None:
            self._fallback.add(call.layer, params.values())
            return
        for name, grad in grads.items():
            if name in params and params[name] not in self.fallback_params:
                self.store.add(params[name], grad, call.input_ids)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._capture.close()
