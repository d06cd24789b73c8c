"""Weights in half precision and a record of plain types in one safetensors file, which holds no code."""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from setpred.errors import InputError, reason
from setpred.files import parse_json

SUFFIX = ".safetensors"
RECORD, DIGEST = "setpred", "sha256"  # entries of the file's metadata
LARGEST_ERROR = 2.0**-10  # twice the relative error of rounding to half precision


def halved(value: Tensor) -> Tensor:
    """Convert a matrix or kernel to float16 where its range suffices; keep other tensors exact, in float32.

    Vectors and scalars (biases, statistics of normalisations, learned rates) are a hundredth of the bytes, and range
    beyond half precision, which loses digits below 6e-5 and ends at 65,504. So does a matrix W with
    |W - half(W)| / |W| above `LARGEST_ERROR`.
    """
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value.clone(memory_format=torch.contiguous_format)
    value = value.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    half = value.half()
    lost = torch.linalg.vector_norm(half.double() - value.double())
    kept = lost <= LARGEST_ERROR * torch.linalg.vector_norm(value.double())  # False for non-finite values
    return half if value.ndim > 1 and kept else value


def pack(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes:
    """Encode `halved` tensors, and a record of plain types as JSON in the metadata, as the content of a file."""
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError as error:
        why = f"the checkpoint's settings hold a non-finite number ({error}), which a release cannot"
        raise InputError(f"{why}; train with a large number instead, or publish the .ckpt") from error
    stored = {name: halved(value) for name, value in tensors.items()}
    return save(stored, {"format": "pt", RECORD: text, DIGEST: _digest(text, stored)})


def unpack(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, in float32, and record of a file of `pack`; raise `InputError` if it is foreign or changed."""
    damaged = f"{path} is not a checkpoint, or is damaged"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = _digest(metadata.get(RECORD, ""), tensors)
    except Exception as error:  # untrusted bytes can raise any exception within safetensors
        raise InputError(f"{damaged}: {reason(error)[:200]}") from error
    if RECORD not in metadata:
        raise InputError(f"{path} is not a checkpoint of setpred: it lacks the record {RECORD!r} in its metadata")
    if metadata.get(DIGEST) != digest:
        raise InputError(f"{damaged}: wrong checksum; copy the file again")
    record = parse_json(metadata[RECORD], f"{damaged}: its record")
    if not isinstance(record, dict):
        raise InputError(f"{damaged}: expected a JSON object as its record, got {type(record).__name__}")
    return {n: v.float() if v.is_floating_point() else v for n, v in tensors.items()}, record


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the record and all tensors, since the format has no checksums."""
    found = sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"\0{name}\0{value.dtype}{list(value.shape)}\0".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()
