"""Ghost clipping with book-keeping: per-author clipping at nearly the speed and memory of ordinary training.

Promise: the same clipped sums as grad_sample_clipping.GradSampleClipping, to rounding, from one forward and one backward, without
ever storing the per-author gradient of a large layer. With a_t the inputs and g_t the output gradients of a linear layer,
t running over all tokens of all the author's samples, the author's weight gradient is G = sum_t g_t a_t^T, and

    ||G||^2 = sum_{s,t} <a_s, a_t> <g_s, g_t>        (the ghost norm: G itself is never formed)

The clipped sum over all authors is then sum_t (c_author g_t) a_t^T: an ordinary matrix product. Autograd is asked for the
gradients of the layers' outputs only, which spares it the ordinary weight gradients.

Example:

    >>> engine = GhostClipping(model, clip_norm=1.0)
    >>> norms = engine.backward(author_losses(engine.module, batch), batch["author"])

To support a further layer, write a rule from (layer, inputs, output gradients, authors) to contributions, and name it in
`rule_of`.

References:
    [1] Li et al. 2022, Large Language Models Can Be Strong Differentially Private Learners, arXiv 2110.05679 (ghost norm)
    [2] Bu et al. 2023, Differentially Private Optimization on Large Model at Small Cost, arXiv 2210.00038 (book-keeping)
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from data_utils import UserError

EXPLICIT_ELEMENTS = 2**24  # per-author gradients formed at once, where they are the cheaper way: 64 MB
BFLOAT16_MARGIN = 2**-8  # scaling a bfloat16 tensor rounds each number by half as much at most: the clip norm stays a bound
FLAT_BLOCKS = ("OPTDecoderLayer",)  # join samples and tokens, sample by sample, into one dimension for some of their layers

# --- what a call of a layer adds to the gradient of one parameter ---------------------------------------


class Explicit(NamedTuple):
    """Per-author gradients, of small parameters only."""

    gradients: torch.Tensor  # (authors, ...), float32

    def squared_norms(self, authors: "Authors") -> torch.Tensor:
        return self.gradients.flatten(1).square().sum(1)

    def add_clipped(self, total: torch.Tensor, factors: torch.Tensor, authors: "Authors") -> None:
        total.add_(torch.einsum("a,a...->...", factors, self.gradients))


class Product(NamedTuple):
    """The gradient of a matrix: sum over tokens of left_t right_t^T, of the matrix' shape."""

    left: torch.Tensor  # (samples, tokens, rows)
    right: torch.Tensor  # (samples, tokens, columns)

    def squared_norms(self, authors: "Authors") -> torch.Tensor:
        return product_squared_norms(authors.gather(self.left), authors.gather(self.right))

    def add_clipped(self, total: torch.Tensor, factors: torch.Tensor, authors: "Authors") -> None:
        left, right = self.left, self.right
        if left.shape[-1] < right.shape[-1]:  # scale the narrower: the other may be as wide as the vocabulary
            left = authors.scale(left, factors)
        else:
            right = authors.scale(right, factors)
        if left.dtype == torch.float32:
            total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
        else:
            total.add_(matmul(left.flatten(0, 1).T, right.flatten(0, 1)))


class Lookup(NamedTuple):
    """The gradient of an embedding: the tokens' output gradients, added to the rows that were looked up."""

    ids: torch.Tensor  # (samples, tokens)
    gradients: torch.Tensor  # (samples, tokens, features)

    def squared_norms(self, authors: "Authors") -> torch.Tensor:
        return lookup_squared_norms(authors.gather(self.ids), authors.gather(self.gradients))

    def add_clipped(self, total: torch.Tensor, factors: torch.Tensor, authors: "Authors") -> None:
        gradients = authors.scale(self.gradients.float(), factors)
        total.index_add_(0, self.ids.flatten(), gradients.flatten(0, 1))


Contribution = Explicit | Product | Lookup


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product of matrices, or of batches of them, summed and returned in float32 whatever the type of the factors."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        return left.float() @ right.float()
    return (torch.bmm if left.dim() == 3 else torch.mm)(left, right, out_dtype=torch.float32)


def product_squared_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """||sum_t left_t right_t^T||^2 of each author, by the way that costs fewer multiplications.

    With T tokens an author, the ghost norm takes T^2 (rows + columns) multiplications, the gradient T rows columns.

    Args:
        left, right: (authors, tokens, rows) and (authors, tokens, columns), of one type.
    Returns:
        float32 (authors,).
    """
    _, tokens, rows = left.shape
    columns = right.shape[-1]
    if tokens * (rows + columns) <= rows * columns:
        return matmul(left, left.mT).mul_(matmul(right, right.mT)).sum((1, 2))
    at_once = max(1, EXPLICIT_ELEMENTS // (rows * columns))
    parts = zip(left.split(at_once), right.split(at_once))
    return torch.cat([matmul(left_part.mT, right_part).square_().sum((1, 2)) for left_part, right_part in parts])


def lookup_squared_norms(ids: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """sum_{s,t} [id_s = id_t] <e_s, e_t> of each author: (authors, tokens), (authors, tokens, features) to (authors,)."""
    same = ids[:, :, None] == ids[:, None, :]
    return matmul(gradients, gradients.mT).mul_(same).sum((1, 2))


def tied_cross_terms(
    ids: torch.Tensor, gradients: torch.Tensor, logit_gradients: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """2 <G_embedding, G_head> of each author, for one matrix that is both: 2 sum_{s,t} z_t[id_s] <e_s, h_t>.

    Args:
        ids, gradients: id_s and e_s, (authors, tokens) and (authors, tokens, features).
        logit_gradients, hidden: z_t and h_t, (authors, tokens, vocabulary) and (authors, tokens, features).
    Returns:
        float32 (authors,).
    """
    picked = logit_gradients.gather(2, ids[:, None, :].expand(-1, logit_gradients.shape[1], -1)).float()  # z_t[id_s]
    return 2 * (hidden.float() @ gradients.float().mT).mul_(picked).sum((1, 2))


def total_squared_norms(parts: list[Contribution], authors: "Authors") -> torch.Tensor:
    """||sum of the contributions||^2 for one parameter, (authors,): one contribution, or the two of a tied embedding."""
    squares = sum(part.squared_norms(authors) for part in parts)
    if len(parts) == 1:
        return squares
    lookup, product = sorted(parts, key=lambda part: isinstance(part, Product))
    return squares + tied_cross_terms(*(authors.gather(tensor) for tensor in (*lookup, *product)))


def merge(parts: list[Contribution], authors: "Authors") -> list[Contribution]:
    """Make one contribution of those of one kind: all calls of a layer share one token axis."""
    if len(parts) < 2:
        return parts
    if any(isinstance(part, Explicit) for part in parts):
        gradients = [
            part.gradients if isinstance(part, Explicit) else authors.sum(matmul(part.left.mT, part.right)) for part in parts
        ]
        return [Explicit(sum(gradients))]
    kinds = ([part for part in parts if isinstance(part, kind)] for kind in (Lookup, Product))
    return [same[0] if len(same) == 1 else type(same[0])(*(torch.cat(t, 1) for t in zip(*same))) for same in kinds if same]


def without(part: Contribution, bad: torch.Tensor, author: torch.Tensor) -> Contribution:
    """Return the contribution with zeros for the `bad` authors, (authors,), whatever they held."""
    rows = bad if isinstance(part, Explicit) else bad[author]
    return type(part)(*(tensor.masked_fill(rows.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in part))


# --- which sample is whose ------------------------------------------------------------------------------


class Authors:
    """The authors of a microbatch.

    Args:
        author: int64 (samples,), ascending: 0 to count - 1, each at least once.
        count: number of authors.
    """

    def __init__(self, author: torch.Tensor, count: int):
        self.author, self.count = author, count
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self.several = count < len(author)
        if self.several:
            counts = torch.bincount(author, minlength=count)
            self.place = torch.arange(len(author), device=author.device) - (counts.cumsum(0) - counts)[author]
            self.most = int(counts.max())

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Line up each author's samples: (samples, tokens, ...) to (authors, tokens of all, ...), zeros at the end."""
        if not self.several:
            return tensor
        if self.count * self.most == len(tensor):  # all have as many: nothing to move
            return tensor.unflatten(0, (self.count, self.most)).flatten(1, 2)
        rows = tensor.new_zeros(self.count, self.most, *tensor.shape[1:])
        rows[self.author, self.place] = tensor
        return rows.flatten(1, 2)

    def scale(self, tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return (samples, tokens, ...) times the factor of each sample's author, until the next call overwrites it.

        New memory for each would cost as much time as the matrix product that follows.
        """
        scratch = self._scratch.get(tensor.dtype)
        if scratch is None or len(scratch) < tensor.numel():
            scratch = self._scratch[tensor.dtype] = torch.empty_like(tensor).flatten()
        if tensor.dtype != torch.float32:
            factors = factors * (1 - BFLOAT16_MARGIN)
        return torch.mul(tensor, factors[self.author].view(-1, 1, 1), out=scratch[: tensor.numel()].view_as(tensor))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over each author's samples: (samples, ...) to float32 (authors, ...)."""
        tensor = tensor.float()
        return tensor.new_zeros(self.count, *tensor.shape[1:]).index_add_(0, self.author, tensor) if self.several else tensor


# --- a rule for each type of layer: (layer, inputs, output gradients, authors) to contributions ---------


def matrix(left: torch.Tensor, right: torch.Tensor, authors: Authors, may_be_explicit: bool) -> Contribution:
    """The gradient of a matrix, formed for each author where that is small and the cheaper way: LoRA's factors."""
    rows, columns, tokens = left.shape[-1], right.shape[-1], left.shape[1]
    cheaper = rows * columns < tokens * (rows + columns) and rows * columns * len(left) <= EXPLICIT_ELEMENTS
    if may_be_explicit and cheaper:
        return Explicit(authors.sum(matmul(left.mT, right)))
    return Product(left, right)


def linear(layer: nn.Linear, inputs: torch.Tensor, gradients: torch.Tensor, authors: Authors, may_be_explicit: bool) -> dict:
    contributions = {layer.weight: matrix(gradients, inputs, authors, may_be_explicit)}
    if layer.bias is not None:
        contributions[layer.bias] = Explicit(authors.sum(gradients.sum(1, dtype=torch.float32)))
    return contributions


def conv1d(layer: Conv1D, inputs: torch.Tensor, gradients: torch.Tensor, authors: Authors, may_be_explicit: bool) -> dict:
    """Hugging Face's linear layer with weight (inputs, outputs)."""
    return {
        layer.weight: matrix(inputs, gradients, authors, may_be_explicit),
        layer.bias: Explicit(authors.sum(gradients.sum(1, dtype=torch.float32))),
    }


def embedding(layer: nn.Embedding, ids: torch.Tensor, gradients: torch.Tensor, *_) -> dict:
    if layer.padding_idx is not None:
        gradients = gradients * (ids != layer.padding_idx)[:, :, None]
    return {layer.weight: Lookup(ids, gradients)}


def layer_norm(layer: nn.LayerNorm, inputs: torch.Tensor, gradients: torch.Tensor, authors: Authors, *_) -> dict:
    normalized = F.layer_norm(inputs.float(), layer.normalized_shape, eps=layer.eps)
    contributions = {layer.weight: Explicit(authors.sum(normalized.mul_(gradients).sum(1)))}
    if layer.bias is not None:
        contributions[layer.bias] = Explicit(authors.sum(gradients.sum(1, dtype=torch.float32)))
    return contributions


def rms_norm(layer: nn.Module, inputs: torch.Tensor, gradients: torch.Tensor, authors: Authors, *_) -> dict:
    normalized = F.rms_norm(inputs.float(), inputs.shape[-1:], eps=layer.variance_epsilon)
    return {layer.weight: Explicit(authors.sum(normalized.mul_(gradients).sum(1)))}


def rule_of(layer: nn.Module) -> Callable | None:
    """Return the rule for exactly this type of layer, None if there is none: a subclass may compute anything."""
    if type(layer).forward is nn.Linear.forward:
        return linear
    if isinstance(layer, nn.Embedding) and layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse:
        return embedding
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.weight is not None:
        return layer_norm
    if type(layer).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
        return rms_norm
    return conv1d if type(layer) is Conv1D else None


# --- the engine -----------------------------------------------------------------------------------------


class Tap(torch.autograd.Function):
    """Change nothing; in the backward pass, hand a layer's inputs and output gradient to the engine.

    The inputs are saved as autograd saves its own, so gradient checkpointing drops and recomputes them as it does those.
    """

    @staticmethod
    def forward(
        ctx, output: torch.Tensor, inputs: torch.Tensor, anchor: torch.Tensor, layer: nn.Module, collect: Callable
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.collect = layer, collect
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        ctx.collect(ctx.layer, *ctx.saved_tensors, gradient)
        return gradient, None, None, None, None


class GhostClipping:
    """Clip per-author gradients without storing them.

    Guarantee: each call adds to every `parameter.summed_grad` a sum over authors in which each author has L2 norm
    at most `clip_norm`, to rounding, over all trainable parameters together; tied embeddings count once, as the sum
    of their uses. An author whose gradient is not finite contributes zero. `norms` and the sums are not private.

    Args:
        model: its trainable parameters are clipped.
        clip_norm: C.
    Raises:
        UserError: for a trainable parameter without a rule; nothing is ever trained unclipped.
    """

    def __init__(self, model: nn.Module, clip_norm: float):
        self.module, self.clip_norm = model, clip_norm
        self.parameters = {p: name for name, p in model.named_parameters() if p.requires_grad}
        owners = defaultdict(list)
        for name, layer in model.named_modules():
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    owners[parameter].append((name, layer))
        for uses in owners.values():
            rules = [rule_of(layer) for _, layer in uses]
            if None in rules or (len(rules) > 1 and sorted(rule.__name__ for rule in rules) != ["embedding", "linear"]):
                name, layer = uses[rules.index(None) if None in rules else -1]
                raise cannot_clip(f"{name} ({type(layer).__name__})")
        self.tied = {parameter for parameter, uses in owners.items() if len(uses) > 1}
        # Every tap has this leaf as an input: what autograd must visit to reach it are the taps, and no weight.
        self._anchor = torch.zeros((), requires_grad=True, device=next(iter(self.parameters)).device)
        self._authors: Authors | None = None
        self._contributions: dict[nn.Parameter, list[Contribution]] = defaultdict(list)
        self._flat = {layer for block in model.modules() if type(block).__name__ in FLAT_BLOCKS for layer in block.modules()}
        layers = {layer for uses in owners.values() for _, layer in uses}
        self._hooks = [layer.register_forward_hook(self._tap) for layer in layers]

    def _tap(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or not output.requires_grad:
            return output
        used = inputs[0].detach() if inputs else None
        if isinstance(layer, nn.Embedding):
            if output.grad_fn.name() != "EmbeddingBackward0":
                raise cannot_clip(f"layer {type(layer).__name__}, which does more than look up")
            used = output.grad_fn._saved_indices  # what was really looked up: OPT computes its positions inside the layer
        elif isinstance(layer, nn.Linear | Conv1D):
            used = used.to(output.dtype)  # as autocast does inside the layer
        return Tap.apply(output, used, self._anchor, layer, self._collect)

    def backward(self, losses: torch.Tensor, author: torch.Tensor) -> torch.Tensor:
        """Backpropagate one microbatch, clip, and add to `summed_grad`.

        Args:
            losses: (authors,), attached to the graph of `self.module`.
            author: int64 (samples,), ascending, the author of each sample.
        Returns:
            norms before clipping, (authors,); inf for an author who contributes nothing.
        """
        self._contributions.clear()
        self._authors = authors = Authors(author, len(losses))
        torch.autograd.grad(losses.sum(), self._anchor, allow_unused=True)
        contributions = {p: merge(self._contributions.pop(p, []), authors) for p in self.parameters}
        for parameter, parts in contributions.items():
            if not parts:
                raise cannot_clip(f"parameter {self.parameters[parameter]}, of which the loss shows no use")
        squares = torch.stack([total_squared_norms(parts, authors) for parts in contributions.values()]).sum(0)
        # Rounding may leave a small norm below zero; overflow must not pass for one.
        norms = squares.clamp(min=0).where(squares.isfinite(), torch.inf).sqrt()
        factors = (self.clip_norm / norms).clamp(max=1.0)  # min(1, C / ||g_a||), (authors,)
        finite = norms.isfinite()
        if not finite.all():  # their factor is zero, but zero times nan would be nan: leave these authors out
            contributions = {p: [without(part, ~finite, author) for part in parts] for p, parts in contributions.items()}
        for parameter in self.parameters:  # let go of each tensor once it is used
            for part in contributions.pop(parameter):
                part.add_clipped(parameter.summed_grad, factors, authors)
        return norms

    def _collect(self, layer: nn.Module, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Apply the layer's rule to one call of it; called by its tap in the backward pass."""
        samples, rows = len(self._authors.author), []
        for tensor in (inputs, gradients):
            if layer in self._flat and tensor.dim() == 2:
                tensor = tensor.unflatten(0, (samples, -1))
            if len(tensor) != samples:
                raise cannot_clip(f"layer {type(layer).__name__}, which hides its samples")
            rows.append(tensor.flatten(1, -2) if tensor.dim() > 3 else tensor)  # (samples, tokens, features)
        parts = rule_of(layer)(layer, *rows, self._authors, layer.weight not in self.tied)
        for parameter, part in parts.items():
            if parameter.requires_grad:
                self._contributions[parameter].append(part)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def cannot_clip(what: str) -> UserError:
    return UserError(f"--clipping ghost has no rule for the trainable {what}: use --clipping grad_sample, or --enable_lora")
