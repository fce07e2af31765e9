"""One model check for all trainings of the same model: it is two thirds of a training on a tiny model.

A test that replaced what they depend on, by `monkeypatch` or by a planted bug, has checks of its own. So has each process that it
starts.
"""

import hashlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from author_dp.guards.model_check import ModelCheck, verify_model
from author_dp.training import setup

FOUND: dict[tuple, ModelCheck] = {}  # with names instead of parameters
RUNNING: pytest.Item | None = None  # the present test
CHECKED_BY = (  # where the code of a check is, and what it calls
    "author_dp.clipping", "author_dp.data", "author_dp.guards", "author_dp.mechanism", "author_dp.models", "author_dp.progress",
    "author_dp.training", "torch", "transformers", "peft", "opacus", "numpy",
)  # fmt: skip
SCALARS = (bool, int, float, str, type(None))


def identity(model: nn.Module) -> tuple | None:
    """Return all that a check depends on: configuration, modules, parameters and buffers. None if there may be more."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in model.modules():
        if "forward" in vars(module) or any(getattr(module, name) for name in hooks):
            return None
    parts: list[Any] = [repr(model), str(getattr(model, "config", None))]
    for module in model.modules():
        parts += [type(module), *((name, value) for name, value in vars(module).items() if isinstance(value, SCALARS))]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, DTensor):
            return None
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        parts += [name, tensor.dtype, tensor.device.type, tensor.requires_grad, hashlib.sha256(values.tobytes()).digest()]
    return tuple(parts)


def verify_once(model: nn.Module, *options: Any) -> ModelCheck:
    """Do what `verify_model` does, and at the same model again only what it did to it."""
    known = identity(model) if RUNNING and shares_checks(RUNNING) else None
    if known is None:
        return verify_model(model, *options)
    key = (known, repr(options))
    if key not in FOUND:
        check = verify_model(model, *options)
        names = {parameter: name for name, parameter in model.named_parameters()}
        FOUND[key] = check._replace(fallback_params={names[parameter] for parameter in check.fallback_params})
        return check
    found, parameters = FOUND[key], dict(model.named_parameters())
    for name in found.unused:
        parameters[name].requires_grad_(False)
    return found._replace(fallback_params={parameters[name] for name in found.fallback_params})


setup.verify_model = verify_once


def shares_checks(item: pytest.Item) -> bool:
    """Return whether a test has replaced nothing that a check could depend on."""
    patch = getattr(item, "funcargs", {}).get("monkeypatch")
    if patch and any(mapping is not os.environ for mapping, *_ in patch._setitem):  # the engines by name, for example
        return False
    targets = [target for target, *_ in patch._setattr] if patch else []
    places = [target.__name__ if isinstance(target, ModuleType) else target.__module__ for target in targets]
    places += [f"author_dp.{item.bug.function}"] if hasattr(item, "bug") else []
    return not any(place.startswith(CHECKED_BY) for place in places)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    global RUNNING
    RUNNING = item
    try:
        return (yield)
    finally:
        RUNNING = None
