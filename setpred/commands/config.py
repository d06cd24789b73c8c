"""Read configurations: only allowed classes, plain YAML, differences between runs."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml
from jsonargparse._common import parsing_settings  # to put back what is set; a test sees whether it is still there
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from setpred import metrics
from setpred.checkpoint.allowlist import PART_MODULES, allowed_classes, moved, named, public, torch_modules
from setpred.checkpoint.load import build
from setpred.checkpoint.untrusted import check_sizes, load_yaml, read_yaml
from setpred.data import toy
from setpred.errors import InputError

MODE = "plain-yaml"  # jsonargparse's name for a way to read values
OTHERS = (  # of setpred, in modules that hold more than what a configuration is made of
    *(f"setpred.data.datamodule.{name}" for name in ("RenderedScenes", "SetDataModule")),
    "setpred.data.streamed.StreamedScenes",
    *(f"setpred.training.{name}" for name in ("EMA", "Constant", "FASet", "StepDecay", "WarmupCosine")),
    *(f"setpred.schema.{name}" for name in ("CLEVR", "ElementSchema", "Field")),
)
LIGHTNING = {  # none loads a file; functions that some would call have to be on the list themselves
    "callbacks": (
        "DeviceStatsMonitor",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "LearningRateMonitor",
        "ModelCheckpoint",
        "ModelSummary",
        "StochasticWeightAveraging",
        "TQDMProgressBar",
    ),
    "loggers": ("CSVLogger", "TensorBoardLogger"),
    "plugins.environments": ("SLURMEnvironment",),
    "strategies": ("DDPStrategy",),
}
MOST_LINES, LONGEST_LINE = 30, 300  # of what is said of a value, which may be long
BYTES_PER_NUMBER = 16  # of a model in training: itself, its gradient and Adam's two means
# in the line where jsonargparse says so: a path, and after it the setting that would allow it; its words may change
DENIED = re.compile(r"'([\w.]+)'.*import_path_allowlist")
# on the command line, by the custom that names of classes are capitalised; not a part of a file's path
CLASS_PATH = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\.[A-Z]\w*(?![\w./-])")


class RefusedPathError(ValueError):
    """A class path that is not on the list."""


class Parser(LightningArgumentParser):
    """Says of a refused path that it is one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        error: BaseException | None = ex
        while self.exit_on_error and error is not None:  # what came of it may hide it
            if found := DENIED.search(str(error)):
                raise RefusedPathError(found[1])
            error = error.__cause__ or error.__context__
        super().error("\n".join(_short(line) for line in message.splitlines()[:MOST_LINES]), ex)


def _short(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 40]} ... {line[-35:]}"


def allowed_paths() -> set[str]:
    """What a configuration may name without being asked."""
    lightning = [f"lightning.pytorch.{module}.{name}" for module, names in LIGHTNING.items() for name in names]
    return set(public(*PART_MODULES, metrics, toy)) | set(torch_modules()) | set(named((*OTHERS, *lightning)))


def split_allow(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is named with `--allow`, and the other arguments; it is no option of the parser, whose options files set."""
    look = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    look.add_argument("--allow", action="append", default=[], metavar="PACKAGE.CLASS")
    options, rest = look.parse_known_args(list(arguments))
    return options.allow, rest


def configurations(arguments: Sequence[str]) -> list[str]:
    """The files given with `--config`."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("-c", "--config", action="append", default=[])
    with suppress(argparse.ArgumentError):
        return [path for path in look.parse_known_args(list(arguments))[0].config if os.path.isfile(path)]
    return []


def _typed(arguments: Sequence[str]) -> dict[str, Any]:
    """The classes that options name by their paths; files are not looked into."""
    found: dict[str, Any] = {}
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("-") else argument
        for path in () if os.path.exists(value) else CLASS_PATH.findall(value):
            with suppress(InputError):  # what is no class path; if it is one after all, the parser will say so
                found |= named([path])
    return found


@contextmanager
def guarded(arguments: Sequence[str], allow: Sequence[str] = ()) -> Iterator[None]:
    """Within it jsonargparse imports only what is on the list, reads plain YAML, and no addresses (URLs).

    Args:
        arguments: of the command line, as the parser will get them.
        allow: class paths besides, from the user.

    Raises:
        InputError: a configuration that cannot be read, or names what is not on the list.
    """
    for path in (files := configurations(arguments)):
        read_yaml(path)
    paths = allowed_paths() | set(named(allow)) | set(_typed(arguments))
    paths = {path for path in paths if path.partition(".")[0] != "jsonargparse" and "<" not in path}
    before = dict(parsing_settings)
    jsonargparse.set_loader(MODE, lambda text: moved(load_yaml(text)), (yaml.YAMLError,))
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=sorted(paths), config_read_mode_fsspec_enabled=False
    )
    try:
        yield
    except RefusedPathError as error:
        raise InputError(_refusal(str(error), files, arguments)) from error
    finally:
        parsing_settings.update(before)
        jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)  # as Lightning sets it


def _refusal(path: str, files: Sequence[str], arguments: Sequence[str]) -> str:
    """What to say of a path that is not on the list; a typed one is, if it can be imported."""
    if any(path in argument for argument in arguments):
        return f"the command line asks for {path}, which is no class that is found; correct it, or add --allow {path}"
    naming = ", ".join([file for file in files if path in Path(file).read_text("utf-8")] or files)
    if path.startswith("setpred."):
        return f"{naming} asks for {path}, which is none of setpred's public parts; correct it, or add --allow {path}"
    return (
        f"{naming} asks for {path}, which would run code of others: it is not among the public parts of setpred, "
        "torch's layers and the few of Lightning's classes that a configuration may name; if you trust it, add "
        f"--allow {path}"
    )


def require_room(model: Mapping[str, Any]) -> None:
    """Sees that a configured model could be trained in this machine's memory, before it is made.

    Args:
        model: class paths and arguments of `encoder` and `decoder`, in plain types. One with parts of the user's own
            is not looked into.

    Raises:
        InputError: it could not, or sizes that cannot be meant.
    """
    parts = {name: model.get(name) for name in ("encoder", "decoder")}
    check_sizes(parts, "the configuration's model")
    try:
        with torch.device("meta"):  # numbers without memory
            built = [build(part, allowed_classes()) for part in parts.values()]
    except InputError:  # what is wrong is said when it is built
        return
    numbers = sum(value.numel() for part in built if isinstance(part, nn.Module) for value in part.parameters())
    needed, memory = BYTES_PER_NUMBER * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"the configuration asks for a model of {numbers:,} numbers; to train it takes {needed / 1e9:.0f} GB of "
            f"memory, this machine has {memory / 1e9:.0f} GB: make it smaller"
        )


def plain(value: Any) -> Any:
    """A jsonargparse namespace as dictionaries and lists; a schema too, functions and classes as import paths."""
    for as_dict in ("as_dict", "to_dict"):  # of a namespace, of a schema
        if hasattr(value, as_dict) and not isinstance(value, type):
            value = getattr(value, as_dict)()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__qualname__"):  # as jsonargparse leaves a default that is one
        return f"{value.__module__}.{value.__qualname__}"
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two plain configurations differ, as "key: old against new"; an option newer than old is off if False."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in dict.fromkeys([*old, *new]) if key in old or new[key] is not False]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} in the checkpoint against {new}"]


def without(config: Any, key: str) -> Any:
    """A plain configuration without this key anywhere: one that changes how fast a model is, not what it is."""
    if isinstance(config, dict):
        return {name: without(value, key) for name, value in config.items() if name != key}
    return [without(item, key) for item in config] if isinstance(config, list) else config
