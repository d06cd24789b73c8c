"""Checkpoints: read without running code from them, written whole or not at all."""

from __future__ import annotations

import inspect
import io
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

from setpred import losses
from setpred.checkpoint import weights
from setpred.checkpoint.allowlist import allowed_classes, moved
from setpred.checkpoint.untrusted import check_sizes, read_torch_file
from setpred.errors import InputError, shown
from setpred.files import LARGEST_IMAGE, LARGEST_NUMBER, leaves, place, write_atomically
from setpred.losses import HungarianLoss
from setpred.model import SetPredictor
from setpred.schema import ElementSchema

KEY = "setpred"  # where a checkpoint keeps what rebuilds its model
TRAINED = "trained_weights"  # where it keeps them if its "state_dict" has averages, see `setpred.training.EMA`
VERSION = 1
MOST_PARTS = 20_000  # layers and tensors of a model; the deepest of our configurations has some hundred
MOST_BESIDE = 2**24  # numbers that a model holds beside its weights, such as grids of positions
LFS_POINTER = b"version https://git-lfs.github.com/"  # begins the files that stand for weights not downloaded


def build(config: Any, classes: Mapping[str, type]) -> Any:
    """Instantiates `{"class_path": ..., "init_args": {...}}`, nested ones first; other values pass as they are.

    Only classes in `classes` are touched; strings are never imported.

    Raises:
        InputError: a class path outside `classes`, arguments the class does not take, sizes that cannot be meant.
    """
    check_sizes(config, "the checkpoint")
    return _built(config, classes)


def _built(config: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(config, list):
        return [_built(item, classes) for item in config]
    if not isinstance(config, dict):
        return config
    if "class_path" not in config:
        return {key: _built(value, classes) for key, value in config.items()}
    path, arguments = config["class_path"], config.get("init_args") or {}
    if not isinstance(path, str) or path not in classes:
        raise InputError(
            f"the checkpoint asks for {shown(path)}, which is not on the list of allowed classes (the public parts of "
            "setpred); if you trust it, name it with --allow"
        )
    if not isinstance(arguments, dict):
        raise InputError(f"the checkpoint's {path} cannot be built: expected arguments by name, got {shown(arguments)}")
    arguments = {key: _built(value, classes) for key, value in arguments.items()}
    try:
        _check_types(classes[path], arguments)
        return classes[path](**arguments)
    except Exception as error:  # what the arguments of a stranger make a part do is not known
        raise InputError(f"the checkpoint's {path} cannot be built: {error}") from error


def _check_types(part: type, arguments: Mapping[str, Any]) -> None:
    """Raises `TypeError` where an argument is not of the type that the part states, as it may do harm only later."""
    try:
        hints = typing.get_type_hints(part.__init__)
    except NameError:  # types that are imported for type checkers only
        return
    defaults = inspect.signature(part).parameters
    for name, value in arguments.items():
        if name in hints and not (_fits(value, hints[name]) or value is defaults[name].default):
            raise TypeError(f"{name}: expected {hints[name]}, got {shown(value)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; True of what is not understood."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is Callable:
        return callable(value)
    if origin is not None:  # of sequences and dictionaries; their items are numbers, which fail where they are used
        return isinstance(value, list | tuple | dict) or not isinstance(origin, type)
    if hint in (int, float):  # a bool is an int to Python
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or getattr(hint, "_is_protocol", False) or isinstance(value, hint)


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
                "the metrics.csv beside it, and `python -m setpred compare` compares such models"
            )


def read_checkpoint(path: str | os.PathLike[str], *, finite: bool = True) -> dict[str, Any]:
    """The raw content of a checkpoint, on the CPU: tensors and plain types only.

    Args:
        path: a .ckpt, or a release of one (`setpred.commands.release`), which has no optimiser's state.
        finite: False reads weights that are not finite, too.

    Raises:
        InputError: missing, cut short, not a checkpoint, not of this project, or holding anything that would run
            code on loading or take more memory than the file has bytes; weights or an optimiser's state that are not
            finite.
    """
    if not _is_file(path):
        raise InputError(f"no checkpoint at {path}; train one with train.py, or give the path of a .ckpt file")
    try:
        with open(path, "rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check its permissions") from error
    if begins == LFS_POINTER:
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
        raise InputError(
            f"{path} has checkpoint format {shown(record.get('version'))}, this setpred reads {VERSION}; "
            "use the setpred that wrote it"
        )
    for name in ("model", "settings"):
        if name in record:
            record[name] = moved(record[name])
    if finite:
        trained = {name: content.get(name) for name in ("state_dict", TRAINED, "optimizer_states")}
        for keys, value in leaves(trained, str(path)):
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise InputError(
                    f"{path}: {place(keys)} has numbers that are not finite; the training had gone wrong before it was "
                    "saved: use an earlier checkpoint"
                )
    return content


def _is_file(path: str | os.PathLike[str]) -> bool:
    try:
        return Path(path).is_file()
    except ValueError:  # a NUL within the name
        return False


def load_checkpoint(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Checkpoint:
    """Rebuilds a model from the configuration in its checkpoint, runs no code from the file, and loads the weights.

    Args:
        allow: class paths of your own parts that may be built, besides the public ones of setpred.

    Raises:
        InputError: see `read_checkpoint` and `build`; weights that do not fit the model.
    """
    allow, content = list(allow), read_checkpoint(path)
    record, model = content[KEY], rebuilt(content, path, allow=allow)
    data = record.get("data")
    try:
        schema = None if record["schema"] is None else ElementSchema.from_dict(record["schema"])
        image_size = None if model.takes_sets else _whole(data["image_size"], 1, LARGEST_IMAGE)
        for part, name, said in ((model.encoder, "image_size", image_size), (model.decoder, "set_dim", schema)):
            said = getattr(said, name, said)
            if None not in (said, has := getattr(part, name, None)) and has != said:
                raise ValueError(f"its {name} is {said}, but {type(part).__name__} has {has}")
        return Checkpoint(
            model=model.eval(),
            schema=schema,
            seed=_whole(record["seed"]),
            epoch=_whole(content["epoch"]),
            step=_whole(content["global_step"]),
            image_size=image_size,
            data={key: _name(value) if key in ("path", "split") else value for key, value in data.items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its record is damaged ({error!r}); train again or use another checkpoint") from error


def rebuilt(content: Mapping[str, Any], path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> SetPredictor:
    """The model of what `read_checkpoint` read, with its weights; arguments and errors as of `load_checkpoint`."""
    config, allow = content[KEY].get("model"), list(allow)
    if not isinstance(config, dict) or set(config) != {"encoder", "decoder"}:
        raise InputError(
            f"{path} does not say how its model is built (it was not trained by train.py); build the parts "
            'yourself and load its "state_dict"'
        )
    return _model(config, allowed_classes(allow), content["state_dict"], path, public=not allow)


def _whole(value: Any, least: int = 0, most: int = LARGEST_NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"expected a whole number from {least} to {most}, got {shown(value)}")
    return value


def _name(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise ValueError(f"expected a name, got {shown(value)}")
    return value


def _model(
    config: Mapping[str, Any], classes: Mapping[str, type], state: Any, path: str | os.PathLike[str], *, public: bool
) -> SetPredictor:
    """The model with its weights; built without memory first, so that one of another size takes none."""

    def make() -> SetPredictor:
        with _few_parts(path):
            parts = {name: build(config[name], classes) for name in ("encoder", "decoder")}
            for name, part in parts.items():
                is_decoder = hasattr(part, "refine")
                if not isinstance(part, nn.Module) or is_decoder != (name == "decoder") or _is_loss(part):
                    raise InputError(f"{path}: its {name} is {shown(config[name])}, which is none")
            return SetPredictor(**parts)

    try:
        with torch.device("meta"):
            outline = make()
        given = _fitting(outline, state, path)
    except InputError:
        if public:
            raise
        given = None  # one's own parts need not be able to do without memory
    model = make()
    model.load_state_dict(_fitting(model, state, path) if given is None else given)
    return model


def _is_loss(part: nn.Module) -> bool:
    return type(part).__module__.startswith(losses.__name__ + ".")


@contextmanager
def _few_parts(path: str | os.PathLike[str]) -> Iterator[None]:
    """While a model is built: it has no more than `MOST_PARTS` layers and tensors."""
    count = 0

    def another(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_PARTS:
            raise InputError(f"{path} asks for a model of more than {MOST_PARTS} layers and tensors; do not trust it")

    hooks = [
        nn.modules.module.register_module_module_registration_hook(another),
        nn.modules.module.register_module_parameter_registration_hook(another),
        nn.modules.module.register_module_buffer_registration_hook(another),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fitting(model: SetPredictor, state: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of a model in `state`.

    Raises:
        InputError: they do not fit it, or it holds far more numbers beside them.
    """
    prefix = "model."
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected weights by name, got {type(state).__name__}")
    given = {str(name).removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{shown(name)} is unknown" for name in given if name not in wanted]
    for name, value in wanted.items():
        if name in given and _kind(given[name]) != _kind(value):
            expected, got = (" of ".join(_kind(one)[::-1]) for one in (value, given[name]))
            wrong.append(f"{name}: expected {expected}, got {got}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: the weights do not fit the model it describes: {'; '.join(wrong[:3])}{more}")
    if sum(value.numel() for name, value in model.named_buffers() if name not in wanted) > MOST_BESIDE:
        raise InputError(f"{path} asks for a model with more than {MOST_BESIDE} numbers beside its weights")
    return given


def _kind(value: Any) -> tuple[str, str]:
    """Shape and kind of numbers, in words; floats of any length are of one kind."""
    if not isinstance(value, Tensor):
        return "nothing", type(value).__name__
    return str(list(value.shape)), "floats" if value.is_floating_point() else str(value.dtype)


def save_whole(content: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save`, but the file appears under `path` only once it is whole, and an older one stays until then."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def training_loss(content: dict[str, Any], allow: Sequence[str]) -> nn.Module:
    """The loss that a checkpoint was trained with, from its settings; `HungarianLoss` where they name none."""
    config = _settings(content).get("loss")
    if config is None:
        return HungarianLoss()
    loss = build(config, allowed_classes(allow))
    if not isinstance(loss, nn.Module):
        raise InputError(f"the checkpoint's loss {config!r} is not one; expected a class path")
    prefix = "loss."
    weights = {key.removeprefix(prefix): v for key, v in content["state_dict"].items() if key.startswith(prefix)}
    try:
        loss.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the weights of the checkpoint's loss do not fit it: {error}") from error
    return loss.eval()


def training_iterations(content: dict[str, Any]) -> int | None:
    """Descent steps at the epoch of the checkpoint, as `SetPrediction.training_iterations` has them."""
    by_epoch = {int(epoch): steps for epoch, steps in (_settings(content).get("iterations_by_epoch") or {}).items()}
    reached = [epoch for epoch in by_epoch if epoch <= int(content["epoch"])]
    return by_epoch[max(reached)] if reached else None


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    return (content[KEY].get("settings") or {}).get("model") or {}
