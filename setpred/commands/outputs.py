"""Check what a command is to write: no input, device or file of another kind is replaced, and it can be written."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from setpred.errors import InputError
from setpred.files import descriptor, writing

# how the files begin that commands write, and may replace; annotations, tables and configurations begin otherwise
_RESULTS = (
    rb"(?:\[\s*\]|\{\s*\})\s*$"  # nothing
    rb"|\[\n\{\"(?:image|index|image_id)\":"  # predictions as JSON, and as results of COCO
    rb"|\{\"(?:image|index)\":"  # as JSON Lines
    rb"|\{\"annotations\": \[\n"  # as COCO
    rb"|(?:image|index),[^\n]*\bconfidence\n"  # as CSV
    rb"|\{\n +\"(?:ap|box_ap|masks|checkpoint|image)\":"  # scores of evaluate, gradients and data compare
)
CONTENTS = {
    **{".h5": rb"\x89HDF", ".hdf5": rb"\x89HDF", ".html": rb"<!DOCTYPE html>\n<html lang=\"en\">"},
    **{".pt2": rb"PK", ".safetensors": rb"(?s:.{7}\0\{)"},
}


def check_outputs(
    files: Mapping[str, Path | None],
    folders: Mapping[str, Path | None] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    pictures: Iterable[str | os.PathLike[str]] = (),
    streams: bool = True,
) -> None:
    """Check what a command is to write, before its work; options that are not given are None.

    Args:
        files, folders: paths by the names of their options.
        inputs: files that the command reads, and so must not replace, also by another name or link.
        pictures: images that it reads; folders of figures must not be theirs.
        streams: whether the files can be pipes and devices, which then receive the content.

    Raises:
        InputError: a file that is a folder, an input, another output or of another kind than this command writes; a
            folder that is a file or has the input images; no permission.
    """
    files = {option: path for option, path in files.items() if path is not None}
    folders = {option: path for option, path in (folders or {}).items() if path is not None}
    pictures = list(map(os.fspath, pictures))
    read = {_identity(path) for path in [*inputs, *pictures] if path is not None} if files else set()
    places: dict[Any, str] = {}
    for option, path in (files | folders).items():
        with writing(path):
            place = _identity(path) or os.path.realpath(path)
        if place in places and not _is_stream(path):
            raise InputError(f"{option} {path}: {places[place]} has this name, too; choose another one")
        places[place] = option
        if option in files:
            _check_file(option, path, read - {None}, streams=streams)
        elif os.path.exists(path) and not os.path.isdir(path):
            raise InputError(f"{option} {path}: expected a folder, but it is a file; choose another name")
        elif place in {_identity(parent) for parent in {os.path.dirname(path) or "." for path in pictures}}:
            raise InputError(f"{option} {path}: the images to read are in this folder; choose another one")
        _check_permission(option, path)


def _identity(path: str | os.PathLike[str] | None) -> tuple[int, int] | None:
    """Device and inode, which all names of a file share; None if there is no file."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _is_stream(path: Path) -> bool:
    is_other = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return descriptor(path) is not None or is_other


def _check_file(option: str, path: Path, read: set[Any], *, streams: bool) -> None:
    if os.path.isdir(path):
        raise InputError(f"{option} {path}: expected the name of a file, but it is a folder; choose another name")
    if _is_stream(path) and not streams:
        raise InputError(f"{option} {path}: expected the name of a file, got a device or pipe; choose another name")
    if _identity(path) in read:
        raise InputError(f"{option} {path}: the command reads this file, and would replace it; choose another name")
    if not _is_stream(path) and os.path.isfile(path) and os.access(path, os.R_OK):
        with writing(path), open(path, "rb") as file:
            start = file.read(4096)
        suffix = (Path(os.path.realpath(path)).suffix or path.suffix).lower()
        # text without a suffix, such as the target of a link, says nothing about its kind
        expected = CONTENTS.get(suffix, _RESULTS if suffix else rb"[^\0]*$")
        if start and not re.match(_RESULTS if option == "--json" else expected, start):
            raise InputError(
                f"{option} {path}: this file holds something else than the command writes, and would be replaced; "
                "choose another name, or remove it"
            )


def _check_permission(option: str, path: Path) -> None:
    """The folder in which the file or folder is, or is to be, can be written."""
    target = Path(os.path.realpath(path))
    if _is_stream(path):
        folder = path  # the target of a pipe's name is no path
    elif target.is_dir():
        folder = target
    else:
        folder = next(parent for parent in target.parents if os.path.lexists(parent))
    if not _is_stream(path) and not folder.is_dir():
        raise InputError(f"{option} {path}: {folder} is a file, not a folder; choose another name")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: no permission to write in {folder}; choose another place")
