"""Take a model's sizes from its data: no number is written twice, and a default model fits any schema."""

import inspect
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

from setpred.checkpoint.untrusted import read_yaml
from setpred.data.datamodule import DataSizes, SetDataModule
from setpred.data.hdf5 import InputSets, file_header, open_set_file, read_sets
from setpred.errors import InputError
from setpred.schema import ElementSchema
from setpred.training.task import SCHEMAS

FILES = (".h5", ".hdf5")
DEFAULT_STEPS = 1500  # of a training without a configuration, whatever the size of the data
BATCH = 32
MOST_EPOCHS = 200
SPARE = 2  # elements for images more than the fullest has objects: where two share an object, none is missed
WINDOWS = 32  # of a long vector, about
VECTOR_TOKENS = 16  # of a short one
SET_WEIGHT = 20.0  # of positions, which the inputs of sets state more precisely than an image does
SET_LEARNING_RATE = 1e-3  # transformer layers diverge at the quickstart's
LEAST_WEIGHT = 8.0  # of positions in the energy: the quickstart's, for objects that are far apart or differ in class


def fill_sizes(config: Namespace) -> None:
    """Fill what the parts of a configured model require and the data know, in place.

    These are `set_size`, `set_dim` and `image_size`, of input sets `input_dim`, `input_offset` and `input_scale`,
    wherever a part requires them and the configuration does not give them, and the schema.
    """
    if "model" not in config:
        return
    sizes, named = data_sizes(config.get("data")), _named(config.model.get("schema"))
    if sizes is None and named is not None:  # of data that do not describe themselves
        sizes = DataSizes(named, named.max_objects, None)
    if sizes is None:
        return
    known = {"set_size": sizes.set_size, "set_dim": sizes.schema.set_dim, "image_size": sizes.image_size}
    if (inputs := sizes.inputs) is not None:
        known |= {"input_dim": inputs.dim, "input_offset": list(inputs.offset), "input_scale": list(inputs.scale)}
    for part in vars(config.model).values():
        _fill(part, known)
    if named is not None and sizes.schema != named:
        config.model.schema = sizes.schema.to_dict()


def _named(schema: Any) -> ElementSchema | None:
    return SCHEMAS.get(schema) if isinstance(schema, str) else None


def data_sizes(data: Any) -> DataSizes | None:
    """The sizes of a configured data module; None if it does not describe them."""
    if not isinstance(data, Namespace) or not isinstance(data.get("class_path"), str):
        return None
    describe = getattr(_imported(data.class_path), "sizes", None)
    return None if describe is None else describe(dict(vars(data.get("init_args") or Namespace())))


def _imported(path: str) -> Any:
    """The class of a path, if its module is imported already: a path in a file is no reason to import it."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def precise(sizes: DataSizes) -> int:
    """Count the numbers at the head of an element that are positions and extents."""
    count = 0
    for field in sizes.schema.fields:
        if field.categorical or (count and field.name != "extent"):
            break
        count += field.size
    return count


def spacing(path: str | os.PathLike[str], images: int = 500) -> float | None:
    """Median distance from an object to the nearest other one in its image, in stored units; None without pairs.

    Args:
        images: how many images of the prepared file to read at most, evenly spread.
    """
    header = file_header(path)
    with open_set_file(path) as file:
        sets = read_sets(file, header, path).elements
    nearest = []
    for elements in sets[:: -(-len(sets) // images)]:
        places = torch.from_numpy(elements[elements[:, -1] > 0.5][:, header.schema.slice("coords")])
        if len(places) > 1:
            nearest.append(torch.cdist(places, places).fill_diagonal_(math.inf).amin(1))
    return float(torch.cat(nearest).median()) if nearest else None


def _fill(value: Any, known: dict[str, Any]) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _fill(item, known)
    if not isinstance(value, Namespace):
        return
    arguments = value.get("init_args")
    if isinstance(value.get("class_path"), str) and isinstance(arguments, Namespace):
        part = _imported(value.class_path)
        parameters = inspect.signature(part).parameters if callable(part) else {}
        for name, number in known.items():
            required = name in parameters and parameters[name].default is inspect.Parameter.empty
            if required and number is not None and arguments.get(name) is None:
                arguments[name] = number
    for item in vars(value if arguments is None else arguments).values():
        _fill(item, known)


def expanded_data(
    configs: Sequence[str], arguments: Sequence[str], default: Path
) -> tuple[Sequence[str], Sequence[str]]:
    """Expand `--data FILE.h5 --val FILE.h5` to options of a data module and, without `--config`, to a default model.

    `configs` are the values of `--config`, `arguments` the others; returns both. `default` is the default model's file.

    Raises:
        InputError: no `--val`; a file that cannot be read.
    """
    arguments = list(arguments)
    train, val = (_taken(arguments, name) for name in ("--data", "--val"))
    if train is None:
        if val is not None:
            raise InputError("--val: expected --data FILE.h5 with it, got none; give both")
        return configs, arguments
    if val is None:
        raise InputError(f"--data {train}: expected validation data with it; pass --val FILE.h5")
    for path in (train, val):
        file_header(os.path.expanduser(path))  # raises for a missing or damaged file
    module = {"class_path": "setpred.data.datamodule.SetDataModule", "init_args": {"train": train, "val": val}}
    if configs:
        given = [f"--data={module['class_path']}", f"--data.init_args.train={train}", f"--data.init_args.val={val}"]
        given += [f"--data.init_args.{name}=null" for name in ("image_size", "set_size")]  # those of the files
        return configs, [*given, *arguments]
    if not any(argument.partition("=")[0] == "--name" for argument in arguments):
        arguments += ["--name", Path(train).stem]
    return [yaml.safe_dump(default_configuration(default, module), sort_keys=False)], arguments


def _taken(arguments: list[str], name: str) -> str | None:
    """Remove an option with the path of a prepared file from the arguments; return the path."""
    for place, argument in enumerate(arguments):
        option, equals, path = argument.partition("=")
        if option != name:
            continue
        path = path if equals else "".join(arguments[place + 1 :][:1])
        if path.lower().endswith((".csv", ".json", ".npz")):
            raise InputError(f"{name} {path}: expected FILE.h5; make one with `setpred data import`")
        if path.endswith(FILES):
            del arguments[place : place + (1 if equals else 2)]
            return path
    return None


def set_encoder(inputs: InputSets) -> dict[str, Any]:
    """The default encoder of input sets to tokens: of the elements, or of the windows of single long vectors."""
    if inputs.most > 1 or inputs.dim < 2 * WINDOWS:
        tokens = {} if inputs.most > 1 else {"scales": 0, "tokens": VECTOR_TOKENS}
        return {"class_path": "setpred.encoders.ElementTokens", "init_args": tokens}
    stride = -(-inputs.dim // WINDOWS)
    windows = {"window": 4 * stride, "stride": stride}
    return {"class_path": "setpred.encoders.WindowTokens", "init_args": windows}


def default_configuration(path: Path, module: dict[str, Any]) -> dict[str, Any]:
    """The quickstart's model and recipe for data of another schema.

    Args:
        path: the quickstart's configuration.
        module: class path and arguments of the data module.
    """
    sizes = SetDataModule.sizes(module["init_args"])
    config, head = read_yaml(path), precise(sizes)
    encoder, decoder = config["model"]["encoder"]["init_args"], config["model"]["decoder"]["init_args"]
    del encoder["gated"]  # many votes place an object more precisely, and those of clusters die
    trunk = encoder["tokens"]["init_args"]["trunk"]["init_args"]
    if sizes.inputs is not None:
        encoder["tokens"] = set_encoder(sizes.inputs)
        votes = config["model"]["encoder"]
        config["model"]["encoder"] = {"class_path": "setpred.encoders.Normalised", "init_args": {"encoder": votes}}
        config["model"]["learning_rate"] = SET_LEARNING_RATE
    elif sizes.image_size > 64:
        trunk["widths"] = [16, 32, 48]  # one stage more: 16 x 16 tokens of 128 x 128 pixels
    encoder["precise"] = decoder["objective"]["init_args"]["precise"] = head
    places = {"coords", "extent", *sizes.schema.in_pixels}
    weight = LEAST_WEIGHT if sizes.inputs is None else SET_WEIGHT
    names = [field.name for field in sizes.schema.fields if field.name in places]
    loss = config["model"]["loss"]["init_args"]
    in_image = sizes.schema.side is not None and sizes.schema.slice("coords").start == 0
    if in_image:  # votes are offsets, and where nothing is they may point anywhere
        encoder["anchored"], loss["only_present"] = True, names
        if (apart := spacing(module["init_args"]["train"])) is not None:  # elements compete over half this distance
            weight = max(weight, float(f"{4 / max(apart, 0.01) ** 2:.2g}"))
    decoder["objective"]["init_args"]["weights"] = decoder["start"]["init_args"]["weights"] = [weight] * head
    loss["weights"] = dict.fromkeys(names, 2.0 if in_image else 0.3)
    loss["beta"] = dict.fromkeys(names, 0.05)
    batch = min(BATCH, sizes.images)
    epochs = math.ceil(DEFAULT_STEPS / max(1, sizes.images // batch))
    given = {"batch_size": batch, "eval_batch_size": 64}
    if sizes.inputs is None:
        given["set_size"] = sizes.set_size + SPARE
    config["data"] = {**module, "init_args": {**module["init_args"], **given}}
    epochs = min(epochs, MOST_EPOCHS)
    between = max(1, epochs // 20)  # small data: validate some twenty times, not after every few steps
    config["trainer"] |= {"max_epochs": math.ceil(epochs / between) * between, "accelerator": "auto"}  # the last, too
    if between > 1:
        config["trainer"]["check_val_every_n_epoch"] = between
    return config
