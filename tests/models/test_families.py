"""benchmarks/models.py: families of models, tiny, clipped exactly by both engines or refused for a reason that is known."""

import contextlib
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from models import difference, try_out
from tiny import build, classes

from author_dp.clipping.positions import shares_positions
from author_dp.guards.model_check import verify_model
from author_dp.models.modes import deterministic_train_mode

pytestmark = pytest.mark.integration  # the first one imports every class of transformers

FAMILIES = "bloom cohere2 falcon gemma2 gemma3_text glm4 granite mamba olmo2 phi3 qwen3_moe smollm3".split()
NOT_BY_OPACUS = {("falcon", "full"), ("gemma2", "full"), ("gemma3_text", "full"), ("qwen3_moe", "full"), ("qwen3_moe", "lora")}
NOT_CAUSAL = set(
    "bert bert-generation big_bird camembert cpmant data2vec-text electra ernie megatron-bert prophetnet rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod".split()
)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_grad_sample_equals_a_plain_loop(model_type, kind):
    verdict = try_out(model_type, kind, "grad_sample")
    assert verdict.kind == ("refused" if (model_type, kind) in NOT_BY_OPACUS else "exact"), verdict.remark
    if verdict.kind == "refused":
        assert "--clipping ghost" in verdict.remark


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm"])
def test_what_sees_the_future_is_refused(model_type):
    verdict = try_out(model_type, "lora")
    assert verdict.kind == "refused" and "sees later tokens" in verdict.remark


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert"])
def test_models_keep_their_own_positions(model_type):
    """RoBERTa's start behind the id of padding: whoever hands it 0, 1, 2, ... trains another model."""
    model = build(model_type, is_decoder=True)
    assert not shares_positions(model)
    assert verify_model(model, "ghost", sequence_len=24).error < 1e-5
    with deterministic_train_mode(model):
        assert max(difference(model, "ghost", per_author) for per_author in (1, 2)) < 1e-5


@pytest.mark.parametrize(("model_type", "shares"), [("gpt2", True), ("llama", False), ("bloom", False), ("opt", False)])
def test_positions_are_handed_only_to_models_whose_samples_share_them(model_type, shares):
    model = build(model_type)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    assert shares_positions(model) == shares
    assert torch.equal(state, torch.get_rng_state()) and modes == [module.training for module in model.modules()]


@pytest.mark.parametrize(("kind", "least"), [("full", 65), ("lora", 70)])
def test_every_class_is_exact_or_refused_for_what_is_known(kind, least):
    """Each class in full or with LoRA, in turn, and FAMILIES both ways: `python benchmarks/models.py` tries all both ways."""
    verdicts = {}
    for number, model_type in enumerate(classes()):
        if model_type not in FAMILIES and number % 2 == (kind == "full"):
            continue
        with contextlib.suppress(Exception):  # the recipe does not fit every class; what fails later is a verdict
            verdicts[model_type] = try_out(model_type, kind)
    bad = {model_type: verdict for model_type, verdict in verdicts.items() if verdict.kind in ("wrong", "traceback")}
    assert not bad
    refused = {model_type for model_type, verdict in verdicts.items() if verdict.kind == "refused"}
    assert refused <= NOT_CAUSAL, {model_type: verdicts[model_type].remark for model_type in refused - NOT_CAUSAL}
    assert sum(verdict.kind == "exact" for verdict in verdicts.values()) >= least
    assert all(verdicts[model_type].kind == "exact" for model_type in FAMILIES)
    # Experts are trained in full, and with LoRA.
    assert any("experts.down_proj" in name for name, _ in build("qwen3_moe").named_parameters())
    assert kind == "lora" or "by fallback" in verdicts["qwen3_moe"].remark
