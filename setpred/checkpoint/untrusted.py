"""Read untrusted YAML and `torch.save` files: plain values of bounded size, and no code."""

import os
import pickle
import zipfile
from collections import Counter
from typing import Any

import torch
import yaml
from torch import Tensor

from setpred.errors import InputError, reason, shown
from setpred.files import LARGEST_NUMBER, leaves, require_regular
from setpred.schema import LARGEST_SIZE

LARGEST_YAML = 100_000  # characters; the longest configuration of a run has 5,000
MOST_YAML = 2000  # values, aliases expanded; the configuration of a run has 150


def check_sizes(config: Any, name: str) -> None:
    """Raise `InputError` for an integer above `LARGEST_SIZE` in a model's configuration: all but seeds are sizes."""
    for place, value in leaves(config, name):
        most = LARGEST_NUMBER if place.endswith("seed") else LARGEST_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise InputError(f"{name}: expected {place} of at most {most}, got {shown(value)}")


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Load tensors (to the CPU) and plain types by `torch.load(weights_only=True)`, which runs no code.

    Raises `InputError` for damaged files and other formats, code, values that are neither dense tensors nor plain
    types, and values larger than the file.
    """
    damaged = f"{path} is not a checkpoint, or is damaged"
    size = os.path.getsize(path)
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{damaged}: expected a complete file of torch.save")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise InputError(f"{damaged}: its entries are larger than the file")
            if (entry := archive.testzip()) is not None:  # torch does not compare checksums
                raise InputError(f"{damaged}: wrong checksum of {shown(entry)}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        why = "holds more than tensors and plain types, which could run code; do not trust it"
        raise InputError(f"{path} {why} ({reason(error)[:200]})") from error
    except Exception as error:  # untrusted bytes can raise any exception within zipfile and torch
        raise InputError(f"{damaged}: {reason(error)[:200]}") from error
    for place, value in leaves(content, str(path)):
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_complex():
                raise InputError(f"{path}: expected dense tensors of real numbers, got {place}")
            if value.numel() * value.element_size() > size:
                raise InputError(f"{path}: {place} {shown(list(value.shape))} is larger than the file; do not trust it")
        elif not isinstance(value, str | bytes | int | float | None):
            raise InputError(f"{path}: expected tensors and plain types, got {place} of type {type(value).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that rejects duplicate keys, of which it would drop one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, times in names.items() if times > 1]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"duplicate key {shown(twice[0])} in the mapping of line {line}; remove one of the two"
            )
        return node


def load_yaml(text: str) -> object:
    """Load YAML of plain values.

    Raises `yaml.YAMLError` for invalid YAML, tags of objects, duplicate keys, more than `LARGEST_YAML` characters, and
    more than `MOST_YAML` values with aliases expanded.
    """
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"expected at most {LARGEST_YAML:,} characters, got more")
    try:
        value = yaml.load(text, _Loader)
        for place, item in leaves(value, "the configuration", most=MOST_YAML):
            if isinstance(item, int) and abs(item) > LARGEST_NUMBER:
                raise yaml.YAMLError(f"{place}: expected an integer of 64 bits, got a larger one")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"cannot read a value: {error}") from error
    return value


def read_yaml(
    path: str | os.PathLike[str], content_name: str = "a configuration with model: and data:"
) -> dict[str, object]:
    """Read a configuration file; raise `InputError` unless it is YAML of `load_yaml` that maps names to values."""
    try:
        require_regular(path, advice="give the file of a configuration")
        with open(path, encoding="utf-8") as file:
            content = load_yaml(file.read(LARGEST_YAML + 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise InputError(f"{path}: expected a configuration in YAML, got: {why}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: expected {content_name}, got {shown(content)}")
    return content
