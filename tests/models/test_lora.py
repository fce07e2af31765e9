"""models/lora.py: where LoRA goes, and that what it trains is clipped exactly."""

import pytest
import reference
from conftest import as_arrays, clipped_sum, make_batch, sample, trainable
from families import close, llama, make_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from author_dp.errors import UserError
from author_dp.guards.model_check import verify_model
from author_dp.models.lora import LoraArguments, add_lora_adapters, excluded_layers

OPTIONS = {
    "peft's choice": {},
    "all-linear": {"targets": ["all-linear"]},
    "by name": {"targets": ["q_proj", "down_proj"]},
    "embeddings": {"targets": ["embed_tokens", "q_proj"]},
    "DoRA": {"use_dora": True},
    "rank-stabilized": {"use_rslora": True},
    "the head too": {"modules_to_save": ["lm_head"]},
    "biases too": {"bias": "all"},
    "DoRA, and biases too": {"family": "gpt2", "use_dora": True, "bias": "all"},
}


def make(family: str = "llama", **options):
    model = {"llama": lambda: llama(False, 0.0), "gpt2": lambda: make_model("gpt2", "untied")}[family]()
    model = add_lora_adapters(model, options.pop("targets", None), r=2, **options)
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", sample(OPTIONS))
def test_every_kind_of_adapter_is_clipped_exactly(name):
    model, batch = make(**OPTIONS[name]), make_batch()
    assert verify_model(model, "ghost").error < 1e-5
    assert close(clipped_sum(model, batch, 0.1, "ghost")[0], reference.clipped_sum(model, as_arrays(batch), 0.1))


def test_all_linear_is_all_but_the_head():
    for family in ("llama", "gpt2"):
        names = " ".join(trainable(make(family, targets=["all-linear"])))
        assert "lm_head" not in names and ("down_proj" in names or "mlp.c_proj" in names)


def test_all_linear_is_the_choice_where_peft_has_none():
    model = llama(False, 0.0)
    model.config.model_type = "unheard-of"
    names = " ".join(trainable(add_lora_adapters(model, r=2)))
    assert "down_proj" in names and "lm_head" not in names


def test_a_router_that_returns_more_than_its_product_is_left_out():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8, head_dim=4,
                                         num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    model.model.layers[0].router = Router(8, 8)
    assert excluded_layers(model) == ["model.layers.0.router"]
    assert "router" not in " ".join(trainable(add_lora_adapters(model, ["all-linear"], r=2)))


def test_names_of_no_layer_are_refused_with_the_option():
    with pytest.raises(UserError, match=r"^--lora_target_modules, or another --lora option: it does not fit the model"):
        make(targets=["nothing"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_dim": 0}, "--lora_dim 0"),
        ({"lora_alpha": 0}, "--lora_alpha 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        ({"lora_dropout": float("nan")}, "--lora_dropout nan"),
        ({"enable_lora": False, "base_dtype": "bfloat16"}, "--base_dtype bfloat16: .* Add --enable_lora"),
        ({"enable_lora": False, "load_in_4bit": True}, "--load_in_4bit: .* Add --enable_lora"),
        ({"enable_lora": False, "lora_dim": 4, "lora_alpha": 9}, "^--lora_dim, --lora_alpha: .*all weights are trained. Add it"),
        ({"load_in_4bit": True, "base_dtype": "bfloat16"}, "contradict"),
        ({"load_in_4bit": True, "lora_bias": "all"}, "--lora_bias all: .* --base_dtype bfloat16"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        LoraArguments(**{"enable_lora": True, **options})


def test_options_name_the_precision_of_the_base():
    assert LoraArguments().to_options() is None and LoraArguments().base_precision_flag() is None
    assert LoraArguments(enable_lora=True, base_dtype="float32").base_precision_flag() is None
    assert LoraArguments(enable_lora=True, base_dtype="bfloat16").base_precision_flag() == "--base_dtype bfloat16"
    assert LoraArguments(enable_lora=True, load_in_4bit=True).base_precision_flag() == "--load_in_4bit"
