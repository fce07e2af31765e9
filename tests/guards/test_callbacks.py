"""callbacks.py and metric_driven_option: what may follow losses without noise is recorded, or refused."""

import peft
import pytest
import torch
from conftest import COUNTS, make_dataset, make_trainer, tiny_gpt2
from mutation import catches
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DefaultFlowCallback, EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import UserError
from author_dp.guards.callbacks import TRANSFORMERS_CALLBACKS, get_declaration

# --- callbacks and schedulers that are given -----------------------------------------------------------------


def trainer_with(folder, *callbacks, **more):
    evaluation = make_dataset([1, 1], seed=5)
    evaluation.hashes = ~evaluation.hashes  # of no training authors
    given = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **more}
    trainer = make_trainer(folder, eval_dataset=evaluation, **given)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def header(folder) -> dict:
    return PrivacyLedger(folder / "privacy_ledger.jsonl").runs[-1]


class Changes(TrainerCallback):
    """Change something after a training loss was logged."""

    def __init__(self, what: str, event: str):
        self.what, self.seen, self.changed = what, False, False
        self.at = event

    def change(self, args, state, control, optimizer=None, lr_scheduler=None, model=None):
        self.changed = True
        match self.what:
            case "stop":
                control.should_training_stop = True
            case "end the epoch":
                control.should_epoch_stop = True
            case "save":
                control.should_save = not control.should_save
            case "learning rate":
                optimizer.param_groups[0]["lr"] *= 0.5
            case "weight decay":
                optimizer.param_groups[0]["weight_decay"] = 0.5
            case "scheduler":
                lr_scheduler.base_lrs = [rate / 2 for rate in lr_scheduler.base_lrs]
            case "momentum":
                next(iter(optimizer.state.values()))["momentum_buffer"].zero_()
            case "weights":
                with torch.no_grad():
                    next(model.parameters()).mul_(0.5)
            case "steps":
                state.max_steps = 2
            case "the checkpoint that stays":
                state.best_model_checkpoint = "checkpoint-1"
            case "best":
                args.load_best_model_at_end = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen |= "loss" in logs

    def maybe(self, event, args, state, control, optimizer=None, lr_scheduler=None, model=None):
        if event == self.at and self.seen and not self.changed:
            self.change(args, state, control, optimizer, lr_scheduler, model)

    def on_step_begin(self, args, state, control, **kwargs):
        self.maybe("step_begin", args, state, control, kwargs["optimizer"], kwargs["lr_scheduler"], kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        self.maybe("step_end", args, state, control, kwargs["optimizer"], kwargs["lr_scheduler"], kwargs["model"])

    def on_evaluate(self, args, state, control, **kwargs):
        self.maybe("evaluate", args, state, control, kwargs["optimizer"], kwargs["lr_scheduler"], kwargs["model"])


WHATS = (
    "stop",
    "end the epoch",
    "save",
    "learning rate",
    "weight decay",
    "scheduler",
    "momentum",
    "weights",
    "steps",
    "best",
    "the checkpoint that stays",
)


@catches("callbacks that nobody watches", "dp_utils.DPTrainer.__init__", "self.callback_handler = WatchedCallbacks(self)",
    "pass", what="stop", event="step_end")  # fmt: skip
@catches("a callback that sets the learning rate", "guards.callbacks.WatchedCallbacks.snapshot",
    "to_comparable_callback_value(trainer.optimizer),", "id(trainer.optimizer),", what="learning rate",
    event="evaluate")  # fmt: skip
@catches("a callback that takes back a step", "guards.callbacks.count_callback_writes", "tensor._version", "0", what="weights",
    event="step_end")  # fmt: skip
@pytest.mark.parametrize("event", ["step_begin", "step_end", "evaluate"])
@pytest.mark.parametrize("what", WHATS)
def test_a_callback_that_has_declared_nothing_changes_nothing(tmp_path, what, event):
    trainer = trainer_with(tmp_path, changes := Changes(what, event), optim_args="momentum=0.9")
    with pytest.raises(UserError, match=r"callback Changes: it changed .*training losses"):
        trainer.train()
    assert changes.changed and trainer.budget.ledger.steps <= 2  # at once


@pytest.mark.integration
def test_watched_callback_may_watch(tmp_path):
    trainer = trainer_with(tmp_path, Changes("stop", "never"))
    trainer.train()
    assert header(tmp_path)["by_metrics"] is None and trainer.budget.ledger.steps == 4


def test_watched_callback_may_not_return_another_control(tmp_path):
    class Returns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return type(control)(should_training_stop=True)

    with pytest.raises(UserError, match=r"callback Returns: it changed control\.should_training_stop"):
        trainer_with(tmp_path, Returns()).train()


def declared(by: str) -> TrainerCallback:
    return type("Declared", (Changes,), {"follows": by})("stop", "evaluate")


@pytest.mark.integration
@catches("a declaration that subclasses inherit", "guards.callbacks.get_declaration", 'vars(callback_class).get("follows")',
    'getattr(callback_class, "follows", None)')  # fmt: skip
def test_declared_callback_may_change_what_it_declares(tmp_path):
    trainer = trainer_with(tmp_path / "steps", declared("steps"))
    trainer.train()
    assert trainer.budget.ledger.steps == 1 and header(tmp_path / "steps")["by_metrics"] is None
    trainer = trainer_with(tmp_path / "evaluation", declared("evaluation"))
    trainer.train()
    assert trainer.budget.ledger.steps == 1 and header(tmp_path / "evaluation")["by_metrics"] == "callback Declared"
    inherits = type("Inherits", (type(declared("steps")),), {})("stop", "evaluate")
    with pytest.raises(UserError, match="callback Inherits"):
        trainer_with(tmp_path / "inherits", inherits).train()


def early_stopping() -> EarlyStoppingCallback:
    return EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e9)


def test_train_records_early_stopping_in_the_header(tmp_path):
    trainer = trainer_with(tmp_path, early_stopping(), max_steps=6)
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False
    trainer.train()
    assert trainer.budget.ledger.steps < 6
    assert header(tmp_path)["by_metrics"] in ("callback EarlyStoppingCallback", "--metric_for_best_model loss")
    assert get_declaration(early_stopping()) == "evaluation"


def test_watched_callback_may_not_add_another(tmp_path):
    class Adds(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                trainer.add_callback(declared("evaluation"))

    trainer = trainer_with(tmp_path, Adds())
    with pytest.raises(UserError, match=r"callback Adds: it changed the callbacks.*before the training"):
        trainer.train()


def patched(kind, event="on_log") -> TrainerCallback:
    """Return a callback with a method that is set on the object, not in its class."""

    def stop(args, state, control, **kwargs):
        control.should_training_stop = True

    callback = kind()
    setattr(callback, event, stop)
    return callback


@catches("a method set on a callback", "guards.callbacks.WatchedCallbacks.is_watched",
    'getattr(getattr(callback, event), "__func__", None)', "getattr(type(callback), event)", kind=TrainerCallback)  # fmt: skip
@pytest.mark.parametrize("kind", [TrainerCallback, ProgressCallback, type("Declared", (TrainerCallback,), {"follows": "steps"})])
def test_method_set_on_a_callback_is_watched(tmp_path, kind):
    with pytest.raises(UserError, match=f"callback {kind.__name__}: it changed control"):
        trainer_with(tmp_path, patched(kind)).train()


def set_hook(optimizer):
    optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.0))


def innermost(trainer):
    optimizer = trainer.optimizer
    while inner := getattr(optimizer, "optimizer", None) or getattr(optimizer, "original_optimizer", None):
        optimizer = inner
    return optimizer


def dropout(model) -> torch.nn.Module:
    return next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))


DOORS = {  # what a callback that follows training losses may lead to, by other ways than control and learning rate
    "lr_lambdas": (lambda t: t.lr_scheduler.lr_lambdas.__setitem__(0, lambda step: 0.0), "scheduler"),
    "options of the lambda": (lambda t: t.lr_scheduler.lr_lambdas[0].keywords.update(num_training_steps=1), "scheduler"),
    "get_lr": (lambda t: setattr(t.lr_scheduler, "get_lr", lambda: [0.0]), "scheduler"),
    "scheduler.step": (lambda t: setattr(t.lr_scheduler, "step", lambda: None), "scheduler"),
    "inner hook": (lambda t: set_hook(innermost(t)), "optimizer"),
    "optimizer.step": (lambda t: setattr(innermost(t), "step", lambda: None), "optimizer"),
    "sums": (lambda t: t.dp_optimizer.grad_buffer.sums.mul_(9.0), "optimizer"),
    "other sums": (lambda t: setattr(t.dp_optimizer.grad_buffer, "sums", t.dp_optimizer.grad_buffer.sums.clone()), "optimizer"),
    "other probe": (lambda t: setattr(t.dp_optimizer.grad_buffer, "probe", torch.zeros(9)), "optimizer"),
    "shares of noise": (lambda t: setattr(t.dp_optimizer.grad_buffer, "noise_shares", 4), "optimizer"),
    "the noise's draws": (lambda t: setattr(t.dp_optimizer.noise, "num_draws", 0), "optimizer"),
    "save_strategy": (lambda t: setattr(t.args, "save_strategy", SaveStrategy.NO), "args"),
    "save_total_limit": (lambda t: setattr(t.args, "save_total_limit", 1), "args"),
    "learning_rate": (lambda t: setattr(t.args, "learning_rate", 0.1), "args"),
    "adds": (lambda t: t.add_callback(declared("steps")), "callbacks"),
    "removes": (lambda t: t.remove_callback(DefaultFlowCallback), "callbacks"),
    "declares": (lambda t: setattr(type(t.callback_handler.callbacks[-2]), "follows", "steps"), "callbacks"),
    "training_step": (lambda t: setattr(t, "training_step", lambda *_: torch.zeros(())), "function"),
    "dropout": (lambda t: setattr(dropout(t.model), "p", 0.5), "model"),
    "forward": (lambda t: setattr(dropout(t.model), "forward", lambda x: x * 0), "model"),
    "module hook": (lambda t: dropout(t.model).register_forward_hook(lambda *_: None), "model"),
    "buffer": (lambda t: next(t.model.buffers()).zero_(), "model"),
    "freezes": (lambda t: next(t.model.parameters()).requires_grad_(False), "model"),
}


class Door(TrainerCallback):
    def __init__(self, act, event: str):
        self.act, self.event = act, event

    def on_train_begin(self, args, state, control, **kwargs):
        if self.event == "train_begin":
            self.act()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.event == "log" and "loss" in logs:
            self.act()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.event == "evaluate":
            self.act()


@catches("a callback that takes the sums away from the noise", "guards.callbacks.snapshot_callback_attributes",
    "vars(thing).items()",
    "vars(thing).items() if name != 'sums'", name="other sums", event="log")  # fmt: skip
@catches("a hook that sets the learning rate", "guards.callbacks.snapshot_callback_attributes", "vars(thing).items()",
    'vars(thing).items() if name != "_optimizer_step_pre_hooks"', name="inner hook", event="train_begin")  # fmt: skip
@catches("a scheduler known by its state_dict alone", "guards.callbacks.WatchedCallbacks.snapshot",
    ", to_comparable_callback_value(held)", "", name="options of the lambda", event="log")  # fmt: skip
@catches("options that a callback changes", "guards.callbacks.WatchedCallbacks.snapshot", "vars(trainer.args).items()",
    "{}.items()", name="save_strategy", event="log")  # fmt: skip
@catches("a callback that freezes layers", "guards.callbacks.snapshot_callback_module",
    "if held.get(name)]", 'if held.get(name) and name != "_parameters"]',
    name="freezes", event="log")  # fmt: skip
@catches("a callback that brings another", "guards.callbacks.WatchedCallbacks.snapshot", "for other in self.callbacks",
    "for other in []", name="adds", event="log")  # fmt: skip
@catches("a callback that changes dropout", "guards.callbacks.snapshot_callback_module", "type(value) in SCALARS",
    "type(value) is bool", name="dropout", event="log")  # fmt: skip
@pytest.mark.parametrize("event", ["train_begin", "log"])
@pytest.mark.parametrize("name", DOORS)
def test_watched_callback_is_noticed_to_change_anything(tmp_path, name, event):
    act, said = DOORS[name]
    trainer = trainer_with(tmp_path, lr_scheduler_type="linear", optim="adamw_torch")
    dropout(trainer.model).register_buffer("scale", torch.ones(1))
    trainer.add_callback(type("Door", (Door,), {})(lambda: act(trainer), event))  # StopOnSignal comes behind it
    with pytest.raises(UserError, match=f"callback Door: it changed .*{said}.*training losses"):
        trainer.train()
    assert trainer.budget.ledger.steps <= 1


def test_watched_callback_may_not_hook_all_optimizers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_pre_hooks", {})
    trainer = trainer_with(tmp_path)
    hooks = torch_optimizer._global_optimizer_pre_hooks
    trainer.add_callback(Door(lambda: hooks.update({1: lambda *_: None}), "log"))
    with pytest.raises(UserError, match="callback Door: it changed the optimizer"):
        trainer.train()


@pytest.mark.parametrize("name", ["save_strategy", "learning_rate", "removes"])
def test_watched_callback_may_not_change_anything_before_training(tmp_path, name):
    act, said = DOORS[name]
    trainer = trainer_with(tmp_path)
    trainer.add_callback(Door(lambda: act(trainer), "evaluate"))
    with pytest.raises(UserError, match=f"callback Door: it changed .*{said}"):
        trainer.evaluate()


def test_watched_callback_may_not_scale_an_adapter(tmp_path):
    model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=2))
    trainer = trainer_with(tmp_path, model=model)
    layer = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
    trainer.add_callback(Door(lambda: layer.scaling.update(default=9.0), "log"))
    with pytest.raises(UserError, match="callback Door: it changed the model"):
        trainer.train()


def test_trainer_refuses_a_hyperparameter_search(tmp_path):
    trainer = trainer_with(tmp_path)
    for search in (
        trainer.hyperparameter_search,
        lambda: trainer.train(trial={"learning_rate": 1.0}),
        lambda: trainer.train(None, {}),
    ):
        with pytest.raises(UserError, match="hyperparameter_search"):
            search()


def test_transformers_callbacks_exist_and_others_are_watched(tmp_path):
    assert get_declaration(DefaultFlowCallback()) == "steps" and get_declaration(TrainerCallback()) is None
    trainer = trainer_with(tmp_path, report_to=["tensorboard"])
    kinds = {type(callback).__name__: get_declaration(callback) for callback in trainer.callback_handler.callbacks}
    assert kinds.pop("TensorBoardCallback") is None and set(kinds.values()) == {"steps"}, kinds
    assert kinds.keys() - {"StopAtTargetEpsilon", "AnnounceTraining"} <= TRANSFORMERS_CALLBACKS.keys()


def test_callbacks_are_free_without_privacy(tmp_path):
    trainer = trainer_with(tmp_path, Changes("stop", "step_end"), privacy={"disable_dp": True})
    trainer.train()
    assert trainer.state.global_step < 4


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_snapshot_reads_no_tensor(tmp_path):
    """Before and after each callback it is taken: an operation a parameter would be a copy of the model, or a wait."""
    trainer = trainer_with(tmp_path, model=tiny_gpt2(), dataset=make_dataset(COUNTS), optim="adamw_torch")
    trainer.train()
    with CountOperations() as operations:
        trainer.callback_handler.snapshot(trainer.control)
        assert operations.count == 0
        (next(trainer.model.parameters()) == 0).any()
        assert operations.count == 2  # what it counts are operations
