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
from setpred.data.hdf5 import BLOCK, open_set_file, read_header, read_images, read_sets
from setpred.errors import InputError
from setpred.schema import CLEVR, PRESENCE, ElementSchema
from setpred.sets import presence_mask

if TYPE_CHECKING:
    import h5py

Batch = dict[str, Tensor]
SHARED_MEMORY = "/dev/shm"
IN_MEMORY_BYTES = 2_000_000_000  # files whose images take less are read into memory, unless told otherwise


class SetImages(Dataset, ABC):
    """Images with the sets of what is in them.

    `data[i]` is a dict, and `data.__getitems__([i, j, ...])`, which a `DataLoader` calls, the same with a batch axis
    in front:

        image     uint8   [3, S, S]          (in memory channels last, as it was stored)
        elements  float32 [set_size, D]      zero padded
        mask      bool    [set_size]         True where an element is present
        index     int64   []                 position in this data set

    Give a `DataLoader` `collate_fn=as_batch`: a batch is already one.

    Attributes: `schema`, `image_size`, `set_size`, `source` (plain types), `image_index` (numbers in the source).
    """

    schema: ElementSchema
    image_size: int
    set_size: int
    source: dict[str, Any]
    image_index: np.ndarray

    def _set_elements(self, elements: np.ndarray, set_size: int | None, name: str) -> None:
        """Keeps `elements [n, N, D]`, trimmed or padded to `set_size`."""
        self.set_size = elements.shape[1] if set_size is None else set_size
        counts = (self.schema.values(elements, PRESENCE) > 0.5).sum(1)
        if (too_many := counts > self.set_size).any():
            first = int(too_many.argmax())
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
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index under {len(self)}, got {index}")
        return {name: value[0] for name, value in self.__getitems__([index % len(self)]).items()}

    @abstractmethod
    def camera(self, index: int) -> np.ndarray:
        """Where the camera of an image stood, float64 `[3]`, NaN where unknown."""

    @abstractmethod
    def _read(self, index: np.ndarray) -> Tensor:
        """Images `[batch, S, S, 3]` uint8, in memory of their own."""


def as_batch(batch: Batch) -> Batch:
    """The `collate_fn` for these data sets, whose batches are already batches."""
    return batch


def fitting_workers(workers: int, data: Dataset, batch_size: int) -> int:
    """The most worker processes, up to `workers`, whose batches fit into shared memory at once; 0 reads without.

    A `DataLoader` holds two batches a worker in /dev/shm and the one in use, and waits for ever for one that does not
    fit (containers have 64 MB unless told otherwise).
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

    The sets are read at once, the images when asked for. The file is opened in each process that reads it and never
    shared: a forked process closes what it has inherited first, and handles are not pickled. Threads may share it.

    The layout and every set are checked on opening; the checksum, which needs all images, by `python -m setpred data
    verify` alone. So pixels that a disk has changed, or numbers that still are those of a set, are noticed there.

    Args:
        image_size: what the images must have; None takes what the file has.
        set_size: size of the sets; None takes the schema's largest.
        schema: what the elements must be; None takes what the file has.
        images: only so many, the first ones.
        in_memory: read all images at first use and keep them; None does so under 2 GB. A process that this data set
            was sent to reads from the file.

    Raises:
        InputError: missing, cut short, damaged or foreign file; another image size or schema; sets too large.
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
            if schema is not None and header.schema != schema:
                raise InputError(
                    f"{path} holds elements of another schema than the model: {schema.differences(header.schema)}"
                )
            if image_size is not None and header.image_size != image_size:
                raise InputError(
                    f"expected images of {image_size}x{image_size}, but {path} has "
                    f"{header.image_size}x{header.image_size}; "
                    f"make it again with --image-size {image_size}, or set the image size to {header.image_size}"
                )
            self.schema, self.image_size, self.source = header.schema, header.image_size, dict(header.source)
            rows = read_sets(file, header, path, images)
            self.image_index, self._cameras = rows.index, rows.camera
            self._set_elements(rows.elements, set_size, str(path))
        size = len(self) * self.image_size**2 * 3
        self.in_memory = size < IN_MEMORY_BYTES if in_memory is None else in_memory

    def camera(self, index: int) -> np.ndarray:
        return self._cameras[index]

    def load(self, device: torch.device | str | None = None) -> None:
        """Reads the images into memory if they are to be there; before workers are forked, they share them.

        Args:
            device: read them into the memory of this device, in any case. Images of a batch are then there, too.

        Raises:
            InputError: a GPU that has not so much memory left.
        """
        if device is None and (not self.in_memory or self._images is not None):
            return
        device = torch.device("cpu" if device is None else device)
        if self._images is not None and self._images.device == device:
            return
        shape = (len(self), self.image_size, self.image_size, 3)
        if device.type == "cuda":
            self._check_room(math.prod(shape), device)
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        for start in range(0, len(self), BLOCK):  # so that a GPU's set is never whole in the host's memory
            rows = np.arange(start, min(start + BLOCK, len(self)))
            images[start : start + BLOCK] = torch.from_numpy(self._stored(rows))
        self._images = images  # not before all are there: a block may turn out to be damaged

    def _check_room(self, size: int, device: torch.device) -> None:
        free, _ = torch.cuda.mem_get_info(device)
        if size > free:
            raise InputError(
                f"the {len(self)} images of {self.path} take {size / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB "
                'free; keep them in the host\'s memory (in_memory: true instead of "device"), or use fewer images'
            )

    def _read(self, index: np.ndarray) -> Tensor:
        if os.getpid() == self._owner:
            self.load()
        if self._images is None:
            return torch.from_numpy(self._stored(index))
        if self._images.device.type == "cpu":  # NumPy picks whole images in two thirds of torch's time
            return torch.from_numpy(self._images.numpy()[index])
        # the numbers are all that crosses; not waited for, they do not hold up what the device still has to do
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
    """In a forked process: HDF5 would take an inherited file for the one to open, and so share its place with the
    other processes, who would move it under each other's reading where HDF5 was built without positioned reads."""
    for data in list(_opened):
        if data._handle is not None:
            data._handle.close()
            data._handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)  # h5py sees to it that no thread is inside HDF5 then


class ClevrImages(SetImages):
    """A split of a CLEVR_v1.0 folder, decoded image by image; `prepare` a file when it is to be read more than once.

    Raises:
        InputError: whatever is wrong with the folder; sets too large; later, an image that cannot be read.
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
        self._set_elements(self.folder.elements, set_size, str(root))

    def camera(self, index: int) -> np.ndarray:
        return self.folder.camera(index)

    def _read(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self.folder.image(number, self.image_size) for number in index]))


def open_data(
    path: str | os.PathLike[str],
    *,
    split: str = "val",
    image_size: int,
    set_size: int | None = None,
    schema: ElementSchema = CLEVR,
    images: int | None = None,
    in_memory: bool | None = None,
) -> SetFile | ClevrImages:
    """The data set at `path`: a prepared file, or a CLEVR_v1.0 folder, of which `split` is taken.

    Raises:
        InputError: neither, or what `SetFile` and `ClevrImages` raise.
    """
    if Path(path).is_dir():
        return ClevrImages(path, split=split, image_size=image_size, set_size=set_size, schema=schema, images=images)
    return SetFile(path, image_size=image_size, set_size=set_size, schema=schema, images=images, in_memory=in_memory)
