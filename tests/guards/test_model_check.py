"""model_check.py: what is refused at the start of a run, on the user's model, which is restored afterwards."""

import logging
from types import SimpleNamespace

import bugs
import pytest
import torch
from conftest import flat, make_dataset, make_trainer, sample, tiny_gpt2, trainable
from families import LLAMA, SIZES, llama, make_model
from mutation import catches
from planting import find, with_edit
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from author_dp.errors import UserError
from author_dp.guards.clipping_check import strip_expert_index
from author_dp.guards.model_check import ModelCheck, verify_model
from author_dp.guards.sample_independence import check_sample_independence
from author_dp.models.modes import deterministic_train_mode

# --- samples are independent, and causal ----------------------------------------------------------------


class Sees(LlamaForCausalLM):
    """A model whose logits depend on what they should not."""

    def __init__(self, what):
        super().__init__(LlamaConfig(**LLAMA))
        self.what = what

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        table = self.get_input_embeddings().weight.sum(1)[input_ids]  # (samples, tokens)
        seen = {"neighbours": table.mean(), "itself": table[:, :1], "the future": table.flip(1).cumsum(1).flip(1)}[self.what]
        output.logits = output.logits + 0.1 * (seen.unsqueeze(-1) if seen.dim() else seen)
        return output


def test_verify_model_accepts_independent_samples(clipping):
    assert verify_model(Sees("itself"), clipping).error < 1e-5


@pytest.mark.parametrize("what", ["neighbours", "the future"])
def test_trainer_refuses_a_model_that_mixes_samples_or_sees_later_tokens(tmp_path, what, clipping):
    with pytest.raises(UserError, match="--model_name"):
        make_trainer(tmp_path / "out", Sees(what), privacy={"clipping": clipping})
    assert not (tmp_path / "out").exists()


def test_verify_model_refuses_a_bert_that_is_no_decoder():
    sizes = {name: value for name, value in SIZES.items() if name != "pad_token_id"} | {"intermediate_size": 24}
    with pytest.raises(UserError, match=r"sees later tokens.*is_decoder"):
        verify_model(BertLMHeadModel(BertConfig(**sizes)), "ghost")
    assert verify_model(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), "ghost").error < 1e-5


def test_verify_model_refuses_dynamic_rope_within_reach_of_samples():
    def model():
        torch.manual_seed(0)
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
        made = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "max_position_embeddings": 64}, rope_parameters=rope))
        for parameter in made.parameters():  # with the small weights of a new model, attention hardly looks at positions
            nn.init.normal_(parameter, std=0.3)
        return made

    assert verify_model(model(), "ghost", sequence_len=32).error < 1e-5
    with pytest.raises(UserError, match="longer sample"):
        verify_model(model(), "ghost", sequence_len=100)


def test_verify_model_refuses_a_renamed_batch_norm():
    model = llama(True, 0.0)
    model.model.norm = nn.Sequential(model.model.norm, Rows(nn.BatchNorm1d(16)))
    with pytest.raises(UserError, match="--model_name"):
        verify_model(model, "ghost")


def test_verify_model_refuses_a_buffer_that_learns_from_texts():
    model = llama(True, 0.0)
    model.model.norm = nn.Sequential(model.model.norm, Counts())
    with pytest.raises(UserError, match=r"norm\.1\.mean changes with the texts"):
        verify_model(model, "ghost")
    assert model.model.norm[1].mean == 0


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean())
        return x


class Rows(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).view_as(x)


class ReadsOn(nn.Module):
    """A layer in which nan of one sample reaches others, as by a kernel that multiplies by zero what lies beyond its row."""

    def __init__(self, layer, when):
        super().__init__()
        self.layer, self.when = layer, when

    def forward(self, x):
        beyond = x.detach().flatten(0, 1).roll(-1, 0).view_as(x)
        if self.when == "in the backward pass" and x.requires_grad:
            x.register_hook(lambda grad: grad + 0.0 * grad.flatten(0, 1).roll(-1, 0).view_as(x))
        elif self.when == "from the last sample":
            x = x + 0.0 * x[-1:].detach()
        elif self.when == "by a finite number":
            x = x + 0.5 * x.isnan().any()
        elif self.when == "always" or (self.when == "under autocast" and torch.is_autocast_enabled("cpu")):
            x = x + 0.0 * beyond
        return self.layer(x)


@catches("the model check has finite authors only", "guards.clipping_check.nan_embeddings", "torch.nan", "0.0", when="always")
@catches("the model check compares no norm beside a non-finite author", "guards.clipping_check.check_clipping_of_non_finite",
    "if not is_equal or", "if", when="always")  # fmt: skip
@catches("isolation is checked in float32 only", "guards.clipping_check.check_engine", "enabled=bf16", "enabled=False",
    when="under autocast")  # fmt: skip
@catches("isolation is checked for nan only", "guards.clipping_check.check_clipping_of_non_finite", "(100 if bf16 else 1)", "1e9",
    when="by a finite number")  # fmt: skip
@catches("isolation is checked for the author in the middle only", "guards.clipping_check.check_clipping_of_non_finite", "(1, 0)",
    "(1,)", when="from the last sample")  # fmt: skip
@pytest.mark.parametrize(
    "when",
    [
        "always", "by a finite number", "from the last sample", "in the backward pass",
        pytest.param("under autocast", marks=pytest.mark.integration),  # some CPUs emulate bfloat16
    ],
)  # fmt: skip
def test_verify_model_refuses_samples_that_nan_reaches(clipping, when):
    model, bf16 = make_model("gpt2", "untied"), when == "under autocast"
    assert verify_model(model, clipping, bf16=bf16).error < 1e-5
    model.lm_head = ReadsOn(model.lm_head, when)
    words = f"--clipping {clipping}: an author whose gradient is not finite reaches other authors. {'Leave' if bf16 else 'Use'}"
    with pytest.raises(UserError, match=words):
        verify_model(model, clipping, bf16=bf16)


@catches("a clipped sum of nan passes the model check", "guards.clipping_check.check_clipping_of_non_finite",
    " or not all(math.isfinite(global_norm(parameter.summed_grad)) for parameter in parameters)", "")  # fmt: skip
def test_verify_model_refuses_an_engine_that_adds_zero_times_nan(monkeypatch):
    function = find("author_dp.clipping.author_groups.AuthorClipFactors.__init__")
    code = with_edit(function, "None if norms.isfinite().all() else ~norms.isfinite()", "None")
    monkeypatch.setattr(function, "__code__", code)
    with pytest.raises(UserError, match="an author whose gradient is not finite reaches other authors"):
        verify_model(tiny_gpt2(), "ghost")


# --- clipping matches the reference ---------------------------------------------------------------------

CLIP = "author_dp.clipping.author_groups.AuthorClipFactors"
PLANTED = {
    "a rule with a wrong factor": ("author_dp.clipping.layer_rules.conv1d", "(inputs, gradients,", "(inputs, 1.01 * gradients,"),
    "a clipped sum with a wrong factor": (f"{CLIP}.__init__", "(clip_norm / norms)", "(1.01 * clip_norm / norms)"),
    "norms without biases": ("author_dp.clipping.ghost.GhostClipping._clip", "if p not in fallback]",
                                  "if p not in fallback and p.dim() > 1]"),
    "a layer norm without its bias": ("author_dp.clipping.layer_rules.layer_norm",
                                      ", **bias_grad(layer, gradients, authors)", ""),
    "a layer whose tap is lost": ("author_dp.clipping.capture.LayerCapture._attach", "if self._is_muted or",
                                  "if self._is_muted or (self._fallback.is_frozen and isinstance(layer, nn.LayerNorm)) or"),
    "tied weights counted as two": bugs.TIED_COUNTED_AS_TWO,
    "tied weights counted as two, formed": bugs.TIED_COUNTED_AS_TWO_FORMED,
    "one author's gradient twice": ("author_dp.clipping.author_groups.AuthorClipFactors.scale", "self._of_samples",
                                    "self._of_samples.roll(1, 0)"),
    "the other engine without a clip": bugs.NO_CLIP_BY_GRAD_SAMPLE,
}  # fmt: skip


@pytest.mark.parametrize("name", sample(PLANTED, 3))
def test_verify_model_finds_bugs_in_the_clipping(tmp_path, monkeypatch, name):
    place, old, new = PLANTED[name]
    function = find(place)
    monkeypatch.setattr(function, "__code__", with_edit(function, old, new))
    if name == "a layer norm without its bias":  # found out, and then clipped one author at a time: exact, but slower
        assert len(make_trainer(tmp_path, tiny_gpt2()).model_check.fallback_params) == 5
        return
    clipping = "grad_sample" if "other engine" in name else "ghost"
    model = tiny_gpt2()
    if "tied_grad_factors_norm" in place:  # so wide a matrix is not formed for each author of texts as short as the check's
        model = GPT2LMHeadModel(GPT2Config(**{**model.config.to_dict(), "n_embd": 64}))
    with pytest.raises(UserError, match=f"--clipping {clipping}: .* differ from the reference"):
        make_trainer(tmp_path / "out", model, privacy={"clipping": clipping})
    assert not (tmp_path / "out").exists()


def test_verify_model_names_the_parameters_that_differ(tmp_path, monkeypatch):
    function = find("author_dp.clipping.layer_rules.layer_norm")
    code = with_edit(function, "normalized.mul_(gradients)", "normalized.mul_(gradients).mul_(1.1)")
    monkeypatch.setattr(function, "__code__", code)
    with pytest.raises(UserError, match=r"transformer\.h\.0\.ln_1\.weight.* and 2 more"):
        make_trainer(tmp_path, tiny_gpt2())


@pytest.mark.parametrize("kind", ["tied", "lora"])
def test_verify_model_restores_the_model(kind, clipping):
    model = make_model("gpt2", kind, dropout=0.3)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.zero_()
    model.train()
    model.get_submodule("base_model.model.transformer.h.0" if kind == "lora" else "transformer.h.0").eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verify_model(model, clipping)
    assert torch.equal(state, torch.get_rng_state()) and modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and getattr(p, "summed_grad", None) is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_deterministic_train_mode_restores_dropout():
    model = make_model("gpt2", "untied", dropout=0.3)
    with deterministic_train_mode(model):
        assert model.training and model.transformer.drop.p == 0 and model.config.attn_pdrop == 0
    assert model.transformer.drop.p == model.config.attn_pdrop == 0.3


def test_model_check_logs_its_result_and_what_is_frozen(tmp_path, caplog, monkeypatch):
    model = BartForCausalLM(BartConfig(vocab_size=61, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
                                       max_position_embeddings=64))  # fmt: skip
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="transformers"):
        trainer = make_trainer(tmp_path, model, privacy={"noise_multiplier": 0.0})
    assert "clipping matches the reference (max. relative error " in caplog.text
    assert "encoder_attn" in caplog.text and "frozen" in caplog.text
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(trainer.model_check.unused) and all("encoder_attn" in name for name in frozen)
    trainer.train()


def test_model_check_summarizes_what_costs_time_or_is_frozen():
    check = ModelCheck(1.4e-07, set(), [])
    assert check.summary().endswith("clipping matches the reference (max. relative error 1.4e-07).")
    assert check.max_authors(8) == 8
    check = ModelCheck(1.4e-07, {"scale"}, list("abcde"))
    assert "1 parameters have no clipping rule" in check.summary() and "frozen: a, b, c and 2 more." in check.summary()
    assert check.max_authors(8) == 1


def test_strip_expert_index_groups_the_experts_of_a_layer():
    assert strip_expert_index("layers.0.mlp.experts.3.up.weight") == strip_expert_index("layers.0.mlp.experts.5.up.weight")
    assert strip_expert_index("layers.0.encoder_attn.weight") != strip_expert_index("layers.0.self_attn.weight")


def test_verify_model_accepts_a_frozen_base_in_bfloat16():
    model = make_model("llama", "lora")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert verify_model(model, "ghost").error < 0.05


def test_trainer_checks_no_model_without_privacy(tmp_path):
    assert make_trainer(tmp_path, Sees("the future"), privacy={"disable_dp": True}).model_check is None


# --- parameters that are clipped one author at a time ---------------------------------------------------


class OwnScale(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(16) + torch.randn(16) / 9)

    def forward(self, x):
        return self.layer(x * self.scale)


def test_trainer_clips_one_author_at_a_time_without_a_rule(tmp_path):
    def model():
        made = tiny_gpt2()
        torch.manual_seed(3)
        made.transformer.ln_f = OwnScale(made.transformer.ln_f)
        return made

    dataset, updates = make_dataset([1, 2, 3]), []
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
    for knows in (True, False):
        trained = model()
        before = flat(trained.parameters()).clone()
        trainer = make_trainer(tmp_path / str(knows), trained, dataset, privacy=privacy, per_device_train_batch_size=3)
        assert [name for name, p in trained.named_parameters() if p in trainer.model_check.fallback_params] == [
            "transformer.ln_f.scale"
        ]
        if not knows:  # as without the check: the engine itself finds the fallback parameters
            trainer.model_check = SimpleNamespace(max_authors=lambda limit: limit, freeze_fallback=lambda engine: None)
        microbatches = next(iter(trainer.get_train_dataloader())).microbatches
        assert all(batch["num_authors"] == (1 if knows else 3) for batch in microbatches)
        trainer.train()
        updates.append(before - flat(trained.parameters()))
    assert torch.allclose(*updates, atol=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_fallback_params_survive_checkpointing_and_bfloat16(tmp_path, options):
    updates = []
    for name, extra in {"plain": {}, "other": options}.items():
        torch.manual_seed(3)
        model = tiny_gpt2()
        model.transformer.h[0].ln_1 = OwnScale(model.transformer.h[0].ln_1)
        before = flat(model.parameters()).clone()
        privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
        trainer = make_trainer(
            tmp_path / name, model, make_dataset([1, 2, 3]), privacy=privacy, per_device_train_batch_size=3, **extra
        )
        assert len(trainer.model_check.fallback_params) == 1
        trainer.train()
        updates.append(before - flat(model.parameters()))
    assert (updates[0] - updates[1]).norm() < (0.05 if "bf16" in options else 1e-5) * updates[0].norm()


@catches("a rope that remembers", "guards.sample_independence.check_sample_independence", "check_stateless(model, max_len)",
    "pass")  # fmt: skip
def test_check_sample_independence_refuses_a_rope_that_remembers():
    """Its frequencies are in a buffer that is not saved: the next step's gradients would depend on an author of this one."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    config = LlamaConfig(**{**LLAMA, "max_position_embeddings": 24}, rope_parameters=rope)
    with pytest.raises(UserError, match="dynamic rope"):
        check_sample_independence(LlamaForCausalLM(config), 32)
    check_sample_independence(LlamaForCausalLM(config), 24)
