"""Checkpoints: read without running code from them, written whole or not at all."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from setpred import aggregators, decoders, encoders, inner, losses, weights
from setpred.errors import InputError
from setpred.files import write_atomically
from setpred.model import SetPredictor
from setpred.schema import ElementSchema

KEY = "setpred"  # where a checkpoint keeps what rebuilds its model
VERSION = 1
PART_MODULES: tuple[ModuleType, ...] = (aggregators, decoders, encoders, inner, losses)


def allowed_classes(extra: Iterable[str] = ()) -> dict[str, type]:
    """Class path to class, of all that a checkpoint may ask to be built: the public parts, and `extra`.

    Both the public path (`setpred.encoders.ResNet`) and the defining one (`setpred.encoders.resnet.ResNet`) count.
    The paths of `extra` come from the user, never from a file, and are imported.
    """
    classes: dict[str, type] = {}
    for module in PART_MODULES:
        for name in module.__all__:
            part = getattr(module, name)
            if isinstance(part, type):
                classes[f"{module.__name__}.{name}"] = classes[f"{part.__module__}.{name}"] = part
    for path in extra:
        module_name, _, name = path.rpartition(".")
        try:
            part = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--allow {path}: cannot import it ({error}); expected package.module.Class") from error
        classes[path] = classes[f"{part.__module__}.{part.__qualname__}"] = part
    return classes


def build(config: Any, classes: Mapping[str, type]) -> Any:
    """Instantiates `{"class_path": ..., "init_args": {...}}`, nested ones first; other values pass as they are.

    Only classes in `classes` are touched; strings are never imported.

    Raises:
        InputError: a class path outside `classes`, or arguments the class does not take.
    """
    if isinstance(config, list):
        return [build(item, classes) for item in config]
    if not isinstance(config, dict):
        return config
    if "class_path" not in config:
        return {key: build(value, classes) for key, value in config.items()}
    path = config["class_path"]
    if not isinstance(path, str) or path not in classes:
        raise InputError(
            f"the checkpoint asks for {path!r}, which is not on the list of allowed classes (the public parts of "
            "setpred); if you trust it, name it with --allow"
        )
    arguments = {key: build(value, classes) for key, value in (config.get("init_args") or {}).items()}
    try:
        return classes[path](**arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"the checkpoint's {path} cannot be built: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read: the model with its weights, and what it was trained on."""

    model: SetPredictor
    schema: ElementSchema | None  # None for sets without one, as those of the small worlds
    seed: int
    epoch: int
    step: int
    image_size: int | None  # None where the inputs are sets
    data: dict[str, Any]  # the validation data it was trained with: path, split

    def require_images(self, path: str | os.PathLike[str]) -> None:
        """Raises `InputError` unless the model was trained on images of objects that a schema describes."""
        if self.schema is None or self.image_size is None:
            raise InputError(
                f"{path} was trained on a small world, whose elements have no schema and no images; its scores are in "
                "the metrics.csv beside it, and `python -m setpred.compare` compares such models"
            )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw content of a checkpoint, on the CPU: tensors and plain types only.

    Args:
        path: a .ckpt, or a release of one (`setpred.release`), which has no optimiser's state.

    Raises:
        InputError: missing, cut short, not a checkpoint, not of this project, or holding anything that would run
            code on loading.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}; train one with train.py, or give the path of a .ckpt file")
    if Path(path).suffix == weights.SUFFIX:
        tensors, content = weights.unpack(path)
        content["state_dict"] = tensors
    else:
        content = _read_torch(path)
    record = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(record, dict) or "state_dict" not in content:
        raise InputError(f"{path} is not a checkpoint of setpred: it lacks the record {KEY!r} or the weights")
    if record.get("version") != VERSION:
        raise InputError(
            f"{path} has checkpoint format {record.get('version')!r}, this setpred reads {VERSION}; "
            "use the setpred that wrote it"
        )
    return content


def _read_torch(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote; refuses whatever would run code."""
    damaged = f"{path} is not a checkpoint, or is damaged"
    if not zipfile.is_zipfile(path):  # the only container that torch.save writes; older ones are bare pickles
        raise InputError(f"{damaged}: it is not a whole torch file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, on their way to being refused
            with zipfile.ZipFile(path) as archive:
                flaw = archive.testzip()  # torch itself does not compare the checksums
            if flaw is not None:
                raise InputError(f"{damaged}: the checksum of {flaw} inside does not fit")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line), type(error).__name__)
        raise InputError(
            f"{path} holds more than tensors and plain types and is refused, since loading it could run code "
            f"({reason.strip()})"
        ) from error
    except InputError:
        raise
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(f"{damaged}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def load_checkpoint(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Checkpoint:
    """Rebuilds a model from the configuration in its checkpoint, runs no code from the file, and loads the weights.

    Args:
        allow: class paths of your own parts that may be built, besides the public ones of setpred.

    Raises:
        InputError: see `read_checkpoint` and `build`; weights that do not fit the model.
    """
    content = read_checkpoint(path)
    record = content[KEY]
    config = record.get("model")
    if not isinstance(config, dict) or set(config) != {"encoder", "decoder"}:
        raise InputError(
            f"{path} does not say how its model is built (it was not trained by train.py); build the parts "
            'yourself and load its "state_dict"'
        )
    classes = allowed_classes(allow)
    model = SetPredictor(build(config["encoder"], classes), build(config["decoder"], classes))
    _load_weights(model, content["state_dict"], path)
    data = record.get("data")
    try:
        return Checkpoint(
            model=model.eval(),
            schema=None if record["schema"] is None else ElementSchema.from_dict(record["schema"]),
            seed=int(record["seed"]),
            epoch=int(content["epoch"]),
            step=int(content["global_step"]),
            image_size=None if model.takes_sets else int(data["image_size"]),
            data=dict(data),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its record is damaged ({error!r}); train again or use another checkpoint") from error


def _load_weights(model: SetPredictor, state: Any, path: str | os.PathLike[str]) -> None:
    prefix = "model."
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected weights by name, got {type(state).__name__}")
    given = {str(name).removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in wanted]
    wrong += [
        f"{name}: expected {list(value.shape)}, got {list(getattr(given[name], 'shape', []))}"
        for name, value in wanted.items()
        if name in given and getattr(given[name], "shape", None) != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: the weights do not fit the model it describes: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(given)


def save_whole(content: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save`, but the file appears under `path` only once it is whole, and an older one stays until then."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())
