"""Which classes a file may name: setpred's public parts and torch's modules, and what the user adds with `--allow`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch import nn

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.errors import InputError

PART_MODULES: tuple[ModuleType, ...] = (aggregators, decoders, encoders, inner, losses)


# where the modules of earlier versions are now, of files that name classes in them
MOVED = {"setpred.schedules": "setpred.training", "setpred.callbacks": "setpred.training"}
MOVED |= {"setpred.data.worlds": "setpred.data.toy"}
RENAMED = {"AttentionPool": "PMA", "OrbitPool": "GIGP", "SupersetPool": "INSET"}  # classes of setpred.aggregators
CLASS_PATH = re.compile(r"(setpred(?:\.[a-z_0-9]+)+)\.([A-Z]\w*)")


def moved(value: Any) -> Any:
    """Replace class paths of earlier versions by the present ones, within dictionaries and lists.

    >>> moved({"class_path": "setpred.schedules.StepDecay"}), moved("setpred.decoders.mlp.MLPDecoder")
    ({'class_path': 'setpred.training.StepDecay'}, 'setpred.decoders.MLPDecoder')
    >>> moved(["setpred.aggregators.AttentionPool", "setpred.aggregators.orbits.OrbitPool"])
    ['setpred.aggregators.PMA', 'setpred.aggregators.GIGP']
    """
    if isinstance(value, dict):
        return {key: moved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item) for item in value]
    if not isinstance(value, str) or not (found := CLASS_PATH.fullmatch(value)):
        return value
    module, name = found.groups()
    if f"{module}.".startswith("setpred.aggregators."):
        name = RENAMED.get(name, name)
    for old, new in MOVED.items():
        if module == old or module.startswith(f"{old}."):
            return f"{new}.{name}"
    for part in PART_MODULES:  # the modules within a package may move; what it exports stays
        if f"{module}.".startswith(f"{part.__name__}.") and name in part.__all__:
            return f"{part.__name__}.{name}"
    return value


def public(*modules: ModuleType) -> dict[str, Any]:
    """Path to class or function, of all that modules export.

    Both the public path (`setpred.encoders.ResNet`) and the defining one (`setpred.encoders.resnet.ResNet`) count.
    """
    found: dict[str, Any] = {}
    for module in modules:
        for name in module.__all__:
            if callable(part := getattr(module, name)):
                found[f"{module.__name__}.{name}"] = found[defined_at(part)] = part
    return found


def defined_at(part: Any) -> str:
    """The path of a class or function where it is defined."""
    return f"{part.__module__}.{part.__qualname__}"


def torch_modules() -> dict[str, type]:
    """Path to class, of the layers of `torch.nn`: plain arithmetic, whatever their arguments."""
    found: dict[str, type] = {}
    for name, part in vars(nn).items():
        if isinstance(part, type) and issubclass(part, nn.Module) and part is not nn.Module:
            found[f"torch.nn.{name}"] = found[defined_at(part)] = part
    return found


def named(paths: Iterable[str]) -> dict[str, Any]:
    """Path to class, of what the user names with `--allow`; these paths never come from a file, and are imported.

    Raises:
        InputError: one cannot be imported.
    """
    found: dict[str, Any] = {}
    for path in paths:
        module_name, _, name = path.rpartition(".")
        try:
            part = found[path] = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--allow {path}: cannot import it ({error}); expected package.module.Class") from error
        if hasattr(part, "__qualname__"):
            found[defined_at(part)] = part
    return found


def allowed_classes(extra: Iterable[str] = ()) -> dict[str, type]:
    """Path to class, of all that a checkpoint may ask to be built: the public parts, torch's modules, and `extra`."""
    parts = {path: part for path, part in public(*PART_MODULES).items() if isinstance(part, type)}
    return parts | torch_modules() | named(extra)
