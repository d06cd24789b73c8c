"""Weights in half precision and a record of plain types in one safetensors file, which holds no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from setpred.errors import InputError, reason, shown
from setpred.files import parse_json

SUFFIX = ".safetensors"
RECORD, DIGEST = "setpred", "sha256"  # entries of the file's metadata
LARGEST_HEADER = 2_000_000  # bytes: names, shapes and record; those of our releases have some ten thousand
LARGEST_ERROR = 2.0**-10  # twice what rounding to half precision does to a number in its range
_STORED = (torch.float16, torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def halved(value: Tensor) -> Tensor:
    """`value` as it is stored: matrices and kernels in float16, where that holds them; all else exactly.

    Vectors and scalars (biases, statistics of normalisations, learned rates) are a hundredth of the bytes and range
    over more than half precision does: under 6e-5 it loses digits, at 65,504 it ends. A matrix of which it would
    lose more than `LARGEST_ERROR`, |W - half(W)| / |W|, stays too.
    """
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value.clone(memory_format=torch.contiguous_format)
    value = value.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    half = value.half()
    lost = torch.linalg.vector_norm(half.double() - value.double())
    kept = lost <= LARGEST_ERROR * torch.linalg.vector_norm(value.double())  # False of what is not finite
    return half if value.ndim > 1 and kept else value


def pack(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """The content of a file: every tensor `halved`, and the record (plain types) as JSON in the metadata.

    Raises:
        InputError: a record with numbers that are not finite, which JSON does not have.
    """
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"the checkpoint's settings hold a number that is not finite ({error}), expected finite ones as a release "
            "keeps them; train with a large number instead, or publish the .ckpt"
        ) from error
    stored = {name: halved(value) for name, value in tensors.items()}
    return save(stored, {"format": "pt", RECORD: text, DIGEST: _digest(text, stored)})


def unpack(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, in float32 again, and record of a file that `pack` made.

    Raises:
        InputError: cut short, not a safetensors file, without a record, or changed since it was written.
    """
    damaged = f"{path} is not a checkpoint, or is damaged"
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LARGEST_HEADER:  # safetensors reads up to 100 MB, of which it makes many times as much
                raise InputError(f"{damaged}: its header has {size} bytes, expected at most {LARGEST_HEADER}")
            parse_json(file.read(size), f"{damaged}: its header")  # a name that comes twice passes safetensors
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{damaged}: {reason(error)[:200]}") from error
    if RECORD not in metadata:
        raise InputError(f"{path} is not a checkpoint of setpred: it lacks the record {RECORD!r} in its metadata")
    for name, value in tensors.items():
        if value.dtype not in _STORED:
            raise InputError(
                f"{damaged}: {shown(name)} holds {value.dtype}, expected float16, float32 or whole numbers"
            )
    if metadata.get(DIGEST) != _digest(metadata[RECORD], tensors):
        raise InputError(f"{damaged}: the checksum inside does not fit; copy the file again")
    record = parse_json(metadata[RECORD], f"{damaged}: its record")
    if not isinstance(record, dict):
        raise InputError(f"{damaged}: expected a JSON object as its record, got {type(record).__name__}")
    return {n: v.float() if v.is_floating_point() else v for n, v in tensors.items()}, record


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the record and all tensors; the format itself has no checksums."""
    found = sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"\0{name}\0{value.dtype}{list(value.shape)}\0".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()
