"""Torch data sets of images and their sets: from a prepared file, or straight from a CLEVR folder."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from setpred.data.clevr import ClevrFolder
from setpred.data.hdf5 import BLOCK, open_set_file, read_header, read_images, read_names, read_sets
from setpred.errors import InputError
from setpred.schema import CLEVR, PRESENCE, ElementSchema
from setpred.sets import presence_mask

if TYPE_CHECKING:
    import h5py

Batch = dict[str, Tensor]
SHARED_MEMORY = "/dev/shm"
IN_MEMORY_BYTES = 2_000_000_000  # files whose images take less are kept in memory by default


class SetImages(Dataset, ABC):
    """Images with the sets of objects in them.

    `data[i]` is a dict; `data.__getitems__([i, j, ...])`, which a `DataLoader` calls, has a batch axis in front:

        image     uint8   [3, S, S]          (in memory channels last, as it is stored)
        elements  float32 [set_size, D]      zero padded
        mask      bool    [set_size]         True where an element is present
        index     int64   []                 position in this data set

    Give a `DataLoader` `collate_fn=as_batch`.

    Attributes: `schema`, `image_size`, `set_size`, `source` (plain types), `image_index` (numbers in the source).
    """

    schema: ElementSchema
    image_size: int
    set_size: int
    source: dict[str, Any]
    image_index: np.ndarray

    def _keep(self, elements: np.ndarray, set_size: int | None, name: object) -> None:
        """Keep `elements [n, N, D]`, trimmed or padded to `set_size`."""
        self.set_size = elements.shape[1] if set_size is None else set_size
        counts = (self.schema.values(elements, PRESENCE) > 0.5).sum(1)
        if counts.max(initial=0) > self.set_size:
            first = int((counts > self.set_size).argmax())
            raise InputError(
                f"{name}: image {first} has {counts[first]} objects, but the model holds sets of at most "
                f"{self.set_size}; use a set size of at least {counts.max()}"
            )
        padding = max(0, self.set_size - elements.shape[1])
        self._elements = np.pad(elements[:, : self.set_size], ((0, 0), (0, padding), (0, 0)))

    def __len__(self) -> int:
        return len(self._elements)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = np.asarray(indices, dtype=np.int64)
        # torch.from_numpy shares memory: the image keeps the layout it has on the disk
        elements = torch.from_numpy(self._elements[index])
        return {
            "image": self._read(index).permute(0, 3, 1, 2),
            "elements": elements,
            "mask": presence_mask(elements),
            "index": torch.from_numpy(index),
        }

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([range(len(self))[index]]).items()}

    def name(self, index: int) -> str:
        """Name of an image for the people who look at it: that of its file where it is known, else its number."""
        return f"image {self.image_index[index]}"

    @abstractmethod
    def camera(self, index: int) -> np.ndarray:
        """Location of the camera of an image, float64 `[3]`, NaN where unknown."""

    @abstractmethod
    def _read(self, index: np.ndarray) -> Tensor:
        """Images uint8 `[batch, S, S, 3]`, as a copy."""


def as_batch(batch: Batch) -> Batch:
    """Return the batch: the `collate_fn` for data sets whose `__getitems__` makes batches."""
    return batch


def fitting_workers(workers: int, data: Dataset, batch_size: int) -> int:
    """The most worker processes, up to `workers`, whose batches fit into shared memory at once.

    A `DataLoader` holds two batches a worker in /dev/shm and the one in use, and waits for ever for one that does not
    fit (containers have 64 MB by default).
    """
    try:
        space = os.statvfs(SHARED_MEMORY)
    except (AttributeError, OSError):  # Windows and macOS share in other ways
        return workers
    if workers < 1 or len(data) < 1:
        return workers
    free = space.f_bavail * space.f_frsize
    example = sum(value.nbytes for value in data.__getitems__([0]).values() if isinstance(value, Tensor))
    batch = max(1, example * min(batch_size, len(data)))
    most = max(0, (free // batch - 1) // 2)
    if most >= workers:
        return workers
    warnings.warn(
        f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free, reading in {workers} processes takes "
        f"{(2 * workers + 1) * batch / 1e6:.1f} MB; reading in {most} (docker: --shm-size)",
        stacklevel=2,
    )
    return most


class SetFile(SetImages):
    """A file made by `python -m setpred data`.

    The sets are read at once, the images when asked for. Each process opens the file for itself: a forked process
    closes an inherited handle first, and handles are not pickled. Threads may share the data set.

    The layout and every set are checked on opening. The checksum needs all images: `python -m setpred data verify`.

    Args:
        image_size: expected side of the images; that of the file by default.
        set_size: size of the sets; the schema's `max_objects` by default.
        schema: schema of the elements; a file with the same fields is converted. That of the file by default.
        images: only the first so many.
        in_memory: read all images at first use and keep them; None does so under 2 GB. A process that this data set
            was sent to reads from the file.

    Raises:
        InputError: a missing, damaged or foreign file; another image size or schema; sets too large.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        set_size: int | None = None,
        schema: ElementSchema | None = None,
        images: int | None = None,
        in_memory: bool | None = None,
    ) -> None:
        self.path = Path(path).resolve()
        self._handle: h5py.File | None = None
        self._images: Tensor | None = None
        self._owner: int | None = os.getpid()  # the process that may fill its memory with images
        if images is not None and images < 1:
            raise InputError(f"expected at least 1 image, got {images}")
        with open_set_file(path) as file:
            header = read_header(file, path)
            if image_size is not None and header.image_size != image_size:
                raise InputError(
                    f"expected images of {image_size}x{image_size}, but {path} has {header.image_size}x"
                    f"{header.image_size}; make it again with --image-size {image_size}, or set the image size to it"
                )
            self.schema = header.schema if schema is None else schema
            self.image_size, self.source = header.image_size, dict(header.source)
            rows = read_sets(file, header, path, images)
            self._names = read_names(file, header.images, path)
            self.image_index, self._cameras = rows.index, rows.camera
            try:
                elements = self.schema.converted(rows.elements, header.schema)
            except InputError as error:
                raise InputError(f"{path} holds elements of another schema than the model: {error}") from error
            self._keep(elements, set_size, path)
        size = len(self) * self.image_size**2 * 3
        self.in_memory = size < IN_MEMORY_BYTES if in_memory is None else in_memory

    def name(self, index: int) -> str:
        return super().name(index) if self._names is None else self._names[index]

    def camera(self, index: int) -> np.ndarray:
        return self._cameras[index]

    def load(self, device: torch.device | str | None = None) -> None:
        """Read the images into memory if `in_memory` says so; call it before workers fork, so that they share it.

        Args:
            device: read them into the memory of this device in any case, where the images of a batch are then.

        Raises:
            InputError: a GPU without enough free memory.
        """
        if device is None and not self.in_memory:
            return
        if self._images is not None and device in (None, self._images.device):
            return
        device = torch.device("cpu" if device is None else device)
        shape = (len(self), self.image_size, self.image_size, 3)
        if device.type == "cuda" and (size := math.prod(shape)) > (free := torch.cuda.mem_get_info(device)[0]):
            raise InputError(
                f"the {len(self)} images of {self.path} take {size / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB "
                'free; keep them in the host\'s memory (in_memory: true instead of "device"), or use fewer images'
            )
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        for start in range(0, len(self), BLOCK):  # the host's memory never has all of them at once
            rows = np.arange(start, min(start + BLOCK, len(self)))
            images[start : start + BLOCK] = torch.from_numpy(self._stored(rows))
        self._images = images  # only now: a block may have been damaged

    def _read(self, index: np.ndarray) -> Tensor:
        if os.getpid() == self._owner:
            self.load()
        if self._images is None:
            return torch.from_numpy(self._stored(index))
        if self._images.device.type == "cpu":  # NumPy takes two thirds of torch's time
            return torch.from_numpy(self._images.numpy()[index])
        # only the numbers cross, without waiting for the device
        return self._images.index_select(0, torch.from_numpy(index).to(self._images.device, non_blocking=True))

    def _stored(self, index: np.ndarray) -> np.ndarray:
        if self._handle is None:
            self._handle = open_set_file(self.path)
            _opened.add(self)
        try:
            return read_images(self._handle, index)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged ({error}); copy or make it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_images": None, "_owner": None}


_opened: weakref.WeakSet[SetFile] = weakref.WeakSet()


def _close_inherited() -> None:
    """Close files in a forked process: it would share the file position with its parent."""
    for data in list(_opened):
        if data._handle is not None:
            data._handle.close()
            data._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)  # h5py ensures that no thread is inside HDF5 then


class ClevrImages(SetImages):
    """A split of a CLEVR_v1.0 folder, decoded image by image; to read it often, `prepare` a file.

    Raises:
        InputError: something is wrong with the folder; sets too large; later, an image that cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "val",
        image_size: int,
        set_size: int | None = None,
        schema: ElementSchema = CLEVR,
        images: int | None = None,
    ) -> None:
        self.folder = ClevrFolder(root, split, schema=schema, images=images)
        self.schema, self.image_size, self.source = schema, image_size, self.folder.source
        self.image_index = self.folder.index
        self._keep(self.folder.elements, set_size, root)

    def camera(self, index: int) -> np.ndarray:
        return self.folder.camera(index)

    def _read(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self.folder.image(number, self.image_size) for number in index]))


def open_data(
    path: str | os.PathLike[str],
    *,
    image_size: int,
    split: str = "val",
    schema: ElementSchema = CLEVR,
    in_memory: bool | None = None,
    **size: int | None,
) -> SetFile | ClevrImages:
    """Open the data set at `path`: a prepared file, or a split of a CLEVR_v1.0 folder.

    Args:
        size: `set_size` and `images`, as of `SetFile`.

    Raises:
        InputError: neither, or what `SetFile` and `ClevrImages` raise.
    """
    if Path(path).is_dir():
        return ClevrImages(path, split=split, image_size=image_size, schema=schema, **size)
    return SetFile(path, image_size=image_size, schema=schema, in_memory=in_memory, **size)
