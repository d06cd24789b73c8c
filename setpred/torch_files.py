"""Reading what `torch.save` wrote: no code is run, and the file gets no more memory than it has bytes."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import warnings
import zipfile
from typing import Any

import torch
from torch import Tensor

from setpred.errors import InputError, reason
from setpred.limits import LARGEST_NUMBER, leaves, place, shown

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
