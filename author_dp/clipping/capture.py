"""Capture the inputs and output gradients of trained layers with hooks.

A hook behind each layer adds an identity to the graph, which hands over the layer's tensors during the backward pass. Autograd is
asked for the gradient of one leaf that all these identities share. It therefore visits the layers' outputs, but computes no
gradient of a weight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from transformers.pytorch_utils import Conv1D

from author_dp.clipping.fallback import PerAuthorFallback
from author_dp.clipping.layer_rules import LayerRule, embedding, vmap_rule

OUTPUT_NOT_SAVED = (nn.Linear, nn.LayerNorm, Conv1D)  # layers whose backward does not read their output


class LayerCall(NamedTuple):
    """One call of a layer in the forward pass."""

    layer: nn.Module
    input_ids: torch.Tensor  # of that forward pass, (samples, tokens)
    lookup: tuple[GradientEdge, torch.Tensor] | None = None  # lookup inside an embedding, and the layer's output, if they differ

    def to_rows(self, inputs: tuple, gradient: torch.Tensor, samples: int) -> list[torch.Tensor] | None:
        """Return inputs and output gradient, each (samples, calls, ...); None where their samples are not certain."""
        if self.lookup is not None:  # the layer scales what it looks up, for example
            edge, output = self.lookup
            (gradient,) = torch.autograd.grad(output, [edge], gradient, retain_graph=True)
        shape = (len(self.input_ids), self.input_ids.shape[1])
        rows = [to_samples(tensor, *shape, samples) for tensor in (*inputs, gradient)]
        return None if any(row is None for row in rows) else rows  # type: ignore[return-value]


class CaptureGrad(torch.autograd.Function):
    """Identity that hands a layer's inputs and output gradient to `receive` in the backward pass.

    The inputs are saved as autograd saves its own, so gradient checkpointing drops and recomputes them as it does those.
    """

    @staticmethod
    def forward(
        ctx, output: torch.Tensor, anchor: torch.Tensor, receive: Callable, call: LayerCall, copy: bool, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        ctx.receive, ctx.call = receive, call
        # Not a view: CTRL, Falcon and Llama 4 change it in place. It shares memory where no backward reads the output.
        return output.clone() if copy else torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        inputs = ctx.saved_tensors
        ctx.receive(ctx.call, inputs, gradient)
        return gradient, None, None, None, None, *[None] * len(inputs)


class LayerCapture:
    """Hooks on a model's layers, active in `backward` only.

    Args:
        model: takes `input_ids`, by name or as its first argument.
        rules: the layers to capture.
        fallback: layers whose parameters are all in it are not captured; a call that no rule can follow is added to it.
        device: of the model's parameters.
        receive: called with (call, inputs, output gradient) for each captured call.
    Attributes:
        input_ids: of the last forward pass with gradients, (samples, tokens).
        shape: (samples, tokens) of the last captured call, (0, 0) before one.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: dict[nn.Module, LayerRule],
        fallback: PerAuthorFallback,
        device: torch.device,
        receive: Callable[[LayerCall, tuple, torch.Tensor], None],
    ):
        self._rules, self._fallback, self._receive = rules, fallback, receive
        self.input_ids, self.shape = torch.zeros(0, 0), (0, 0)
        self._anchor = torch.zeros((), requires_grad=True, device=device)
        self._is_active = self._is_muted = False
        self._hooks: list[Any] = [layer.register_forward_hook(self._attach, with_kwargs=True) for layer in rules]
        self._hooks += [
            layer.register_forward_pre_hook(cast_captured_input) for layer in rules if isinstance(layer, nn.Linear | Conv1D)
        ]
        self._hooks.append(model.register_forward_pre_hook(self._remember_inputs, with_kwargs=True))

    def backward(self, losses: torch.Tensor, parameters: list[Any], retain_graph: bool) -> None:
        """Backpropagate the sum of `losses`, (authors,), through the captured layers, and to `parameters`."""
        self._is_active, self.shape = True, (0, 0)
        try:
            torch.autograd.grad(losses.sum(), [self._anchor, *parameters], retain_graph=retain_graph, allow_unused=True)
        finally:
            self._is_active = False

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _remember_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled() and input_ids is not None:
            self.input_ids = input_ids.detach()

    def _attach(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook: put `CaptureGrad` behind the layer's output, or add its parameters to the fallback."""
        rule, params = self._rules[layer]
        if self._is_muted or not torch.is_grad_enabled() or self._fallback.covers(params.values()):
            return output
        if rule is embedding:
            return self._attach_embedding(layer, output)
        inputs = [value.detach() for value in args if isinstance(value, torch.Tensor)]
        is_plain = isinstance(output, torch.Tensor) and not kwargs and len(inputs) == len(args)
        if not is_plain or (rule is not vmap_rule and len(inputs) > 1):
            self._fallback.add(layer, params.values())
            return output
        if not output.requires_grad:
            return output
        if isinstance(layer, nn.Linear | Conv1D):
            inputs = [inputs[0].to(output.dtype)]  # where a layer computes in another type than autocast's
        call = LayerCall(layer, self.input_ids)
        return CaptureGrad.apply(output, self._anchor, self._collect, call, type(layer) not in OUTPUT_NOT_SAVED, *inputs)

    def _attach_embedding(self, layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """As `_attach`, with the ids that were looked up: OPT computes its positions inside the layer."""
        lookup = find_captured_lookup(output)
        padding_idx: Any = 2**64 - 1 if layer.padding_idx is None else layer.padding_idx
        if lookup is None or lookup._saved_padding_idx != padding_idx:
            self._fallback.add(layer, self._rules[layer].params.values())
            return output
        ids, (samples, tokens) = lookup._saved_indices, self.input_ids.shape[:2]
        is_output = lookup is output.grad_fn
        call = LayerCall(layer, self.input_ids, None if is_output else (GradientEdge(lookup, 0), output))
        if is_output and ids.shape == (1, tokens):  # positions that all samples share
            output, ids = output.expand(samples, -1, -1), ids.expand(samples, -1)
        return CaptureGrad.apply(output, self._anchor, self._collect, call, True, ids)

    def _collect(self, call: LayerCall, inputs: tuple, gradient: torch.Tensor) -> None:
        if not self._is_active:  # a backward pass that is not the engine's
            return
        samples, tokens = call.input_ids.shape[:2]
        self.shape, self._is_muted = (samples, tokens), True  # muted, as `vmap_rule` calls the layer once more
        try:
            self._receive(call, inputs, gradient)
        finally:
            self._is_muted = False


def cast_captured_input(layer: nn.Module, args: tuple) -> Optional[tuple]:
    """Forward pre-hook: cast an input as autocast would in the layer, so that the layer's backward and the capture share it."""
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].dtype != torch.float32:
        return None
    device = args[0].device.type
    return (args[0].to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else None


def find_captured_lookup(output: torch.Tensor) -> Any:
    """Return the graph node in which an embedding's output was looked up; None where there is not exactly one."""
    node = output.grad_fn
    while node is not None and node.name() != "EmbeddingBackward0":
        before = [other for other, _ in node.next_functions if other is not None]
        node = before[0] if len(before) == 1 else None
    return node


def to_samples(tensor: torch.Tensor, samples: int, tokens: int, expected: int) -> torch.Tensor | None:
    """Return (samples, calls, ...) of (samples, ...) or (samples x tokens, ...); None where neither is certain.

    A tensor of shape (samples, features) could also hold one row for each token, so it is not certain.

    Args:
        samples, tokens: of the forward pass.
        expected: samples of the microbatch.
    """
    if samples != expected:
        return None
    if len(tensor) == samples and tensor.dim() > (2 if tensor.is_floating_point() else 1):
        return tensor.unsqueeze(1)
    if len(tensor) and len(tensor) % (samples * tokens) == 0:
        return tensor.unflatten(0, (samples, -1))
    return None
