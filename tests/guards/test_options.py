"""guards/options.py, and check_model: options and models under which the guarantee would not hold are refused by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from mutation import catches
from torch import nn
from transformers import BertConfig, BertLMHeadModel, TrainingArguments

from author_dp.errors import UserError
from author_dp.guards import check_model
from author_dp.guards.metric_driven import have_shared_authors
from author_dp.guards.model_check import check_sharded_model
from author_dp.guards.options import check_fsdp_options, validate_options
from author_dp.guards.trainer_arguments import REFUSED_OPTIONS
from dp_utils import PrivacyArguments


@catches("the Trainer's clipping on top", "guards.options.check_gradient_options",
    "if args.max_grad_norm and not privacy.disable_dp:", "if False:", options={"max_grad_norm": 1.0},
    words="--max_grad_norm")  # fmt: skip
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
def test_validate_options_names_what_would_change_the_mechanism(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, **options)


@catches("masks that are not replayed", "guards.options.check_checkpointing_options",
    'if not options.get("preserve_rng_state", True)',
    "if False", clipping="ghost",
    options={"gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}},
    words="preserve")  # fmt: skip
@pytest.mark.parametrize(
    ("clipping", "options", "words"),
    [
        ("grad_sample", {}, "--(gradient|activation)_checkpointing.*--clipping ghost"),
        ("ghost", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ("ghost", {"gradient_checkpointing_kwargs": {"debug": True}}, "use_reentrant.*false"),  # torch's default beside others
        ("ghost", {"gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}, "preserve_rng_state"),
    ],
)
def test_check_checkpointing_refuses_what_hides_reruns(tmp_path, clipping, options, words):
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, privacy={"clipping": clipping}, gradient_checkpointing=True, **options)


PRIVACY = {"noise_multiplier": 1.0, "per_sample_max_grad_norm": 1.0}


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_grad_norm=0.0)


@pytest.mark.parametrize("name", ["fp16", "deepspeed", "fsdp", "tf32"])
def test_validate_options_names_options_of_a_gpu(args, name):
    setattr(args, name, True)
    with pytest.raises(UserError, match=f"--{name}: "):
        validate_options(args, PrivacyArguments(**PRIVACY))


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_refused_options_have_a_problem_and_a_remedy(args, name):
    setattr(args, name, True)
    with pytest.raises(UserError, match=rf"^--{name}: .+\. [A-Z]") as error:
        validate_options(args, PrivacyArguments(**PRIVACY))
    assert not str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("given", "privacy", "words"),
    [
        ({"full_shard": True}, {}, r"--fsdp full_shard: .*torch\.distributed\.run"),
        ({"full_shard": True, "base_precision_flag": "--load_in_4bit"}, {}, "--fsdp: .*--load_in_4bit"),
        ({"shared_authors": True}, {}, "--allow_shared_authors: with --save_strategy best"),
        ({}, {"clipping": "grad_sample"}, "--gradient_checkpointing: .*--clipping ghost"),
        ({}, {"adam_noise_correction": True}, "--adam_noise_correction: .*--optim sgd"),
        ({}, {}, None),
        ({"shared_authors": True}, {"disable_dp": True}, None),
        ({"base_precision_flag": "--load_in_4bit"}, {}, None),
    ],
)
def test_validate_options_checks_combinations(args, given, privacy, words):
    args.save_strategy, args.gradient_checkpointing, args.optim = "best", True, "sgd"
    privacy = PrivacyArguments(**PRIVACY, **privacy)
    if words is None:
        return validate_options(args, privacy, **given)
    with pytest.raises(UserError, match=words):
        validate_options(args, privacy, **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", float("nan")), ("learning_rate", -1.0), ("seed", 2**32), ("lr_scheduler_kwargs", "x"),
     ("num_train_epochs", 0), ("max_steps", 0), ("gradient_checkpointing_kwargs", "x")],
)  # fmt: skip
def test_validate_options_names_values_out_of_range(args, name, value):
    args.gradient_checkpointing = True
    setattr(args, name, value)
    with pytest.raises(UserError, match=f"--{name} {value}: "):
        validate_options(args, PrivacyArguments(**PRIVACY))


def test_check_model_refuses_a_model_that_sees_later_tokens():
    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="sees later tokens"):
        check_model(BertLMHeadModel(config))
    check_model(tiny_gpt2())


@catches(
    "a compiled block is not seen", "guards.model_check.is_compiled_model", "module._compiled_call_impl is not None", "False"
)
@catches("a compiled forward is not seen", "guards.model_check.is_compiled_model", "hasattr(forward,", "not hasattr(module,")
def test_trainer_refuses_a_model_that_was_compiled(tmp_path):
    whole, in_place, block, forward, script = torch.compile(tiny_gpt2()), *(tiny_gpt2() for _ in range(4))
    in_place.compile()
    block.transformer.h[1].compile()
    forward.transformer.h[0].forward = torch.compile(forward.transformer.h[0].forward)
    script.transformer.ln_f = torch.jit.script(script.transformer.ln_f)
    names = {"the model": [whole, in_place], r"transformer\.h\.1": [block], r"transformer\.h\.0": [forward],
             r"transformer\.ln_f": [script]}  # fmt: skip
    for name, models in names.items():
        for model in models:
            with pytest.raises(UserError, match=f"--model_name: {name} is compiled"):
                check_model(model)
    with pytest.raises(UserError, match="is compiled"):
        make_trainer(tmp_path, block)
    excepted = tiny_gpt2()
    excepted.transformer.h[0].forward = torch.compiler.disable(excepted.transformer.h[0].forward)
    check_model(excepted)


def test_check_model_refuses_what_mixes_authors_or_rounds_noise(tmp_path):
    batch_norm, encoder_decoder, half = tiny_gpt2(), tiny_gpt2(), tiny_gpt2().bfloat16()
    batch_norm.transformer.h[0].norm = nn.BatchNorm1d(4)
    encoder_decoder.config.is_encoder_decoder = True
    for model, words in ((batch_norm, r"h\.0\.norm"), (encoder_decoder, "encoder-decoder"), (half, "bfloat16")):
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, model)


@catches("an author in common overlooked beside others", "guards.metric_driven.have_shared_authors", ".any()", ".all()")
def test_have_shared_authors_finds_one_author_in_common():
    train, held_out, nobody = make_dataset([1, 1, 1]), make_dataset([1, 1], seed=1), make_dataset([1], seed=2)
    foreign = np.setdiff1d(np.arange(5).astype(train.hashes.dtype), train.hashes)
    held_out.hashes, nobody.hashes = np.append(foreign[:1], train.hashes[:1]), foreign[:1]
    assert have_shared_authors(train, held_out) and have_shared_authors(train, {"a": nobody, "b": held_out})
    assert have_shared_authors(train, nobody) is False and have_shared_authors(train, None) is False


@catches("authors who are not known taken for others", "guards.metric_driven.have_shared_authors",
    "None if any(", "False if any(")  # fmt: skip
def test_metrics_of_unknown_authors_choose_nothing(tmp_path):
    unknown, steps = make_dataset([1, 1], seed=5), {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    unknown.hashes = None
    for evaluation in (unknown, {"a": unknown}):
        trainer = make_trainer(tmp_path, eval_dataset=evaluation, load_best_model_at_end=True, save_steps=1, **steps)
        with pytest.raises(UserError, match=r"eval_dataset: with .*load_best_model_at_end, .* hashes"):
            trainer.train()
            pytest.fail("not noticed")
    make_trainer(tmp_path, eval_dataset=unknown, **steps).train()  # they only inform


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world_size": 1}, "torch.distributed.run"), ({"optim": "adafactor"}, "--optim adafactor"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end"), ({"clipping": "grad_sample"}, "--clipping grad_sample"),
        ({"disable_dp": True}, "--disable_dp"), ({"dtype": torch.bfloat16}, "float32"),
    ],
)  # fmt: skip
def test_check_fsdp_refuses_what_was_not_verified(change, words):
    options = SimpleNamespace(
        world_size=2, optim="adamw_torch", load_best_model_at_end=False, clipping="ghost", disable_dp=False
    )  # fmt: skip
    check_fsdp_options(options, options)
    check_sharded_model(tiny_gpt2())
    vars(options).update(change)
    with pytest.raises(UserError, match=words):
        check_fsdp_options(options, options)
        check_sharded_model(tiny_gpt2().to(change.get("dtype", torch.float32)))
