"""Tiny models of the families that the clipping engines are tested on, with random weights."""

import torch
from conftest import VOCABULARY, tiny_gpt2, trainable
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
