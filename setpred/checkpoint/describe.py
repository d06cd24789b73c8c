"""Describe models that were built in Python by the class paths and arguments of their parts, and save them."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from setpred.checkpoint import weights
from setpred.checkpoint.allowlist import allowed_classes, moved
from setpred.checkpoint.load import KEY, REVISION, VERSION, load_checkpoint, rebuild_model
from setpred.errors import InputError, shown
from setpred.files import leaves, replacing
from setpred.model import SetPredictor
from setpred.nn import arguments_of
from setpred.schema import ElementSchema

EXAMPLES = 2  # inputs that model and rebuilt model predict


def save_model(
    path: str | os.PathLike[str], model: SetPredictor, schema: ElementSchema | None, *, image_size: int | None = None
) -> None:
    """Write a model that was built in Python as a checkpoint that every command reads.

    The file holds class paths and arguments of the parts, and the weights. Parts of setpred record their arguments;
    decorate those of your own with `setpred.nn.recorded`, and pass `--allow` to the commands. The file gets its name
    only if it loads and the loaded model predicts the same, bit by bit.

    Args:
        path: NAME.ckpt; `setpred release` makes a small file to publish from it.
        model: built from its parts, on any device and in any mode.
        schema: meaning of an element's numbers; None for elements without one, which no command scores.
        image_size: side of the images; the encoder's own by default.

    Raises:
        InputError: see `describe_model`; no image size, a schema of other elements, non-finite weights, a path that
            cannot be written or that commands would read as a release.
    """
    if Path(path).suffix == weights.SUFFIX:
        raise InputError(f"{path}: expected NAME.ckpt, got a name of releases; make one from it with `setpred release`")
    size = getattr(model.encoder, "image_size", None) if image_size is None else image_size
    if size is None and not model.takes_sets:
        raise InputError(f"expected an image_size, since {type(model.encoder).__name__} has none; pass image_size")
    config = describe_model(model, image_size=size)
    record = {"version": VERSION, "revision": REVISION, "model": config, "seed": 0, "data": {"image_size": size}}
    record["schema"] = None if schema is None else schema.to_dict()
    state = {f"model.{name}": value.detach().cpu() for name, value in model.state_dict().items()}
    with replacing(path) as partial, torch.random.fork_rng(devices=[]):
        torch.save({"state_dict": state, "epoch": 0, "global_step": 0, KEY: record}, partial)
        load_checkpoint(partial, allow=own_classes(config))


def describe_model(model: SetPredictor, *, image_size: int | None) -> dict[str, Any]:
    """Describe encoder and decoder in plain types, as `load_checkpoint` builds them.

    Args:
        image_size: side of the images for a trial; not used for a model of sets.

    Raises:
        InputError: a part whose arguments are unknown or no plain types; a model that is not what these arguments
            build, since a part was changed later.
    """
    config = {name: describe(getattr(model, name), name) for name in ("encoder", "decoder")}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    shape = (getattr(model.decoder, "set_size", None) or 4, model.encoder.in_dim) if model.takes_sets else None
    shape = shape or (3, image_size, image_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        rebuilt = rebuild_model({KEY: {"model": config}, "state_dict": state}, "the model", allow=own_classes(config))
        inputs = torch.rand(EXAMPLES, *shape, generator=torch.Generator().manual_seed(0))
        predicted = [
            each.to("cpu", memory_format=torch.channels_last).eval()(inputs) for each in (copy.deepcopy(model), rebuilt)
        ]
    if not torch.equal(*map(torch.nan_to_num, predicted)):
        raise InputError(
            "the model differs from one that is built again from its arguments and weights: a part was changed "
            "after it was built; build it with the arguments it should have"
        )
    return config


def describe(value: Any, place: str) -> Any:
    """Describe a part by `class_path` and `init_args`, inner ones too, and convert other values to plain types.

    Raises `InputError` for a value that is neither; `place` names it in the message.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {key: describe(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item, f"{place}.{number}") for number, item in enumerate(value)]
    if type(value).__module__.partition(".")[0] in ("builtins", "numpy", "torch"):
        raise InputError(
            f"{place}: expected a part of setpred or of your own, a number, a text or a list, got {shown(value)}"
        )
    path, arguments = class_path(value), arguments_of(value)
    if path.startswith("__main__.") or "<locals>" in path:
        raise InputError(f"{place}: expected a class that other programs can import, got {path}; put it into a module")
    if arguments is None:
        raise InputError(
            f"{place}: the arguments that {path} was built with are not known; decorate the class with "
            "setpred.nn.recorded, and give it no arguments without names"
        )
    return {"class_path": path, "init_args": {n: describe(item, f"{place}.{n}") for n, item in arguments.items()}}


def class_path(part: Any) -> str:
    """The path by which a configuration names the class of a part."""
    return moved(f"{type(part).__module__}.{type(part).__qualname__}")


def own_classes(config: dict[str, Any]) -> list[str]:
    """The class paths in a description that need `--allow`."""
    paths = {value for place, value in leaves(config, "the model") if place.rpartition(".")[2] == "class_path"}
    return sorted(paths - allowed_classes().keys())
