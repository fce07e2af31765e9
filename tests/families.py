"""Clipping engines to compare, and tiny models of the families they are tested on, with random weights."""

import torch
from conftest import VOCABULARY, flat, tiny_gpt2, trainable
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

from author_dp.clipping import ENGINES, engine_class
from author_dp.mechanism.losses import author_losses

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
TWO_PASS = ("two_pass", "two_pass_unkept")  # the second one keeps no per-author gradients, however small
ALL_ENGINES = (*ENGINES, *TWO_PASS)


def make_model(family: str, kind: str, dropout: float = 0.0) -> nn.Module:
    """Return a tiny model with random weights and biases: zeros would hide mistakes."""
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


def make_engine(name: str, model: nn.Module, clip_norm: float):
    """Return an engine by name; for two passes, checkpoint the model's layers."""
    if name in ENGINES:
        return ENGINES[name](model, clip_norm)
    if not model.is_activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    engine = engine_class("ghost", checkpointed=True)(model, clip_norm)
    if name == "two_pass":  # as in a run, after the model check
        engine.freeze_fallback(set())
    else:
        engine.store.max_kept = 0
    return engine


def run_engine(name: str, model: nn.Module, batch: dict, clip_norm: float = 0.1, *, weights=1.0, prepare=None):
    """Return the flat clipped sum of a microbatch, the norms before clipping, and the closed engine.

    Args:
        weights: of the authors' losses.
        prepare: called with the engine before its forward pass.
    """
    model.train()
    engine = make_engine(name, model, clip_norm)
    if prepare is not None:
        prepare(engine)
    for parameter in trainable(model).values():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    try:
        norms = engine.backward(author_losses(engine.module, batch) * weights, batch["author"])
    finally:
        engine.close()
    return flat(parameter.summed_grad for parameter in trainable(model).values()), norms, engine


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return (ours - expected).norm() < tolerance * expected.norm()
