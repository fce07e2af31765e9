"""ghost_clipping.py: each rule against its naive twin, and the engine against the others on every family of models."""

import math

import naive
import pytest
import torch
from conftest import VOCABULARY, as_arrays, clipped_sum, flat, make_batch, make_trainer, tiny_gpt2, trainable
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import ghost_clipping
from data_utils import UserError
from ghost_clipping import Authors, Explicit, GhostClipping, Product, lookup_squared_norms, product_squared_norms
from mechanism import author_losses

# --- the models -----------------------------------------------------------------------------------------

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}


def gpt2(tied: bool, dropout: float):
    return tiny_gpt2(tied=tied, dropout=dropout)


def neox(tied: bool, dropout: float):
    config = GPTNeoXConfig(
        **SIZES, intermediate_size=24, tie_word_embeddings=tied, attention_dropout=dropout, hidden_dropout=dropout
    )
    return GPTNeoXForCausalLM(config)


def opt(tied: bool, dropout: float):
    config = OPTConfig(
        **{**SIZES, "pad_token_id": 1}, ffn_dim=24, word_embed_proj_dim=16, tie_word_embeddings=tied, dropout=dropout
    )
    return OPTForCausalLM(config)


def llama(tied: bool, dropout: float):
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied, attention_dropout=dropout))


def mistral(tied: bool, dropout: float):
    return MistralForCausalLM(MistralConfig(**LLAMA, tie_word_embeddings=tied, attention_dropout=dropout))


def qwen2(tied: bool, dropout: float):
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=tied, attention_dropout=dropout))


def qwen3(tied: bool, dropout: float):
    return Qwen3ForCausalLM(Qwen3Config(**LLAMA, tie_word_embeddings=tied, attention_dropout=dropout))


FAMILIES = {maker.__name__: maker for maker in (gpt2, neox, opt, llama, mistral, qwen2, qwen3)}
KINDS = ("tied", "untied", "lora")


def make_model(family: str, kind: str, dropout: float = 0.0) -> nn.Module:
    """A tiny model with random weights and random biases; zeros would hide mistakes."""
    torch.manual_seed(0)
    model = FAMILIES[family](kind == "tied", dropout)
    if kind == "lora":
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=dropout, fan_in_fan_out=family == "gpt2")
        )
    for parameter in trainable(model).values():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return (ours - expected).norm() < tolerance * expected.norm()


# --- against the other engines --------------------------------------------------------------------------


BATCHES = {"short": ([1] * 6, 5), "ragged": ([1, 2, 3, 1, 1, 5], 12)}  # by ghost norms, and by explicit gradients


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sum_equals_the_naive_one_and_that_of_grad_sample(family, kind, batch):
    counts, longest = BATCHES[batch]
    model, batch = make_model(family, kind), make_batch(counts, longest=longest)
    expected_norms = [flat(naive.author_gradient(model, samples)).norm().item() for samples in as_arrays(batch)]
    for clip_norm in (0.3 * sorted(expected_norms)[2], 2 * max(expected_norms)):
        expected = naive.clipped_sum(model, as_arrays(batch), clip_norm)
        ours, norms = clipped_sum(model, batch, clip_norm, "ghost")
        assert norms.tolist() == pytest.approx(expected_norms, rel=1e-5)
        assert close(ours, expected)
        if family == "opt" and kind != "lora":  # Opacus' hooks stumble over its position embedding
            with pytest.raises(UserError, match=r"embed_positions.*--clipping ghost"):
                clipped_sum(model, batch, clip_norm, "grad_sample")
        else:
            assert close(ours, clipped_sum(model, batch, clip_norm, "grad_sample")[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1] * 5, [2] * 5, [4, 1, 2, 4], [3]])
def test_ragged_authors_and_long_samples(kind, counts):
    """Long samples of a narrow model: the explicit gradient is the cheaper way to the norm."""
    model, batch = make_model("llama", kind), make_batch(counts, longest=100)
    assert close(clipped_sum(model, batch, 0.1, "ghost")[0], naive.clipped_sum(model, as_arrays(batch), 0.1))


def per_author_by_autograd(model: nn.Module, batch: dict, clip_norm: float, seed: int) -> torch.Tensor:
    """One backward an author over one forward, whose dropout masks all authors share."""
    torch.manual_seed(seed)
    losses, parameters = author_losses(model.train(), batch), list(trainable(model).values())
    gradients = [flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses]
    return sum(gradient * min(1.0, clip_norm / gradient.norm().item()) for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_with_dropout_the_masks_are_the_same(family, kind):
    model, batch = make_model(family, kind, dropout=0.3), make_batch()
    expected = per_author_by_autograd(model, batch, 0.1, seed=5)
    assert not close(expected, per_author_by_autograd(model, batch, 0.1, seed=6))
    for clipping in ("ghost", "grad_sample"):
        torch.manual_seed(5)
        assert close(clipped_sum(model, batch, 0.1, clipping)[0], expected)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1] * 6, [1, 2, 3, 1, 1, 5]])
def test_bfloat16_agrees_to_its_rounding_and_stays_below_the_clip_norm(kind, counts):
    model, batch = make_model("gpt2", kind), make_batch(counts)
    expected = naive.clipped_sum(model, as_arrays(batch), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        ours, norms = clipped_sum(model, batch, 0.1, "ghost")
        theirs, their_norms = clipped_sum(model, batch, 0.1, "grad_sample")
    assert ours.dtype == norms.dtype == torch.float32
    assert close(ours, expected, 0.05) and close(ours, theirs, 0.02)
    assert norms.tolist() == pytest.approx(their_norms.tolist(), rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(5):
            alone, _ = clipped_sum(model, make_batch([3], seed=seed, longest=15), 1e-3, "ghost")
            assert alone.norm() <= 1e-3 * (1 + 1e-6)


def test_the_trainer_checkpoints_and_rounds_as_asked(tmp_path):
    """The options of a user: the update is that of the naive loop."""
    for name, options in {"plain": {}, "checkpointed": {"gradient_checkpointing": True}, "bf16": {"bf16": True}}.items():
        model = tiny_gpt2()
        before = flat(model.parameters()).clone()
        privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
        trainer = make_trainer(tmp_path / name, model, privacy=privacy, per_device_train_batch_size=6, **options)
        trainer.train()
        expected = naive.clipped_sum(tiny_gpt2(), as_arrays(make_batch()), 0.5) / 6
        tolerance = 0.05 if name == "bf16" else 1e-4
        assert close(before - flat(model.parameters()), expected, tolerance), name


# --- rules and norms against their naive twins ----------------------------------------------------------


def explicit(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([(sum(torch.outer(a, b) for a, b in zip(*pair)) ** 2).sum() for pair in zip(left, right)])


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(3, 20, 30), (40, 5, 7), (8, 16, 16), (1, 1, 1)])
def test_norm_of_a_product_both_ways(tokens, rows, columns, monkeypatch):
    left, right = torch.randn(4, tokens, rows), torch.randn(4, tokens, columns)
    assert torch.allclose(product_squared_norms(left, right), explicit(left, right), rtol=1e-4)
    monkeypatch.setattr(ghost_clipping, "EXPLICIT_ELEMENTS", 1)
    assert torch.allclose(product_squared_norms(left, right), explicit(left, right), rtol=1e-4)


def test_the_cheaper_way_is_taken(monkeypatch):
    shapes = []
    matmul = ghost_clipping.matmul
    monkeypatch.setattr(ghost_clipping, "matmul", lambda a, b: shapes.append((a.shape[-2], b.shape[-1])) or matmul(a, b))
    product_squared_norms(torch.randn(2, 10, 100), torch.randn(2, 10, 50))  # 10 x 150 < 100 x 50
    assert shapes == [(10, 10)] * 2
    product_squared_norms(torch.randn(2, 100, 8), torch.randn(2, 100, 4))  # 100 x 12 > 8 x 4
    assert shapes[2:] == [(8, 4)]


def test_norm_of_a_lookup_counts_equal_ids_together():
    ids, gradients = torch.tensor([[3, 1, 3, 3], [0, 1, 2, 3]]), torch.randn(2, 4, 5)
    expected = [torch.zeros(4, 5).index_add_(0, i, g).square().sum() for i, g in zip(ids, gradients)]
    assert torch.allclose(lookup_squared_norms(ids, gradients), torch.stack(expected), rtol=1e-5)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "linear on more dimensions": (lambda: nn.Linear(6, 5), (3, 2, 4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 4, 6)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 4, 6)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 4, 6)),
    "RMSNorm": (lambda: llama(True, 0.0).model.norm, (3, 4, 16)),
    "RMSNorm of heads": (lambda: qwen3(True, 0.0).model.layers[0].self_attn.q_norm, (3, 4, 2, 8)),
    "Embedding": (lambda: nn.Embedding(7, 5), None),
    "Embedding with padding": (lambda: nn.Embedding(7, 5, padding_idx=2), None),
}


class Calls(nn.Module):
    """Square what a layer makes of each of several inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return sum(self.layer(x).square().flatten(1).sum(1) for x in inputs)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_each_rule_equals_autograd_on_one_sample(name, calls):
    """Called once, and twice with other numbers of tokens: the gradients of the calls add up before the norm."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    model = Calls(make())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inputs = [torch.randn(shape) if shape else torch.randint(7, (3, 9)) for _ in range(calls)]
    inputs[-1] = inputs[-1].repeat(1, 30, *[1] * (inputs[-1].dim() - 2)) if calls > 1 else inputs[-1]
    expected = []
    for sample in range(3):
        (loss,) = model(*(x[sample : sample + 1] for x in inputs))
        expected.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    engine = GhostClipping(model, 2.0)
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter)
    norms = engine.backward(engine.module(*inputs), torch.arange(3))
    assert norms.tolist() == pytest.approx([gradient.norm().item() for gradient in expected], rel=1e-4)
    clipped = sum(gradient * min(1.0, 2.0 / gradient.norm().item()) for gradient in expected)
    assert close(flat(p.summed_grad for p in model.parameters()), clipped, 1e-4)


def test_authors_line_up_and_add_up_their_samples():
    authors = Authors(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    tensor = torch.arange(1.0, 13).view(6, 2, 1)
    assert authors.gather(tensor)[..., 0].tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0], [9, 10, 11, 12, 0, 0]]
    assert authors.sum(tensor)[..., 0].tolist() == [[9, 12], [7, 8], [20, 22]]
    even = Authors(torch.tensor([0, 0, 1, 1, 2, 2]), 3).gather(tensor)
    assert even[..., 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]] and even.data_ptr() == tensor.data_ptr()


# --- what is kept, and what is refused ------------------------------------------------------------------


def test_no_per_author_gradient_of_a_large_layer_is_formed(monkeypatch):
    kept = []
    norms = ghost_clipping.total_squared_norms
    monkeypatch.setattr(ghost_clipping, "total_squared_norms", lambda parts, authors: kept.extend(parts) or norms(parts, authors))
    model = make_model("gpt2", "tied")
    clipped_sum(model, make_batch([2] * 4, longest=4), 0.1, "ghost")
    sizes = [part.gradients[0].numel() for part in kept if isinstance(part, Explicit)]
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
    assert close(flat(p.summed_grad for p in model.parameters()), naive.clipped_sum(tiny_gpt2(), as_arrays(batch), 0.1))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_overflow_never_passes_for_a_small_norm(monkeypatch, value):
    bad = torch.tensor([0, value, 0, 0, 0, 0])
    norms_of_lookups = ghost_clipping.lookup_squared_norms
    monkeypatch.setattr(ghost_clipping, "lookup_squared_norms", lambda *tensors: norms_of_lookups(*tensors) + bad)
    model, batch = tiny_gpt2(), make_batch()
    ours, norms = clipped_sum(model, batch, 0.1, "ghost")
    others = [samples for author, samples in enumerate(as_arrays(batch)) if author != 1]
    assert close(ours, naive.clipped_sum(model, others, 0.1)) and norms.isinf().tolist() == [False, True] + [False] * 4


def test_hooks_are_taken_off():
    model = tiny_gpt2()
    GhostClipping(model, 0.1).close()
    assert not any(module._forward_hooks for module in model.modules())


def refused(layer: nn.Module) -> nn.Module:
    model = tiny_gpt2()
    model.transformer.extra = layer
    return model


class Scaled(nn.Linear):
    """Looks like a layer that has a rule, but is not."""

    def forward(self, x):
        return 2 * super().forward(x)


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "layer",
    [
        Scaled(3, 3), OwnParameter(), nn.Conv1d(3, 3, 1), nn.Embedding(4, 3, max_norm=1.0), nn.LayerNorm((2, 3)),
        nn.Embedding(4, 3, scale_grad_by_freq=True), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_trainable_layer_without_a_rule_is_refused_by_name(layer):
    with pytest.raises(UserError, match=r"transformer\.extra.*--clipping grad_sample"):
        GhostClipping(refused(layer), 0.1)


def test_a_frozen_layer_needs_no_rule():
    GhostClipping(refused(Scaled(3, 3).requires_grad_(False)), 0.1)


def test_two_matrices_that_share_a_weight_are_refused():
    model = tiny_gpt2()
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc"):
        GhostClipping(model, 0.1)


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


def test_product_scales_the_narrower_side():
    authors, factors = Authors(torch.arange(2), 2), torch.tensor([0.5, 2.0])
    for rows, columns in ((3, 9), (9, 3)):
        left, right = torch.randn(2, 4, rows), torch.randn(2, 4, columns)
        total = torch.ones(rows, columns)
        Product(left, right).add_clipped(total, factors, authors)
        expected = 1 + sum(f * a.T @ b for f, a, b in zip(factors, left, right))
        assert torch.allclose(total, expected, atol=1e-5) and math.isclose(authors._scratch[torch.float32].numel(), 2 * 4 * 3)
