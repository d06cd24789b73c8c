"""Load checkpoints without running code from them, and save them atomically."""

import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpred.checkpoint import weights
from setpred.checkpoint.allowlist import allowed_classes, moved
from setpred.checkpoint.untrusted import check_sizes, read_torch_file
from setpred.errors import InputError, shown
from setpred.files import LARGEST_IMAGE, LARGEST_NUMBER, leaves, write_atomically
from setpred.losses import HungarianLoss
from setpred.model import SetPredictor
from setpred.schema import LARGEST_SIZE, UNCALIBRATED, Calibration, ElementSchema

KEY = "setpred"  # entry of a checkpoint that describes its model
TRAINED = "trained_weights"  # entry of the trained weights where "state_dict" has averages, see `setpred.training.EMA`
VERSION = 1
REVISION = 2  # of what the parts compute; an entry of the record, which checkpoints of the first revision lack
CHANGED = {  # parts that computed something else in the first revision
    "setpred.decoders.MESH": "MESH clamps its plans at 1 since; train again, the former computation is not available",
    "setpred.inner.Proximity": "Proximity averages over elements since, instead of summing; a `weight` times the size "
    "of the sets is the former computation",
}


def build(config: Any, classes: Mapping[str, type]) -> Any:
    """Instantiate `{"class_path": ..., "init_args": {...}}`, inner ones first; return other values unchanged.

    Strings are never imported: `classes` maps class paths to classes. Raises `InputError` for other class paths, wrong
    arguments and too large sizes.
    """
    check_sizes(config, "the checkpoint")
    return _build(config, classes)


def _build(config: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(config, list):
        return [_build(item, classes) for item in config]
    if not isinstance(config, dict):
        return config
    if "class_path" not in config:
        return {key: _build(value, classes) for key, value in config.items()}
    path, arguments = config["class_path"], config.get("init_args") or {}
    if not isinstance(path, str) or path not in classes:
        raise InputError(
            f"the checkpoint names {shown(path)}, which is not on the list of allowed classes (setpred's public parts "
            "and torch's layers); add --allow PACKAGE.CLASS if you trust it"
        )
    arguments = _build(arguments, classes)
    try:
        return classes[path](**arguments)
    except Exception as error:  # a part can raise any exception on untrusted arguments
        raise InputError(f"the checkpoint's {path} cannot be built: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model with its weights, and a description of its training."""

    model: SetPredictor
    schema: ElementSchema | None  # None for sets without one, as in the toy data
    seed: int
    epoch: int
    step: int
    image_size: int | None  # None where the inputs are sets
    data: dict[str, Any]  # validation data of the training: path, split
    input_size: int = 1  # elements of its largest input set
    calibration: Calibration = UNCALIBRATED  # from presence to confidence; UNCALIBRATED before a validation

    def decode(self, elements: Tensor, *, threshold: float | None = None) -> list[dict[str, Any]]:
        """Decode predicted elements `[set_size, set_dim]` with the model's calibration; see `ElementSchema.decode`."""
        return self.schema.decode(elements, threshold=threshold, calibration=self.calibration)

    def require_schema(self, path: str | os.PathLike[str]) -> None:
        """Raise `InputError` unless the model was trained on objects with a schema."""
        if self.schema is None and getattr(self.model.decoder, "draws_layers", False):
            raise InputError(f"{path} predicts layers of images, as of object discovery, expected objects of a schema")
        if self.schema is None:
            raise InputError(
                f"{path} predicts elements without a schema, as of the toy tasks: its scores are in the metrics.csv of "
                "its folder; import data of your own with `setpred data import --npz`, which gives them a schema"
            )


LFS_POINTER = b"version https://git-lfs.github.com/"  # begin of a file whose content was not downloaded


def read_checkpoint(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Any]:
    """Read the content of a checkpoint, on the CPU: tensors and plain types.

    Args:
        path: a .ckpt, or a release of one, which lacks the optimiser's state.
        finite: whether to reject non-finite weights and optimiser state.

    Raises:
        InputError: a missing, truncated, damaged or foreign file, code or objects in it, non-finite numbers.
    """
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        advice = "train one with `setpred train`, or give another path"
        if Path(path).name == "best.ckpt" and (last := Path(path).with_name("last.ckpt")).is_file():
            advice = f"this run was not validated yet, but {last} is there"
        raise InputError(f"no checkpoint at {path} that can be read; {advice}")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"expected weights, got a Git LFS pointer in {path}; run `git lfs pull` to download it")
    if Path(path).suffix == weights.SUFFIX:
        tensors, content = weights.unpack(path)
        content["state_dict"] = tensors
    else:
        content = read_torch_file(path)
    record = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(record, dict) or "state_dict" not in content:
        raise InputError(f"{path} is not a checkpoint of setpred: it lacks the record {KEY!r} or the weights")
    if record.get("version") != VERSION:
        version = shown(record.get("version"))
        raise InputError(f"{path} has checkpoint format {version}, expected {VERSION}; use the setpred that wrote it")
    list(leaves(record, str(path)))  # bounds the nesting, also of a release
    record |= {name: moved(record[name]) for name in ("model", "settings") if name in record}
    if record.get("revision") is None:
        named = {value for place, value in leaves(record.get("model"), str(path)) if place.endswith("class_path")}
        for changed in sorted(CHANGED.keys() & named):
            about = f"{path} is of an earlier setpred and may predict other sets than when it was trained"
            warnings.warn(f"{about}: {CHANGED[changed]}", stacklevel=2)
    if finite:
        trained = {name: content.get(name) for name in ("state_dict", TRAINED, "optimizer_states")}
        for place, value in leaves(trained, str(path)):
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{path}: {place} has non-finite numbers; use an earlier checkpoint")
    return content


def load_checkpoint(
    path: str | os.PathLike[str], *, allow: Iterable[str] = (), content: dict[str, Any] | None = None
) -> Checkpoint:
    """Rebuild a model from the description in its checkpoint, and load the weights; no code from the file runs.

    Args:
        path: see `read_checkpoint`.
        allow: class paths of your own parts that may be built, besides the public ones of setpred.
        content: what `read_checkpoint` returned for this path; read again unless given.

    Raises:
        InputError: see `read_checkpoint` and `build`; weights that do not fit the model, a damaged description.
    """
    content = read_checkpoint(path) if content is None else content
    record, model = content[KEY], rebuild_model(content, path, allow=allow)
    try:
        schema = None if record["schema"] is None else ElementSchema.from_dict(record["schema"])
        image_size = None if model.takes_sets else _integer(record["data"]["image_size"], 1, LARGEST_IMAGE)
        set_dim = None if schema is None else schema.set_dim
        if schema is not None:
            model.use_schema(schema)
        for part, name, stated in ((model.encoder, "image_size", image_size), (model.decoder, "set_dim", set_dim)):
            if None not in (stated, actual := getattr(part, name, None)) and actual != stated:
                raise ValueError(f"its {name} is {stated}, but {type(part).__name__} has {actual}")
        return Checkpoint(
            model=model.eval(),
            schema=schema,
            seed=_integer(record["seed"]),
            epoch=_integer(content["epoch"]),
            step=_integer(content["global_step"]),
            image_size=image_size,
            data=dict(record["data"]),
            input_size=_integer(record["data"].get("input_size", 1), 1, LARGEST_SIZE),
            calibration=Calibration.from_dict(record.get("calibration")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its record is damaged ({error!r}); train again or use another checkpoint") from error


def _integer(value: Any, least: int = 0, most: int = LARGEST_NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"expected an integer from {least} to {most}, got {shown(value)}")
    return value


def rebuild_model(content: Mapping[str, Any], path: Any, *, allow: Iterable[str] = ()) -> SetPredictor:
    """Rebuild the model with its weights from the result of `read_checkpoint`; see `load_checkpoint`."""
    config, state, allow = content[KEY].get("model"), content["state_dict"], list(allow)
    if not isinstance(config, dict) or set(config) != {"encoder", "decoder"}:
        raise InputError(
            f'{path} does not say how its model is built; build the parts yourself and load its "state_dict"'
        )
    classes = allowed_classes(allow)

    def make() -> SetPredictor:
        parts = {name: build(config[name], classes) for name in ("encoder", "decoder")}
        for name, part in parts.items():
            if not isinstance(part, nn.Module) or hasattr(part, "refine") != (name == "decoder"):
                raise InputError(f"{path}: expected class_path and init_args of its {name}, got {shown(config[name])}")
        return SetPredictor(**parts)

    try:
        with torch.device("meta"):  # without memory, since sizes may be wrong
            model = make()
        _load_weights(model, state, "model.", path, assign=True)
    except InputError:
        if not allow:
            raise  # a user's own part may need memory in its constructor
    model = make()
    _load_weights(model, state, "model.", path)
    return model


def _load_weights(module: nn.Module, state: Any, prefix: str, path: Any, *, assign: bool = False) -> None:
    """`load_state_dict` of the names with a prefix; raise `InputError` for other names or shapes."""
    try:
        own = {str(name).removeprefix(prefix): v for name, v in state.items() if str(name).startswith(prefix)}
        module.load_state_dict(own, assign=assign)
    except (RuntimeError, AttributeError) as error:
        why = " ".join(str(error).split())[:500]
        raise InputError(f"{path}: the weights do not fit the {type(module).__name__} it describes: {why}") from error


def save_checkpoint(content: Any, path: str | os.PathLike[str]) -> None:
    """Write `content` by `torch.save`, atomically: an earlier file stays until the new one is complete."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def training_loss(content: dict[str, Any], allow: Sequence[str]) -> nn.Module:
    """Rebuild the loss of the training from the content of its checkpoint; `HungarianLoss` where it names none."""
    config = _settings(content).get("loss")
    if config is None:
        return HungarianLoss()
    loss = build(config, allowed_classes(allow))
    if not isinstance(loss, nn.Module):
        raise InputError(f"expected a class path as the checkpoint's loss, got {shown(config)}")
    if hasattr(loss, "use_schema") and content[KEY].get("schema") is not None:
        loss.use_schema(ElementSchema.from_dict(content[KEY]["schema"]))
    _load_weights(loss, content["state_dict"], "loss.", "the checkpoint")
    return loss.eval()


def iterations_at(by_epoch: Mapping[int, int] | None, epoch: int) -> int | None:
    """Return the descent steps at an epoch, see `setpred.training.SetPrediction`; None leaves them to the decoder."""
    reached = [first for first in by_epoch or {} if first <= epoch]
    return by_epoch[max(reached)] if reached else None


def training_iterations(content: dict[str, Any]) -> int | None:
    """Return the descent steps at the epoch of the checkpoint."""
    by_epoch = {int(epoch): steps for epoch, steps in (_settings(content).get("iterations_by_epoch") or {}).items()}
    return iterations_at(by_epoch, int(content["epoch"]))


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    return (content[KEY].get("settings") or {}).get("model") or {}
