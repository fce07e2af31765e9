"""models/quantization.py: a base in fewer bits computes what a float32 one of rounded weights does; LoRA on it is clipped."""

import builtins
import functools
from pathlib import Path

import pytest
import reference
import torch
from conftest import as_arrays, clipped_sum, flat, make_batch, make_dataset, make_trainer, tiny_gpt2, trainable
from families import LLAMA, close
from forked_runs import in_processes
from mutation import catches
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from author_dp.clipping import engine_class
from author_dp.errors import UserError
from author_dp.guards.model_check import verify_model
from author_dp.guards.precision import precision_tolerance_factor
from author_dp.mechanism.losses import author_losses
from author_dp.models import quantization
from author_dp.models.loading import load_base
from author_dp.models.lora import add_lora_adapters, load_adapter, reload_adapter_weights
from author_dp.models.sizes import num_elements

SIZES = {**LLAMA, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
BITS = ("bfloat16", "4 bits")
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    return make_folders(tmp_path_factory.mktemp("bases"))


def make_folders(path: Path) -> dict[str, str]:
    """A folder of each family, weights in float32, the Llama's head its embedding too."""
    torch.manual_seed(0)
    models = {"llama": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), "gpt2": tiny_gpt2(tied=False)}
    for family, model in models.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(path / family)
    return {family: str(path / family) for family in models}


def base(folder: str, bits: str, compute: torch.dtype = torch.float32):
    options = {"dtype": torch.bfloat16}
    if bits == "4 bits":
        options |= {"quantization_config": quantization.nf4_config(compute), "device_map": {"": torch.device("cpu")}}
    return load_base(folder, **options)


def make(folder: str, bits: str, compute: torch.dtype = torch.float32, **lora):
    """LoRA on a base in fewer bits, with random factors."""
    model = quantization.cast_parameters(
        add_lora_adapters(base(folder, bits, compute), lora.pop("targets", ["all-linear"]), r=2, **lora)
    )
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def in_float32(folder: str, model) -> nn.Module:
    """The same LoRA on a plain float32 base, whose weights are what those in fewer bits stand for."""
    plain = add_lora_adapters(load_base(folder), ["all-linear"], r=2)
    theirs = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        weight = theirs[name]
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data, weight.quant_state)
            weight = weight.T if weight.shape != parameter.shape else weight
        parameter.data = weight.data.float().clone().contiguous()
    return plain


@catches("4 bits: the backward pass of other weights", "models.quantization.set_quantized_compute_dtype",
    "layer.weight.quant_state.dtype = dtype", "pass", bits="4 bits")  # fmt: skip
@catches("bfloat16: another product than that of the weights", "models.bfloat16_layers.UpcastMatmul.backward",
    "weight.to(gradient.dtype)", "weight.to(gradient.dtype).round(decimals=2)", bits="bfloat16")  # fmt: skip
@pytest.mark.parametrize("bits", BITS)
def test_it_computes_what_a_float32_model_with_the_rounded_weights_does(folders, bits):
    model, batch = make(folders["llama"], bits), make_batch()
    plain = in_float32(folders["llama"], model)
    with torch.no_grad():
        ours, theirs = (m(input_ids=batch["input_ids"]).logits for m in (model, plain))
    assert ours.dtype == torch.float32 and close(ours, theirs)
    expected = reference.clipped_sum(plain, as_arrays(batch), 0.1)
    assert close(clipped_sum(model, batch, 0.1, "ghost")[0], expected)


@pytest.mark.integration
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_clipped_exactly_and_float32(folders, family, bits):
    model, batch = make(folders[family], bits), make_batch()
    assert precision_tolerance_factor(model) == 1 and verify_model(model, "ghost").error < 1e-5
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point())
    for clipping in ("ghost", "grad_sample"):
        for clip_norm in (0.1, 1e4):
            ours, _ = clipped_sum(model, batch, clip_norm, clipping)
            assert close(ours, reference.clipped_sum(model, as_arrays(batch), clip_norm)), (clipping, clip_norm)


@pytest.mark.integration
@catches("bfloat16: what is trained stays in it", "models.quantization.cast_parameters", "not parameter.is_floating_point()",
    "not parameter.is_floating_point() or parameter.requires_grad")  # fmt: skip
def test_trained_biases_of_a_base_in_bfloat16_are_float32_and_have_a_rule(folders):
    for family in FAMILIES:
        model, batch = make(folders[family], "bfloat16", bias="all"), make_batch()
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
        assert not verify_model(model, "ghost").fallback_params
        assert close(clipped_sum(model, batch, 0.1, "ghost")[0], reference.clipped_sum(model, as_arrays(batch), 0.1))


@catches("4 bits: an evaluation cuts the gradients off", "models.quantization.set_quantized_compute_dtype",
    "layer.support_avx512bf16_for_cpu = False", "pass", bits="4 bits")  # fmt: skip
@pytest.mark.parametrize("bits", BITS)
def test_an_evaluation_leaves_the_gradients_as_they_are(folders, bits):
    """On some CPUs bitsandbytes packs weights for inference, through which no gradient goes back any more."""
    model, batch = make(folders["llama"], bits), make_batch()
    layers = quantization.quantized_layers(model)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds on those
    quantization.set_quantized_compute_dtype(layers, torch.float32)
    expected, _ = clipped_sum(model, batch, 0.1, "ghost")
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"])
    assert torch.equal(clipped_sum(model, batch, 0.1, "ghost")[0], expected)


@pytest.mark.integration
@pytest.mark.parametrize("bits", BITS)
def test_bf16_agrees_to_its_rounding_and_the_proof_is_in_float32(folders, bits):
    model, batch = make(folders["llama"], bits, torch.bfloat16), make_batch()
    assert verify_model(model, "ghost").error < 1e-5
    assert all(layer.compute_dtype == torch.bfloat16 for layer in quantization.quantized_layers(model))
    with torch.autocast("cpu", torch.bfloat16):
        ours, norms = clipped_sum(model, batch, 0.1, "ghost")
    quantization.set_quantized_compute_dtype(quantization.quantized_layers(model), torch.float32)
    assert ours.dtype == norms.dtype == torch.float32 and close(ours, reference.clipped_sum(model, as_arrays(batch), 0.1), 0.05)


@pytest.mark.parametrize("bits", BITS)
def test_checkpointed_layers_change_nothing(folders, bits):
    model, batch = make(folders["llama"], bits), make_batch()
    expected, _ = clipped_sum(model, batch, 0.1, "ghost")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    engine = engine_class("ghost", True)(model, 0.1)
    for parameter in trainable(model).values():
        parameter.summed_grad = torch.zeros_like(parameter)
    engine.backward(author_losses(engine.module, batch), batch["author"])
    engine.close()
    assert close(flat(p.summed_grad for p in trainable(model).values()), expected)


def keep(kept: list, tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


@catches("bfloat16: a copy in float32 waits for the backward pass", "models.bfloat16_layers.UpcastMatmul.forward",
    "save_for_backward(weight)", "save_for_backward(weight.float())")  # fmt: skip
def test_no_float32_copy_of_a_frozen_matrix_waits_for_the_backward_pass(folders):
    for bits in BITS:
        model = make(folders["llama"], bits)
        kept: list = []
        frozen_sizes = {num_elements(p) for p in model.parameters() if not p.requires_grad and p.dim() > 1}
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(keep, kept), lambda t: t):
            model.train()(input_ids=make_batch()["input_ids"][:1, :3])
        lora = {p.data_ptr() for p in trainable(model).values()}
        copies = [t for t in kept if t.dtype == torch.float32 and t.numel() in frozen_sizes and t.data_ptr() not in lora]
        assert not copies, bits


@pytest.mark.integration
@pytest.mark.parametrize("bits", BITS)
def test_steps_with_several_samples_and_microbatches_are_the_reference_ones(folders, tmp_path, bits):
    model = make(folders["llama"], bits)
    before = flat(trainable(model).values()).clone()
    expected = reference.clipped_sum(model, as_arrays(make_batch()), 0.5) / 6
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
    trainer = make_trainer(tmp_path, model, privacy=privacy, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer.train()
    assert close(before - flat(trainable(model).values()), expected, 1e-4)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["llama"]), tmp_path)
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in trainable(model).items())


def one_step(folder: str, bits: str, path) -> torch.Tensor:
    model = make(folder, bits)
    before = flat(trainable(model).values()).clone()
    privacy = {"noise_multiplier": 0.0, "samples_per_author": 9}
    make_trainer(path, model, make_dataset([1, 2, 3, 1, 1, 5]), privacy=privacy, per_device_train_batch_size=3).train()
    return before - flat(trainable(model).values())


@pytest.mark.integration
@pytest.mark.parametrize("bits", BITS)
def test_two_processes_take_the_step_of_the_reference_loop(folders, tmp_path, bits):
    expected = reference.clipped_sum(make(folders["llama"], bits), as_arrays(make_batch()), 0.5) / 6
    first, second = in_processes(tmp_path, 2, one_step, folders["llama"], bits, tmp_path / "run")
    assert torch.equal(first, second) and close(first, expected, 1e-4)


@catches("bfloat16: what an adapter trains in full is rounded", "models.lora.reload_adapter_weights",
    "set_peft_model_state_dict(model, ", "(lambda *_: None)(model, ")  # fmt: skip
def test_what_an_adapter_trains_in_full_is_loaded_exactly(folders, tmp_path):
    """peft makes its places in the base's type, bfloat16."""
    model = make(folders["llama"], "bfloat16", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    again = quantization.cast_parameters(load_adapter(base(folders["llama"], "bfloat16"), str(tmp_path)))
    reload_adapter_weights(again, str(tmp_path))
    ours, theirs = trainable(model), trainable(again)
    assert ours.keys() == theirs.keys() and any("lm_head" in name for name in ours)
    assert all(theirs[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_in_4_bits_does_not_say_what_is_multiplied_in(folders):
    model = quantization.cast_parameters(
        add_lora_adapters(base(folders["llama"], "4 bits", torch.float16), ["all-linear"], r=2), torch.float32
    )
    layers = quantization.quantized_layers(model)
    assert layers and all(layer.compute_dtype == layer.weight.quant_state.dtype == torch.float32 for layer in layers)


# --- what is refused ------------------------------------------------------------------------------------


@catches("4 bits: biases that the layer rounds are trained", "models.quantization.check_quantized_frozen",
    "any(parameter.requires_grad for parameter in layer.parameters(recurse=False))", "False")  # fmt: skip
def test_what_is_in_4_bits_is_not_trained(folders, tmp_path):
    with pytest.raises(UserError, match=r"--lora_modules_to_save q_proj.*--base_dtype bfloat16"):
        quantization.check_quantized_frozen(base(folders["llama"], "4 bits"), ["q_proj"])
    for held in ("mlp", "proj", "model.layers.0.self_attn"):  # names' ends, as peft matches them, and what holds such layers
        with pytest.raises(UserError, match=rf"--lora_modules_to_save {held}: it would train"):
            quantization.check_quantized_frozen(base(folders["llama"], "4 bits"), [held])
    quantization.check_quantized_frozen(base(folders["llama"], "4 bits"), ["lm_head"])
    with pytest.raises(UserError, match="--lora_bias"):
        make_trainer(tmp_path, make(folders["gpt2"], "4 bits", bias="all"))


def test_bitsandbytes_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    def no_import(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_import)
    with pytest.raises(UserError, match=r"--load_in_4bit: bitsandbytes is missing.*pip install.*--base_dtype bfloat16"):
        quantization.nf4_config(torch.float32)
