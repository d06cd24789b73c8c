"""Read untrusted YAML and `torch.save` files: plain values of bounded size, and no code."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor

from setpred.errors import InputError, reason, shown
from setpred.files import LARGEST_NUMBER, leaves, place, require_regular
from setpred.schema import LARGEST_SIZE

SEEDS = ("seed",)  # keys of numbers that are no sizes
LAYERS = ("layers", "num_layers", "num_encoder_layers", "num_decoder_layers")  # each takes a thousand times a number's
MOST_LAYERS = 1000


def check_sizes(config: Any, name: str) -> None:
    """Whole numbers of a model's configuration are sizes, but for seeds: none is larger than `LARGEST_SIZE`.

    Raises:
        InputError: names the first one that is; see also `leaves`.
    """
    for keys, value in leaves(config, name):
        key = keys[0] if keys else None
        most = LARGEST_NUMBER if key in SEEDS else MOST_LAYERS if key in LAYERS else LARGEST_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise InputError(
                f"{name} asks for {place(keys)} = {shown(value)}, expected at most {most}; such a model cannot be meant"
            )


MOST_ENTRIES = 100_000  # of the archive: a file for each tensor; our largest checkpoints have some hundred
MOST_STEPS = 2_000_000  # of the pickle, about 40 to a tensor; each may take a hundred bytes
MOST_TUPLES = 30_000  # two or three to a tensor; Python takes the hash of nested ones on a stack that is no larger
NEEDED = re.compile(  # all that tensors of numbers and plain types need; torch's own list is longer
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|"
    r"torch (Float|Double|Half|BFloat16|Bool|Byte|Char|Short|Int|Long)Storage"
)
LOCAL_HEADER = 30  # bytes before the name of an entry of an archive
_REFUSED = "holds more than tensors and plain types and is refused, since loading it could run code"


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Tensors on the CPU and plain types.

    Raises:
        InputError: not a whole torch file; anything in it that could run code, that is no dense tensor of ordinary
            numbers or plain type, or that would take more memory than the file has bytes.
    """
    damaged = f"{path} is not a checkpoint, or is damaged"
    try:
        # the only container that torch.save writes: older ones are bare pickles
        if not zipfile.is_zipfile(path):
            raise InputError(f"{damaged}: it is not a whole torch file")
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, damaged)
            flaw = archive.testzip()  # torch itself does not compare the checksums
            if flaw is not None:
                raise InputError(f"{damaged}: the checksum of {shown(flaw)} inside does not fit")
            stored = sum(entry.file_size for entry in archive.infolist())
            _check_pickle(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl"))), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, on their way to being refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} {_REFUSED} ({reason(error)[:200]})") from error
    except Exception as error:  # a stranger's bytes may fail anywhere in zipfile and torch
        raise InputError(f"{damaged}: {reason(error)[:200]}") from error
    _check_values(content, stored, path)
    return content


def _check_entries(archive: zipfile.ZipFile, damaged: str) -> None:
    """One pickle, and entries beside each other that are stored as they are."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = {entry.filename for entry in entries}
    if len(entries) > MOST_ENTRIES or len(names) < len(entries):
        raise InputError(f"{damaged}: it has {len(entries)} entries, expected at most {MOST_ENTRIES}, each once")
    pickles = [name for name in names if name.endswith(".pkl")]
    if len(pickles) != 1 or not pickles[0].endswith("/data.pkl"):
        raise InputError(f"{damaged}: expected one data.pkl inside, got {shown(sorted(pickles))}")
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise InputError(
                f"{damaged}: {shown(entry.filename)} inside is compressed or encrypted, which torch's never are"
            )
        if entry.header_offset < end:
            raise InputError(f"{damaged}: {shown(entry.filename)} inside lies upon another entry")
        end = entry.header_offset + LOCAL_HEADER + entry.file_size


def _check_pickle(steps: bytes, path: str | os.PathLike[str]) -> None:
    """Before the pickle is run: it names nothing but what is `NEEDED`, and is not long."""
    tuples = 0
    for count, (step, argument, _) in enumerate(pickletools.genops(steps)):
        if step.name == "GLOBAL" and not NEEDED.fullmatch(argument):  # torch knows no other step that names something
            raise InputError(f"{path} {_REFUSED} (it asks for {shown(argument)})")
        tuples += step.name.startswith("TUPLE")
        if count > MOST_STEPS or tuples > MOST_TUPLES:
            raise InputError(f"{path} builds more values than any checkpoint of ours has; do not trust it")


def _check_values(content: Any, stored: int, path: str | os.PathLike[str]) -> None:
    """After: plain types of ordinary size, and tensors that have a number for each of their places."""
    room: dict[int, int] = {}  # bytes of a storage that no tensor has taken yet
    views: set[tuple[Any, ...]] = set()
    for keys, value in leaves(content, str(path)):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            view = (storage.data_ptr(), value.storage_offset(), value.dtype, value.shape, value.stride())
            if view in views:  # the same tensor under two names
                continue
            views.add(view)
            if storage.data_ptr() not in room:
                room[storage.data_ptr()] = storage.nbytes()
                stored -= storage.nbytes()
            room[storage.data_ptr()] -= value.numel() * value.element_size()
            if room[storage.data_ptr()] < 0 or stored < 0:
                raise InputError(
                    f"{path}: {place(keys)} {shown(list(value.shape))} takes more memory than the file has for it, "
                    "which those of torch never do; do not trust it"
                )
        elif not isinstance(value, str | bytes | int | float | None):
            raise InputError(f"{path} {_REFUSED} ({place(keys)} is of type {type(value).__name__})")
        elif isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise InputError(f"{path}: {place(keys)} is a number of more than 64 bits; do not trust it")


LARGEST_YAML = 1_000_000  # characters of a file; the longest configuration of a run has 5,000
LONGEST_YAML = 4096  # of one value, as of the longest path; reading a number takes the square of its length
DEEPEST_YAML = 64  # lists and mappings within each other
MOST_YAML = 2000  # values, aliases counted as what they stand for; the configuration of a run has 150


@dataclass
class _Open:
    """A list or mapping whose end has not been read."""

    anchor: str | None
    mapping: bool
    values: int = 1
    keys: set[str] = field(default_factory=set)
    at_key: bool = True


def check_yaml(text: str) -> None:
    """Reads YAML without building anything from it, in time and memory that its length bounds.

    Raises:
        yaml.YAMLError: not YAML; larger or deeper than a configuration is, aliases written out ("billion laughs", or
            ones within themselves); a tag, which could ask for objects; a key twice, of which one would be lost.
    """
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"expected a configuration of at most {LARGEST_YAML:,} characters, got more")
    sizes: dict[str, int] = {}  # values that an alias stands for, by its anchor
    levels: list[_Open] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"expected plain values, got the tag {event.tag!r}; leave it out")
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(levels) > DEEPEST_YAML:
                raise yaml.YAMLError(f"expected at most {DEEPEST_YAML} lists and mappings within each other")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            values, anchor = levels[-1].values, levels.pop().anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands for nothing before it, or for what it is in")
            values, anchor = sizes[event.anchor], None
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST_YAML:
                raise yaml.YAMLError(
                    f"expected values of at most {LONGEST_YAML:,} characters, got {len(event.value):,}"
                )
            values, anchor = 1, event.anchor
        else:
            continue
        if anchor is not None:
            sizes[anchor] = values
        if values > MOST_YAML or (levels and levels[-1].values + values > MOST_YAML):
            raise yaml.YAMLError(f"expected at most {MOST_YAML:,} values, aliases counted as what they stand for")
        if levels:
            _put(levels[-1], event, values)


def _put(inside: _Open, event: yaml.Event, values: int) -> None:
    """Counts a value, which may be a key, to what it is in."""
    inside.values += values
    if not inside.mapping:
        return
    if inside.at_key and isinstance(event, yaml.ScalarEvent):
        if event.value in inside.keys:
            raise yaml.YAMLError(
                f"the key {event.value!r} stands twice, last in line {event.start_mark.line + 1}; leave one out"
            )
        inside.keys.add(event.value)
    inside.at_key = not inside.at_key


def load_yaml(text: str) -> object:
    """What `yaml.safe_load` makes of text that `check_yaml` accepts.

    Raises:
        yaml.YAMLError: see `check_yaml`; values that cannot be read.
    """
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # also half of a pair of characters
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, object]:
    """What a file of named values says.

    Raises:
        InputError: it cannot be read, or is not what `load_yaml` takes, or not of named values.
    """
    try:
        require_regular(path, advice="give the file of a configuration")
        with open(path, encoding="utf-8") as file:
            said = load_yaml(file.read(LARGEST_YAML + 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise InputError(f"{path}: expected a configuration in YAML that can be read, got: {why}") from error
    if not isinstance(said, dict) or not all(isinstance(key, str) for key in said):
        raise InputError(f"{path}: expected a configuration, with model: and data: in it, got {shown(said)}")
    return said
