"""What is in a file of prepared images, as text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from setpred.data.hdf5 import open_set_file, read_header
from setpred.schema import PRESENCE, ElementSchema

BAR = 40  # characters of the longest bar


def describe(path: str | os.PathLike[str]) -> str:
    """Counts, sizes, schema and source, objects per image, and how often each class occurs.

    Raises:
        InputError: the file cannot be read or is not one of ours.
    """
    with open_set_file(path) as file:
        header = read_header(file, path)
        elements = file["elements"][:]
        cameras = int(np.isfinite(file["camera"][:]).all(1).sum())
        checksum = str(file.attrs["sha256"])
    schema = header.schema
    present = schema.values(elements, PRESENCE) > 0.5
    counts = np.bincount(present.sum(1), minlength=schema.max_objects + 1)
    lines = [
        f"{path}: {header.images} images of {header.image_size}x{header.image_size}, {present.sum()} objects, "
        f"{Path(path).stat().st_size / 1e6:.1f} MB",
        f"schema    {schema.name}: {schema.set_dim} numbers, up to {schema.max_objects} objects; "
        + ", ".join([*(f"{f.name} ({f.size})" for f in schema.fields), f"{PRESENCE} (1)"]),
        "source    " + ", ".join(f"{key} {_plain(value)}" for key, value in header.source.items()),
        f"cameras   known for {cameras} images",
        f"sha256    {checksum}",
        "",
        "objects per image",
    ]
    shown = [(str(number), int(count)) for number, count in enumerate(counts) if count]
    lines += _bars(shown, header.images)
    return "\n".join(lines + _fields(schema, elements[present]))


def _fields(schema: ElementSchema, objects: np.ndarray) -> list[str]:
    lines = []
    for field in schema.categorical:
        counts = np.bincount(schema.values(objects, field.name), minlength=field.size)
        lines += ["", field.name, *_bars(list(zip(field.classes, counts.tolist(), strict=True)), len(objects))]
    for field in schema.continuous:
        values = schema.values(objects, field.name)
        if len(values):
            ranges = (f"{low:.2f} to {high:.2f}" for low, high in zip(values.min(0), values.max(0), strict=True))
            lines += ["", f"{field.name}: {', '.join(ranges)}"]
    return lines


def _bars(counts: list[tuple[str, int]], total: int) -> list[str]:
    most = max((count for _, count in counts), default=0) or 1
    return [f"  {name:<10} {n:>8} {n / max(total, 1):>6.1%} {'#' * round(BAR * n / most)}" for name, n in counts]


def _plain(value: object) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)
