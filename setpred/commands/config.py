"""Read configurations: only allowed classes, plain YAML, differences between runs."""

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml
from jsonargparse._common import parsing_settings  # to restore them; a test checks that it still exists
from lightning.pytorch.cli import LightningArgumentParser

from setpred import metrics
from setpred.checkpoint import allowed_classes, build
from setpred.checkpoint.allowlist import PART_MODULES, imported, moved, public_parts, torch_modules
from setpred.checkpoint.untrusted import check_sizes, load_yaml, read_yaml
from setpred.commands.common import Parser as OptionParser
from setpred.commands.linking import fill_sizes
from setpred.commands.mistyped import explained, similar_class
from setpred.data import toy
from setpred.errors import InputError

MODE = "plain-yaml"  # our parser mode of jsonargparse
ALLOWED = [  # besides the parts; none of Lightning's loads a file, or calls a function that is not allowed itself
    f"{module}.{name}"
    for module, names in {
        "setpred.data.augmentation": "Augmentation",
        "setpred.data.datamodule": "RenderedScenes SetDataModule",
        "setpred.data.streamed": "StreamedScenes",
        "setpred.schema": "CLEVR ElementSchema Field",
        "setpred.training": "EMA Constant FASet StepDecay WarmupCosine",
        "lightning.pytorch.callbacks": "DeviceStatsMonitor EarlyStopping GradientAccumulationScheduler "
        "LearningRateMonitor ModelCheckpoint ModelSummary StochasticWeightAveraging TQDMProgressBar",
        "lightning.pytorch.loggers": "CSVLogger TensorBoardLogger",
        "lightning.pytorch.plugins.environments": "SLURMEnvironment",
        "lightning.pytorch.strategies": "DDPStrategy",
    }.items()
    for name in names.split()
]
BYTES_PER_NUMBER = 16  # of a model in training: weight, gradient and Adam's two means
DENIED = re.compile(r"'([\w.]+)'.*import_path_allowlist")  # jsonargparse's message on a denied class path
# a class path on the command line, where the class has a capital letter; not a part of a file's path
CLASS_PATH = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\.[A-Z]\w*(?![\w./-])")


class Parser(LightningArgumentParser):
    """A parser that takes a model's sizes from its data, and raises `InputError` of one line for all mistakes."""

    def validate(self, config: Any, **options: Any) -> None:
        fill_sizes(config)
        super().validate(config, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        for error in chain(ex):
            if found := DENIED.search(str(error)):
                raise InputError(
                    f"{found[1]} is no public part of setpred, layer of torch or allowed class of Lightning; correct "
                    f"a mistyped path, or add --allow {found[1]} if you trust it"
                    f"{similar_class(found[1], allowed())}"
                ) from error
            if isinstance(error, InputError):
                raise error
        keys = [key for key in self.get_defaults(skip_validation=True).keys() if not key.startswith("__")]  # noqa: SIM118
        raise InputError(explained(message, keys, allowed())) from ex


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, which later ones may hide."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def allowed() -> dict[str, Any]:
    """The classes and functions that a configuration may name without `--allow`, by path."""
    return {**public_parts(*PART_MODULES, metrics, toy), **torch_modules(), **imported(ALLOWED)}


def allowed_paths() -> set[str]:
    """The class paths that a configuration may name without `--allow`."""
    return set(allowed())


def home_expanded(value: Any) -> Any:
    """Replace a leading ~ of texts by the home folder, within dictionaries and lists: shells do so only before words.

    >>> home_expanded({"name": "a~b", "epochs": [1]})
    {'name': 'a~b', 'epochs': [1]}
    """
    if isinstance(value, dict):
        return {key: home_expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [home_expanded(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def set_aside(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split `--config FILE` and `--allow` from other arguments: files set options, but must not set the latter."""
    parser = OptionParser("train", "", add_help=False)
    parser.add_argument("--allow", action="append", default=[], metavar="PACKAGE.CLASS")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE")
    return parser.parse_known_args(list(arguments))


def _typed_classes(arguments: Sequence[str]) -> dict[str, Any]:
    """Import the classes that a user names on the command line, but none that a file names."""
    found: dict[str, Any] = {}
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("-") else argument
        for path in () if os.path.exists(value) else CLASS_PATH.findall(value):
            with suppress(InputError):  # no class path; the parser reports it if it is used as one
                found |= imported([path])
    return found


@contextmanager
def guarded(arguments: Sequence[str], configs: Sequence[str], allow: Sequence[str] = ()) -> Iterator[None]:
    """Restrict jsonargparse to the allowed classes and plain YAML, without URLs, within a block.

    Raises `InputError` for an unreadable configuration, and for one that names a class outside the list.

    Args:
        arguments: those of the command line, as for the parser.
        configs: the configurations among them.
        allow: more class paths, from the user.
    """
    for path in filter(os.path.isfile, configs):
        read_yaml(path)  # for its own message
    paths = {*allowed_paths(), *imported(allow), *_typed_classes(arguments)}
    paths = {path for path in paths if path.partition(".")[0] != "jsonargparse" and "<" not in path}
    before = dict(parsing_settings)
    jsonargparse.set_loader(MODE, lambda text: moved(home_expanded(load_yaml(text))), (yaml.YAMLError,))
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=sorted(paths), config_read_mode_fsspec_enabled=False
    )
    try:
        yield
    finally:
        parsing_settings.update(before)
        jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)  # Lightning's setting


def require_room(model: Mapping[str, Any]) -> None:
    """Raise `InputError` if this machine lacks the memory to train a configured model, before it is built.

    Args:
        model: class paths and arguments of `encoder` and `decoder`, in plain types. Parts of users are not checked.
    """
    parts = [model.get(name) for name in ("encoder", "decoder")]
    check_sizes(parts, "the configuration's model")
    try:
        with torch.device("meta"):  # without memory
            numbers = sum(p.numel() for part in build(parts, allowed_classes()) for p in part.parameters())
    except (InputError, AttributeError):  # building the model reports it
        return
    needed, memory = BYTES_PER_NUMBER * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"the configuration's model has {numbers:,} numbers and takes {needed / 1e9:.0f} GB of memory to train, "
            f"this machine has {memory / 1e9:.0f} GB; make the model smaller"
        )


def plain(value: Any) -> Any:
    """Convert a jsonargparse namespace to dictionaries and lists, schemas too, functions and classes to paths."""
    for as_dict in ("as_dict", "to_dict"):  # of a namespace, of a schema
        if hasattr(value, as_dict) and not isinstance(value, type):
            value = getattr(value, as_dict)()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__qualname__"):  # a default of jsonargparse
        return f"{value.__module__}.{value.__qualname__}"
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """List how two plain configurations differ, as "key: old against new"; a new option counts unless False."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in dict.fromkeys([*old, *new]) if key in old or new[key] is not False]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} in the checkpoint against {new}"]


def without(config: Any, key: str) -> Any:
    """Remove a key from a plain configuration at every level."""
    if isinstance(config, dict):
        return {name: without(value, key) for name, value in config.items() if name != key}
    return [without(item, key) for item in config] if isinstance(config, list) else config
