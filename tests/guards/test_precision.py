"""precision.py: a run whose float32 matrix products are rounded does not start, and does not continue."""

import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from mutation import catches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import MechanismError, UserError
from author_dp.guards import precision
from author_dp.guards.launchers import check_accelerate_launcher
from author_dp.guards.model_check import verify_model
from author_dp.guards.precision import check_float32, exact_factors, find_rounding
from author_dp.models.modes import full_precision_sums

CPU = torch.device("cpu")
aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1, aten.addmm_.default: 1}


class RoundedProducts(TorchDispatchMode):
    """Compute float32 matrix products as a device in a lower precision would.

    Args:
        bits: significant bits of the factors: 8 as bfloat16, 11 as TF32, 16 as two bfloat16 numbers.
        parts: sum so many parts of a product, each rounded to bfloat16, as a split reduction of reduced precision does.
    """

    def __init__(self, bits: int = 24, parts: int = 1):
        super().__init__()
        self.bits, self.parts = bits, parts

    def round(self, tensor: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp((mantissa * 2**self.bits).round(), exponent - self.bits)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = PRODUCTS.get(function)
        if first is None or args[first].dtype != torch.float32:
            return function(*args, **(kwargs or {}))
        left, right = self.round(args[first]), self.round(args[first + 1])
        if self.parts > 1:
            pieces = zip(left.tensor_split(self.parts, dim=-1), right.tensor_split(self.parts, dim=-2))
            product = sum((a @ b).bfloat16() for a, b in pieces).float()
            return product if first == 0 else args[0].add_(product) if function is aten.addmm_.default else args[0] + product
        return function(*args[:first], left, right, *args[first + 2 :], **(kwargs or {}))


class MixedRows(TorchDispatchMode):
    """Compute bfloat16 matrix products as oneDNN does with AMX: what lies beyond a row is multiplied by zero."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is aten.mm.default and args[0].dtype == torch.bfloat16 and args[0].shape[1] % 32:
            result = result + 0.0 * args[0].roll(-1, 0).sum(1, keepdim=True)
        return result


@catches("products that mix rows pass", "guards.precision.find_mixed_rows", "left[1::2] = torch.nan", "pass")
@catches("mixed rows are not looked for", "guards.precision.check_float32", "computes_in_bfloat16(model, bf16)", "False")
@catches("mixed rows are looked for under autocast only", "guards.precision.computes_in_bfloat16",
    " or not computes_in_float32(model)", "")  # fmt: skip
def test_check_float32_refuses_bfloat16_products_that_mix_rows():
    frozen = tiny_gpt2()
    frozen.transformer.wte.weight.requires_grad_(False)
    frozen.transformer.wte.weight.data = frozen.transformer.wte.weight.data.bfloat16()
    with MixedRows():
        check_float32(tiny_gpt2(), bf16=False)
        for model, bf16, option in ((tiny_gpt2(), True, "--bf16"), (frozen, False, "--model_name")):
            with pytest.raises(UserError, match=f"{option}: in bfloat16, .*Set ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 in the env"):
                check_float32(model, bf16)
    check_float32(tiny_gpt2(), bf16=True)


class CastsItself(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return nn.functional.linear(x.bfloat16(), self.layer.weight.bfloat16()).float()


@catches(
    "a model's own casts are not seen", "guards.precision.BFloat16Watch.__torch_dispatch__", "self.found |=", "self.found &="
)
def test_verify_model_refuses_mixed_rows_in_a_model_that_casts_itself():
    model = tiny_gpt2(tied=False)
    model.lm_head = CastsItself(model.lm_head).requires_grad_(False)
    with MixedRows():
        check_float32(model, bf16=False)
        with pytest.raises(UserError, match=r"--model_name: in bfloat16, a matrix product .*Set ONEDNN_MAX_CPU_ISA"):
            verify_model(model, "ghost")


@catches("mixed rows are looked for as oneDNN is set now", "guards.precision.find_mixed_rows",
    'with temporarily_set((torch.backends.mkldnn, "enabled", True)):', "if True:")  # fmt: skip
def test_find_mixed_rows_uses_onednn_even_if_it_is_off():
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(torch.backends.mkldnn.enabled)
            return function(*args, **(kwargs or {}))

    torch.backends.mkldnn.enabled = False
    try:
        with Note():
            assert precision.find_mixed_rows(CPU) is None
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.enabled = True
    assert any(seen)


class Open(TrainerCallback):
    """Call a function before a step; without a step number, when training begins."""

    def __init__(self, door, step: int | None = None):
        self.door, self.step = door, step

    def on_train_begin(self, args, state, control, **kwargs):
        if self.step is None:
            self.door()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.door()


@pytest.fixture
def as_before():
    """Undo what a test does to torch's settings."""
    flags = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [flag.fp32_precision for flag in flags]
    for flag in reversed(flags):  # a backend that another test left at "ieee" would not follow torch.backends.fp32_precision
        flag.fp32_precision = "none"
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    for flag, value in zip(flags, before):
        flag.fp32_precision = value


LOW = {"bfloat16": {"bits": 8}, "TF32": {"bits": 11}, "two bfloat16": {"bits": 16}, "sums in bfloat16": {"parts": 2}}


@catches("products whose factors bfloat16 holds exactly", "guards.precision.find_rounding",
    "(TF32_BITS, FLOAT32_BITS, *([BF16_BITS] if bf16 else []))", "(BF16_BITS,)", low="TF32")  # fmt: skip
@pytest.mark.parametrize("low", LOW)
def test_find_rounding_sees_each_lower_precision(low):
    for shape in ((256, 256, 256), (64, 16, 64), (48, 64, 16), (3, 5, 7)):
        assert find_rounding(CPU, {shape}) is None
        with RoundedProducts(**LOW[low]):
            if shape != (3, 5, 7) or low != "sums in bfloat16":
                assert find_rounding(CPU, {shape}), shape


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (64, 1, 64), (7, 4096, 5), (4, 9_000, 3), (64, 768, 2_048)])
@pytest.mark.parametrize("bits", [8, 12, 23])
def test_exact_factors_returns_the_exact_product(shape, bits):
    rows, inner, columns = shape
    left, right, product = exact_factors(rows, inner, columns, bits, CPU)
    assert left.shape == (rows, inner) and right.shape == (inner, columns)
    assert torch.equal(left.double() @ right.double(), product.double())
    # In whatever order: no partial sum can be more than float32 holds exactly.
    assert (left.abs().double() @ right.abs().double()).max() <= 2**24
    assert left.abs().max() >= 2 ** (bits - 1) and (bits > 8 or torch.equal(left.bfloat16().float(), left))


@catches("no look at the precision when training starts", "training.setup.set_up_dp_optimizer", "if not trainer.budget.steps:",
    "if False:", low="TF32")  # fmt: skip
@pytest.mark.parametrize("low", LOW)
def test_a_run_with_rounded_products_does_not_start(tmp_path, low):
    mode = RoundedProducts(**LOW[low])
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Open(mode.__enter__))
    try:
        with pytest.raises(UserError, match="rounded"):
            trainer.train()
    finally:
        mode.__exit__(None, None, None)
    assert PrivacyLedger(tmp_path / "privacy_ledger.jsonl").steps == 0


@catches("sums of bfloat16 factors not looked at", "guards.precision.find_rounding", "*([BF16_BITS] if bf16 else [])", "")
def test_check_float32_checks_sums_of_bfloat16_factors_under_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "matmul", lambda a, b: a.float() @ b.float() if a.dtype == torch.float32 else (a @ b).float())
    make_trainer(tmp_path / "float32").train()
    with pytest.raises(UserError, match="bfloat16 factors"):
        make_trainer(tmp_path / "bf16", bf16=True).train()


@catches("no look at the precision at log lines", "guards.monitors.RunMonitors.start", "(self._precision, ", "(", save="no")
@pytest.mark.parametrize("save", ["no", "steps"])
def test_products_that_become_rounded_end_the_run(tmp_path, save):
    mode = RoundedProducts(11)
    options = {"max_steps": 6, "logging_steps": 3, "save_strategy": save, "save_steps": 3}
    trainer = make_trainer(tmp_path, dataset=make_dataset([1] * 40), **options)
    trainer.add_callback(Open(mode.__enter__, 1))
    try:
        with pytest.raises(MechanismError, match="rounded"):
            trainer.train()
    finally:
        mode.__exit__(None, None, None)
    ledger = PrivacyLedger(tmp_path / "privacy_ledger.jsonl")
    assert ledger.steps == 3 and ledger.failure and not (tmp_path / "checkpoint-3").exists()


SETTINGS = {
    "torch.backends.fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "torch.backends.mkldnn.matmul.fp32_precision": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "torch.set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_trainer_names_a_setting_that_allows_rounding(tmp_path, as_before, name):
    SETTINGS[name]()
    with pytest.raises(UserError, match=r"fp32_precision.*Unset it"):
        make_trainer(tmp_path)
    make_trainer(tmp_path, privacy={"disable_dp": True, "noise_multiplier": None})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("step", "error"), [(None, UserError), (0, UserError), (1, MechanismError)])
def test_train_notices_a_setting_that_changes_later(tmp_path, as_before, name, step, error):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Open(SETTINGS[name], step))
    with pytest.raises(error, match="fp32_precision"):
        trainer.train()
    assert trainer.budget.ledger.steps == (2 if step else 0)


@catches("no look at the settings of each step", "guards.monitors.RunMonitors.on_step", "self._precision.record_settings()",
    "pass")  # fmt: skip
def test_a_setting_of_one_step_is_noticed(tmp_path, as_before):
    trainer = make_trainer(tmp_path, max_steps=6, logging_steps=3)
    trainer.add_callback(Open(lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"), 1))
    trainer.add_callback(Open(lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "ieee"), 2))
    with pytest.raises(MechanismError, match="fp32_precision"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_trainer_refuses_another_default_dtype(tmp_path, as_before, dtype):
    """Sums and noise would have torch's default dtype."""
    model = tiny_gpt2()
    torch.set_default_dtype(dtype)
    with pytest.raises(UserError, match="set_default_dtype"):
        make_trainer(tmp_path, model)


@pytest.mark.parametrize(
    ("variable", "value", "device", "refused"),
    [
        ("NVIDIA_TF32_OVERRIDE", "1", "cuda", True),
        ("NVIDIA_TF32_OVERRIDE", "0", "cuda", False),
        ("NVIDIA_TF32_OVERRIDE", "1", "cpu", False),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "cpu", True),
        ("DNNL_DEFAULT_FPMATH_MODE", "any", "cpu", True),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT", "cpu", False),
    ],
)
def test_rounding_settings_names_environment_variables(monkeypatch, variable, value, device, refused):
    monkeypatch.setenv(variable, value)
    assert any(variable in setting for setting in precision.rounding_settings(device)) == refused


def test_rounding_settings_sees_either_way_to_set_tf32(as_before):
    assert not precision.rounding_settings("cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert precision.rounding_settings("cuda") and not precision.rounding_settings("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision.rounding_settings("cuda") and not precision.rounding_settings("cpu")


@pytest.mark.parametrize("setting", ["torch.backends.fp32_precision", "torch.set_float32_matmul_precision"])
def test_verify_model_disables_tf32_however_it_was_set(as_before, setting):
    SETTINGS[setting]()
    before = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    seen = []
    model = tiny_gpt2()
    model.register_forward_pre_hook(
        lambda *_: seen.append(precision.rounding_settings("cuda") + precision.rounding_settings("cpu"))
    )
    verify_model(model, "ghost")
    assert seen and not any(seen)
    assert before == [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@catches("sums in bfloat16 allowed on a GPU", "models.modes.full_precision_sums",
    '("bf16", "fp16")', '("bf16",)', before=True)  # fmt: skip
@pytest.mark.parametrize("before", [True, False])
def test_train_sums_bfloat16_products_in_float32(tmp_path, before):
    flags, seen = torch.backends.cuda.matmul, []
    flags.allow_bf16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction = before
    try:
        trainer = make_trainer(tmp_path)
        trainer.add_callback(Open(lambda: seen.append(flags.allow_bf16_reduced_precision_reduction), 0))
        trainer.train()
        assert seen == [False] and flags.allow_bf16_reduced_precision_reduction == before
        with full_precision_sums():
            assert not flags.allow_fp16_reduced_precision_reduction
        assert flags.allow_fp16_reduced_precision_reduction == before
    finally:
        flags.allow_bf16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction = True


def test_shapes_of_follows_the_model():
    shapes = precision.shapes_of(tiny_gpt2(tied=False))
    assert (61, precision.NUM_TOKENS, 16) in shapes and (precision.NUM_TOKENS, 16, precision.NUM_TOKENS) in shapes
    check_float32(tiny_gpt2(), bf16=True)


@catches("a compiler that switches TF32 on", "guards.launchers.check_launcher_variables", '(without, "", "false", "0")',
    '(without, "", "false", "0", "inductor")', backend="inductor")  # fmt: skip
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_trainer_refuses_settings_of_accelerate(tmp_path, monkeypatch, backend):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    with pytest.raises(UserError, match=r"ACCELERATE_DYNAMO_BACKEND.*--dynamo_backend"):
        make_trainer(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    accelerator = make_trainer(tmp_path).accelerator
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp8")  # as accelerate launch --mixed_precision sets it
    with pytest.raises(UserError, match="fp8"):
        check_accelerate_launcher(accelerator, bf16=False)


def test_trainer_refuses_bfloat16_of_accelerate_without_bf16(tmp_path, monkeypatch):
    """Autocast would be on, without the rest of the run knowing."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION"):
        make_trainer(tmp_path)
    make_trainer(tmp_path, bf16=True)
