"""clipping/ghost.py: checkpointing, autocast, tokens that cancel, and what the engine keeps."""

import math

import pytest
import reference
import torch
from conftest import as_arrays, clipped_sum, flat, make_batch, make_trainer, tiny_gpt2, trainable
from families import FAMILIES, KINDS, close, make_model
from mutation import catches
from torch import nn

from author_dp.clipping import factor_store, grad_factors
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.grad_factors import MaterializedGrad
from author_dp.clipping.two_pass import TwoPassClipping
from author_dp.mechanism.losses import author_losses

# --- forms of factors, and precision --------------------------------------------------------------------


def test_a_matrix_that_is_embedding_and_head_takes_the_smaller_form(monkeypatch):
    """(61, 16) for each of three authors, or 61 + 16 numbers for each token of five samples."""
    forms = []
    monkeypatch.setattr(factor_store, "JOIN_ELEMENTS", 0)
    norms = factor_store.grad_factors_norms
    monkeypatch.setattr(factor_store, "grad_factors_norms", lambda parts, authors: forms.append(parts) or norms(parts, authors))
    for module in ("grad_factors", "norms"):  # so large that it is formed author by author
        monkeypatch.setattr(f"author_dp.clipping.{module}.MATERIALIZE_ELEMENTS", 1)
    for tokens, kinds in ((7, {"EmbeddingGrad", "OuterProduct"}), (8, {"MaterializedGrad"})):
        model = tiny_gpt2()
        rows, columns = model.lm_head.weight.shape
        batch = make_batch([1, 2, 2], longest=16)
        batch = {name: value[:, :tokens] if name in ("input_ids", "labels") else value for name, value in batch.items()}
        tokens_of_all = len(batch["author"]) * tokens
        assert (3 * rows * columns < tokens_of_all * (rows + columns)) == (kinds == {"MaterializedGrad"}), (rows, columns)
        forms.clear()
        ours, _ = clipped_sum(model, batch, 0.1, "ghost")
        assert kinds in [{type(part).__name__ for part in parts} for parts in forms]
        assert close(ours, clipped_sum(model, batch, 0.1, "grad_sample")[0])


def test_a_backward_under_autocast_is_as_exact_as_one_outside():
    """Else what is clipped is rounded to bfloat16 once more, above the clip norm."""
    model, batch = make_model("gpt2", "lora"), make_batch([1, 2, 3], longest=16)
    sums = []
    for inside in (True, False):
        engine = GhostClipping(model, 1e-3)
        for parameter in trainable(model).values():
            parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16):
            losses = author_losses(engine.module, batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            engine.backward(losses, batch["author"])
        sums.append(flat(parameter.summed_grad for parameter in trainable(model).values()))
        engine.close()
    assert sums[0].norm() > 0 and torch.equal(*sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family, kind):
    dropout = 0.2 if family in ("gpt2", "neox") else 0.0
    model, batch = make_model(family, kind, dropout), make_batch()
    torch.manual_seed(5)
    expected, expected_norms = clipped_sum(model, batch, 0.1, "ghost")
    calls = []
    block = next(module for name, module in model.named_modules() if name.endswith((".h.0", ".layers.0")))
    norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "lora":
        model.enable_input_require_grads()
    torch.manual_seed(5)
    ours, norms = clipped_sum(model, batch, 0.1, "ghost")
    assert len(calls) == 2 and close(ours, expected) and norms.tolist() == pytest.approx(expected_norms.tolist(), rel=1e-5)


class Matrix(nn.Module):
    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.layer = nn.Linear(columns, rows, bias=False)

    def forward(self, input_ids, inputs):
        return self.layer(inputs)


def size_of_the_sum(
    engine_class, tokens: torch.Tensor, shape: tuple[int, int], samples: list[int], clip_norm: float, bf16: bool
) -> tuple[float, float]:
    """Return the norm of what the first author adds, and the norm that the engine found.

    Args:
        tokens: their output gradients, the same in all rows; all inputs are 1.
    """
    model, author = Matrix(*shape), torch.arange(len(samples)).repeat_interleave(torch.tensor(samples))
    engine = engine_class(model, clip_norm)
    engine.freeze_fallback(set())
    engine.store.max_kept = 0
    model.layer.weight.summed_grad = torch.zeros(shape)
    gradients = torch.zeros(len(author), len(tokens) // samples[0])
    gradients[: samples[0]] = tokens.view(samples[0], -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        inputs = torch.ones(*gradients.shape, shape[1])
        output = engine.module(input_ids=torch.ones(gradients.shape, dtype=torch.int64), inputs=inputs)
    losses = torch.zeros(len(samples)).index_add(0, author, (output.float() * gradients[:, :, None]).sum((1, 2)))
    norms = engine.backward(losses, author)
    engine.close()
    return float(model.layer.weight.summed_grad.double().norm()), float(norms[0])


THREE = [1.0, 1.015625, -2.015625]  # sum to nothing; times most factors, rounded to bfloat16, they do not
CANCELLING = {  # tokens, the matrix, samples of each author
    "ghost norm, two tokens": ([1 + 9 / 128, -1.0], (48, 64), [1]),
    "ghost norm": ([1 + 1 / 128] * 8 + [-1.0] * 7 + [-1 - 7 / 128], (48, 64), [1]),
    "formed norm": ([*THREE * 5, 2.0**-8], (16, 24), [1]),
    "formed norm, almost nothing": ([*THREE * 5, 2.0**-14], (16, 24), [1]),
    "a factor of LoRA": ([*THREE * 4, 2.0**-8], (8, 768), [1]),
    "formed gradient": ([*THREE * 21, 2.0**-8], (16, 24), [1]),
    "authors of unlike numbers of samples": ([*THREE * 50], (56, 54), [10, 1]),
    "long": ([*THREE * 50], (64, 62), [1]),
}


@catches("no room for what bfloat16 rounds", "clipping.grad_factors.OuterProduct.squared", "rounded=squared.bound",
    "rounded=None", case="formed norm", engine_class=GhostClipping, bf16=True)  # fmt: skip
@catches("what cancels not rounded up where it is formed", "clipping.norms.product_squared_norms",
    "(token_norms(left) * token_norms(right)).sum(1)", "torch.zeros_like(value)", case="formed norm, almost nothing",
    engine_class=TwoPassClipping, bf16=False)  # fmt: skip
@catches("norms of what is formed, sums of what is scaled", "clipping.two_pass.TwoPassStore.max_materialized",
    "min(MATERIALIZE_ELEMENTS, (self.max_kept - self._kept) // 4)", "MATERIALIZE_ELEMENTS", case="formed gradient",
    engine_class=TwoPassClipping, bf16=True)  # fmt: skip
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("engine_class", [GhostClipping, TwoPassClipping])
@pytest.mark.parametrize("case", CANCELLING)
def test_where_tokens_cancel_rounding_carries_no_sum_above_the_clip_norm(case, engine_class, bf16):
    tokens, *rest = CANCELLING[case]
    tokens = torch.tensor(tokens) * (1.0 if bf16 else 2.0**20)
    _, norm = size_of_the_sum(engine_class, tokens, *rest, 1.0, bf16)
    for share in torch.linspace(0.05, 0.85, 17).tolist():
        clip_norm = max(norm, 1e-3) * share
        size, _ = size_of_the_sum(engine_class, tokens, *rest, clip_norm, bf16)
        assert size <= clip_norm * (1 + 1e-4), (share, size / clip_norm)


def test_a_layer_without_a_rule_is_run_again_after_a_forward_in_bfloat16():
    class Scaled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    model, inputs = Matrix(4, 5), torch.randn(3, 6, 5)
    model.layer = Scaled(5, 4)
    sums = []
    for bf16 in (True, False):
        engine = GhostClipping(model, 1e-3)
        engine.freeze_fallback(set())
        for parameter in model.parameters():
            parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = engine.module(input_ids=torch.ones(3, 6, dtype=torch.int64), inputs=inputs)
        engine.backward(output.float().square().sum((1, 2)), torch.arange(3))
        sums.append(flat(parameter.summed_grad for parameter in model.parameters()))
        engine.close()
    assert sums[1].norm() > 0 and close(*sums, 0.02)


@pytest.mark.integration
def test_the_trainer_checkpoints_and_rounds_as_asked(tmp_path):
    """The options of a user: the update is that of the reference loop."""
    for name, options in {"plain": {}, "checkpointed": {"gradient_checkpointing": True}, "bf16": {"bf16": True}}.items():
        model = tiny_gpt2()
        before = flat(model.parameters()).clone()
        privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
        trainer = make_trainer(tmp_path / name, model, privacy=privacy, per_device_train_batch_size=6, **options)
        trainer.train()
        expected = reference.clipped_sum(tiny_gpt2(), as_arrays(make_batch()), 0.5) / 6
        tolerance = 0.05 if name == "bf16" else 1e-4
        assert close(before - flat(model.parameters()), expected, tolerance), name


# --- what is kept, and what is refused ------------------------------------------------------------------


def test_no_per_author_gradient_of_a_large_layer_is_formed(monkeypatch):
    kept = []
    monkeypatch.setattr(factor_store, "JOIN_ELEMENTS", 0)
    norms = factor_store.grad_factors_norms
    monkeypatch.setattr(factor_store, "grad_factors_norms", lambda parts, authors: kept.extend(parts) or norms(parts, authors))
    model = make_model("gpt2", "tied")
    clipped_sum(model, make_batch([2] * 4, longest=4), 0.1, "ghost")
    sizes = [part.gradients[0].numel() for part in kept if isinstance(part, MaterializedGrad)]
    assert max(sizes) <= 4 * 16  # biases and layer norms; the smallest matrix has 16 x 16
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_only_taps_are_visited_and_no_weight(monkeypatch):
    model = tiny_gpt2()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: pytest.fail("autograd computed a weight's gradient"))
    clipped_sum(model, make_batch(), 0.1, "ghost")


def test_evaluation_between_forward_and_backward_leaves_no_trace():
    model, batch = tiny_gpt2(), make_batch()
    engine = GhostClipping(model, 0.1)
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter)
    losses = author_losses(model, batch)
    with torch.no_grad():
        author_losses(model.eval(), batch)
    author_losses(model.train(), make_batch(seed=3))  # a forward that nobody goes back through
    engine.backward(losses, batch["author"])
    assert close(flat(p.summed_grad for p in model.parameters()), reference.clipped_sum(tiny_gpt2(), as_arrays(batch), 0.1))


def test_hooks_are_taken_off():
    model = tiny_gpt2()
    GhostClipping(model, 0.1).close()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_changed_input_is_an_error_rather_than_a_wrong_norm():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            x = x * 1.0
            y = self.layer(x)
            x.add_(1)
            return (x + y).flatten(1).sum(1)

    model = InPlace()
    with pytest.raises(RuntimeError, match="inplace"):
        engine = GhostClipping(model, 1.0)
        engine.backward(engine.module(torch.ones(2, 4, 3)), torch.arange(2))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_overflow_never_passes_for_a_small_norm(monkeypatch, value):
    bad = torch.tensor([0, value, 0, 0, 0, 0])
    of_lookups = grad_factors.lookup_squared_norms
    overflowing = lambda *tensors: of_lookups(*tensors)._replace(value=of_lookups(*tensors).value + bad)  # noqa: E731
    monkeypatch.setattr(grad_factors, "lookup_squared_norms", overflowing)
    model, batch = tiny_gpt2(), make_batch()
    ours, norms = clipped_sum(model, batch, 0.1, "ghost")
    others = [samples for author, samples in enumerate(as_arrays(batch)) if author != 1]
    assert close(ours, reference.clipped_sum(model, others, 0.1)) and norms.isinf().tolist() == [False, True] + [False] * 4


@pytest.mark.parametrize("seed", range(3))
def test_an_author_whose_tokens_cancel_moves_the_sum_by_the_clip_norm_at_most(seed):
    """Inputs share a direction, output gradients sum to nothing: without rounding up, up to twice as far."""
    torch.manual_seed(seed)
    inputs = torch.randn(1, 200, 512) / 512**0.5 + 3_000 * torch.nn.functional.one_hot(torch.tensor(3), 512)
    gradients = torch.randn(1, 200, 512)
    gradients -= gradients.mean(1, keepdim=True)
    clip_norm = float((gradients[0].double().T @ inputs[0].double()).norm()) / 2
    engine = GhostClipping(Matrix(512, 512), clip_norm)
    weight = engine.module.layer.weight
    weight.summed_grad = torch.zeros(512, 512)
    outputs = engine.module(input_ids=torch.ones(1, 200, dtype=torch.int64), inputs=inputs)
    engine.backward((outputs * gradients).sum((1, 2)), torch.zeros(1, dtype=torch.int64))
    engine.close()
    assert weight.summed_grad.norm() <= 1.001 * clip_norm
