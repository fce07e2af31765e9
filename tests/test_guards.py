"""guards.py: options and models under which the guarantee would not hold are refused by name."""

import numpy as np
import pytest
from conftest import make_dataset, make_trainer, tiny_gpt2
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from author_dp.errors import UserError
from author_dp.guards import check_model
from author_dp.guards.options import have_shared_authors, validate_options
from dp_utils import PrivacyArguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "--max_grad_norm.*--per_sample_max_grad_norm"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size.*--gradient_accumulation_steps"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"torch_compile": True}, "--torch_compile"),
        ({"use_liger_kernel": True}, "--use_liger_kernel"),
        ({"save_on_each_node": True}, "--save_on_each_node.*ledger"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["c_attn"]}, "--optim"),
    ],
)
def test_options_that_would_change_the_mechanism_are_refused_by_name(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("clipping_of_run", "options", "words"),
    [
        ("grad_sample", {}, "--(gradient|activation)_checkpointing.*--clipping ghost"),
        ("ghost", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ("ghost", {"gradient_checkpointing_kwargs": {"debug": True}}, "use_reentrant.*false"),  # torch's default beside others
        ("ghost", {"gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}, "preserve_rng_state"),
    ],
)
def test_checkpointing_is_refused_where_layers_cannot_be_told_apart(tmp_path, clipping_of_run, options, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, privacy={"clipping": clipping_of_run}, gradient_checkpointing=True, **options)


@pytest.mark.parametrize("name", ["fp16", "deepspeed", "fsdp", "tf32"])
def test_options_that_need_a_gpu_are_refused_by_name(tmp_path, name):
    args = make_trainer(tmp_path).args
    setattr(args, name, True)
    with pytest.raises(UserError, match=f"--{name}"):
        validate_options(args, PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0))


def test_a_model_that_sees_the_future_is_refused_by_itself():
    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="sees later tokens"):
        check_model(BertLMHeadModel(config))
    check_model(tiny_gpt2())


def test_models_that_mix_authors_or_round_noise_are_refused(tmp_path):
    batch_norm, encoder_decoder, half = tiny_gpt2(), tiny_gpt2(), tiny_gpt2().bfloat16()
    batch_norm.transformer.h[0].norm = nn.BatchNorm1d(4)
    encoder_decoder.config.is_encoder_decoder = True
    for model, words in ((batch_norm, r"h\.0\.norm"), (encoder_decoder, "encoder-decoder"), (half, "bfloat16")):
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, model)


def test_one_author_in_common_is_enough_to_share_authors():
    train, held_out, nobody = make_dataset([1, 1, 1]), make_dataset([1, 1], seed=1), make_dataset([1], seed=2)
    foreign = np.setdiff1d(np.arange(5).astype(train.hashes.dtype), train.hashes)
    held_out.hashes, nobody.hashes = np.append(foreign[:1], train.hashes[:1]), foreign[:1]
    assert have_shared_authors(train, held_out) and have_shared_authors(train, {"a": nobody, "b": held_out})
    assert not have_shared_authors(train, nobody) and not have_shared_authors(train, None)
