"""random_ops.py: random operations that mix samples, or that samples share, are found without a list of names."""

import random

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_gpt2
from families import SIZES
from mutation import catches
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from author_dp.errors import UserError
from author_dp.guards.model_check import check_model
from author_dp.guards.random_ops import BATCH_SIZE, RandomOpModelCall, check_random_ops

IDS = torch.arange(BATCH_SIZE * 7).view(BATCH_SIZE, 7) % VOCABULARY
OWN = torch.Generator()
LONGEST = 12  # tokens of the run's samples


class Backward(torch.autograd.Function):
    """Identity whose gradient is sometimes doubled for all samples."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + (torch.rand([]) < 0.5))


def mask(x: torch.Tensor) -> torch.Tensor:
    return x * (torch.rand(x.shape[1:]) > 0.1)


def seeded(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.functional.dropout(x, 0.3)


def top_k(count: int) -> torch.Tensor:
    chosen = torch.zeros(count)
    chosen[torch.rand(count).topk(1).indices] = 1
    return chosen[:, None, None]


# Functions of logits (samples, tokens, vocabulary) in training, and the words with which they are refused.
SHARED = {
    "a permutation of samples": (lambda x: x + x[torch.randperm(len(x))], "permutation or choice"),
    "a permutation by sorting": (lambda x: x + x[torch.rand(len(x)).argsort()], "of other samples change"),
    "a choice of samples": (lambda x: x + x[torch.randint(0, len(x), (len(x),))], "permutation or choice"),
    "a choice of one sample": (lambda x: x + x[torch.multinomial(torch.ones(len(x)), 1)], "shares random numbers"),
    "a choice by ranks": (lambda x: x * (1 + top_k(len(x))), "of other samples change"),
    "a threshold of all samples": (lambda x: x * (torch.rand(len(x), 1, 1) > torch.rand(len(x)).median()), "of other samples"),
    "one mask for all": (lambda x: x * (torch.rand(x.shape[1:]) > 0.1), "shares random numbers"),
    "the first one's coin": (lambda x: x * (0.5 + torch.rand(len(x))[0]), "of other samples change"),
    "a permutation of tokens": (lambda x: x[:, torch.randperm(x.shape[1])], "shares random numbers"),
    "noise for all": (lambda x: x + torch.randn(()), "shares random numbers"),
    "a rare coin": (lambda x: x * 2 if torch.rand(()) < 1e-3 else x, "shares random numbers"),
    "a rare bernoulli": (lambda x: x * (1 + torch.empty(()).bernoulli_(1e-3)), "shares random numbers"),
    "Python's random": (lambda x: x * (0.5 + random.random()), "Python's random or NumPy"),
    "NumPy": (lambda x: x * (0.5 + np.random.rand()), "Python's random or NumPy"),
    "one mask while training only": (lambda x: mask(x) if x.requires_grad else x, "shares random numbers"),
    "one mask for long samples": (lambda x: mask(x) if x.shape[1] > 7 else x, "shares random numbers"),
    "one mask for several samples": (lambda x: mask(x) if len(x) > 6 else x, "more or less often"),
    "one mask under autocast": (lambda x: mask(x) if torch.is_autocast_enabled("cpu") else x, "shares random numbers"),
    "a coin in the backward pass": (Backward.apply, "shares random numbers"),
    "seeded masks": (seeded, "seeds torch's random generators"),
    "a generator of its own": (lambda x: x * torch.rand(x.shape, generator=OWN), "generator of its own"),
}
INDEPENDENT = {
    "nothing": lambda x: x,
    "a mask of each number": lambda x: nn.functional.dropout(x, 0.3),
    "a fused mask of each number": lambda x: torch.native_dropout(x, 0.3, True)[0],  # dropout on a GPU
    "a mask of each sample": lambda x: x * torch.bernoulli(torch.full((len(x), 1, 1), 0.9)),
    "a mask of each token": lambda x: (x.flatten(0, 1) * (torch.rand(x.shape[0] * x.shape[1], 1) > 0.1)).view_as(x),
    "samples second": lambda x: (x.transpose(0, 1) * torch.rand(x.transpose(0, 1).shape)).transpose(0, 1),
    "a coin without effect": lambda x: x * 0 if torch.rand([]) < 0.0 else x,
}


class InTraining(nn.Module):
    """GPT-2 with dropout, and a random function on its logits in training."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.function = tiny_gpt2(dropout=0.1), function
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, position_ids=None):
        output = self.inner(input_ids=input_ids, position_ids=position_ids)
        if self.training:
            output.logits = self.function(output.logits)
        return output


@catches("a coin for all samples", "guards.random_ops.check_shared_random_ops", "if not all(is_close(",
    "if False and not all(is_close(", what="a rare coin")  # fmt: skip
@catches("a coin that is never tossed", "guards.random_ops.RandomOpMode._fill", "tensor.fill_(",
    "tensor.mul_(1) if True else (", what="a rare coin")  # fmt: skip
@catches("a permutation of samples", "guards.random_ops.check_random_op_independence", "if not all(is_close(",
    "if False and not all(is_close(", what="a permutation by sorting")  # fmt: skip
@catches("others keep their texts and numbers", "guards.random_ops.check_random_op_independence",
    "RandomOpMode(dims, other_seed=seed)",
    "RandomOpMode(dims)", what="a choice by ranks")  # fmt: skip
@catches("a choice across samples", "guards.random_ops.check_same_random_ops", "one.scalars != two.scalars", "False",
    what="a choice of samples")  # fmt: skip
@catches("operations of more samples not compared", "guards.random_ops.check_random_op_independence",
    "check_same_random_ops(few, mode.ops)",
    "pass", what="one mask for several samples")  # fmt: skip
@catches("a mask for long samples", "guards.random_ops.check_random_ops", "None in find_random_op_sample_dims(*long) + dims",
    "None in dims", what="one mask for long samples")  # fmt: skip
@catches("random numbers of the backward pass", "guards.random_ops.check_random_ops",
    "record_random_ops(call, ids[:1].expand(num_samples, -1))",
    "record_random_ops(call, ids[:1].expand(num_samples, -1), backward=False)", what="a coin in the backward pass")  # fmt: skip
@catches("layers dropped by Python", "guards.random_ops.record_random_ops", "if python_and_numpy_random_states() != before:",
    "if False:", what="Python's random")  # fmt: skip
@catches("layers dropped by a generator of the model's", "guards.random_ops.record_random_ops", "if op.has_generator",
    "if False", what="a generator of its own")  # fmt: skip
@catches("masks that the model seeds", "guards.random_ops.record_random_ops", "if op.is_seeded", "if False", what="seeded masks")
@pytest.mark.parametrize("what", SHARED)
def test_check_random_ops_refuses_what_samples_share(what):
    function, words = SHARED[what]
    with pytest.raises(UserError, match=words):
        check_random_ops(RandomOpModelCall(InTraining(function).eval(), "autocast" in what), IDS, LONGEST, 1e-4)


@pytest.mark.parametrize("generator", [OWN, np.random.default_rng(0), np.random.RandomState(0), random.Random(0)])
def test_check_random_ops_refuses_a_module_that_holds_a_generator(generator):
    model = tiny_gpt2(dropout=0.1)
    model.transformer.h[1].generator = generator
    with pytest.raises(UserError, match=r"transformer\.h\.1 holds a random generator"):
        check_random_ops(RandomOpModelCall(model, False), IDS, LONGEST, 1e-4)


@pytest.mark.parametrize("what", INDEPENDENT)
def test_check_random_ops_accepts_independent_samples(what):
    model = InTraining(INDEPENDENT[what]).eval()
    state, python = torch.get_rng_state(), random.getstate()
    check_random_ops(RandomOpModelCall(model, False), IDS, LONGEST, 1e-4)
    assert torch.equal(state, torch.get_rng_state()) and random.getstate() == python and not model.inner.training


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_check_model_accepts_checkpointed_layers(dropout):
    """The backward pass restores the generators' states, and reruns their layers."""
    model = tiny_gpt2(dropout=dropout)
    model.activation_checkpointing_enable({"use_reentrant": False})
    check_model(model)


@catches("random operations looked at without dropout", "models.modes.training_mode", "model.train()", "pass", rate=0.05,
    lora=True)  # fmt: skip
@catches("random operations not looked at", "guards.sample_independence.check_sample_independence", "check_random_ops(",
    "(lambda *_: None)(", rate=0.05, lora=False)  # fmt: skip
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_check_model_refuses_layerdrop_unless_it_is_off(rate, lora):
    sizes = {**SIZES, "pad_token_id": 1}
    model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, layerdrop=rate)).eval()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    if not rate:
        return check_model(model)
    with pytest.raises(UserError, match="as LayerDrop does"):
        check_model(model)
