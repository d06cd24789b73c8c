"""The classes that a file may name: setpred's public parts, torch's layers, and those of `--allow`."""

import importlib
import os
import re
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch import nn

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.errors import InputError, located

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
    if module.startswith("setpred.decoders") and name == "SinePosition":
        return f"setpred.encoders.{name}"
    for part in PART_MODULES:  # the modules within a package may move; what it exports stays
        if f"{module}.".startswith(f"{part.__name__}.") and name in part.__all__:
            return f"{part.__name__}.{name}"
    return value


def public_parts(*modules: ModuleType) -> dict[str, Any]:
    """Map paths to the exported classes and functions, by public path and by that of the definition."""
    exported = [(module, name) for module in modules for name in module.__all__ if callable(getattr(module, name))]
    return _by_path((f"{module.__name__}.{name}", getattr(module, name)) for module, name in exported)


def torch_modules() -> dict[str, type]:
    """Map paths to the layers of `torch.nn`: plain arithmetic for all arguments."""
    layers = [(name, part) for name, part in vars(nn).items() if isinstance(part, type) and issubclass(part, nn.Module)]
    return _by_path((f"torch.nn.{name}", part) for name, part in layers if part is not nn.Module)


def imported(paths: Iterable[str]) -> dict[str, Any]:
    """Import the classes that a user names with `--allow`; the paths must never come from a file.

    A module that is not installed is taken from the working folder.
    """
    found: dict[str, Any] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            found |= _by_path([(path, getattr(_module(module), name))])
        except Exception as error:  # a module of a user can raise any exception
            raise InputError(
                f"--allow {path}: cannot import it: {located(error)}; expected package.module.Class"
            ) from error
    return found


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        folder = os.getcwd()  # on the path of `python -m setpred` and `python train.py`, not of `setpred`
        if folder in sys.path or error.name != name.partition(".")[0]:
            raise
        sys.path.append(folder)  # it stays: the module may import others later
        importlib.invalidate_caches()
        return importlib.import_module(name)


def _by_path(parts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, part in parts:
        found[path] = part
        if hasattr(part, "__qualname__"):
            found[f"{part.__module__}.{part.__qualname__}"] = part
    return found


def allowed_classes(extra: Iterable[str] = ()) -> dict[str, type]:
    """Map paths to the classes that a checkpoint may name: public parts, torch's layers, and `extra` paths."""
    parts = {path: part for path, part in public_parts(*PART_MODULES).items() if isinstance(part, type)}
    return parts | torch_modules() | imported(extra)
