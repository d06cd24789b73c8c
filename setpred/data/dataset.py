"""Torch data sets of inputs and their sets: from a prepared file, or straight from a CLEVR folder."""

from __future__ import annotations

import math
import os
import tempfile
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
from setpred.data.hdf5 import (
    BLOCK,
    INSTANCES,
    InputSets,
    file_header,
    open_set_file,
    read_header,
    read_inputs,
    read_instances,
    read_names,
    read_sets,
    set_sizes,
)
from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema
from setpred.sets import fill_absent, presence_mask

if TYPE_CHECKING:
    import h5py

Batch = dict[str, Tensor]
SHARED_MEMORY = "/dev/shm"
LONGEST_TEMPORARY = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")  # bytes: Linux's longest name of a socket, less ours
VIEWS = "views"  # entry of the source of a file: images of each scene, one after the other
IN_MEMORY_BYTES = 2_000_000_000  # files whose images take less are kept in memory by default


class SetImages(Dataset, ABC):
    """Images, or input sets, with the sets of objects in them.

    `data[i]` is a dict; `data.__getitems__([i, j, ...])`, which a `DataLoader` calls, has a batch axis in front:

        image       uint8   [3, S, S]        (in memory channels last, as it is stored); or, for input sets,
        input       float32 [M, K]           in the units of the file, zero padded
        input_mask  bool    [M]              True where an element is present; only where sizes differ
        elements    float32 [set_size, D]    zero padded
        mask        bool    [set_size]       True where an element is present
        instances   uint8   [S, S]           0: background, k: the object of row k - 1 of elements; only if asked for
        index       int64   []               position in this data set

    Give a `DataLoader` `collate_fn=as_batch`.

    Attributes: `schema`, `image_size` (None for input sets), `inputs` (of input sets, else None), `set_size`, `source`
    (plain types), `image_index` (numbers in the source).
    """

    schema: ElementSchema
    image_size: int | None
    inputs: InputSets | None = None
    set_size: int
    source: dict[str, Any]
    image_index: np.ndarray

    def _keep(self, elements: np.ndarray, set_size: int | None, name: object) -> None:
        """Keep `elements [n, N, D]`, trimmed or padded to `set_size`."""
        self.set_size = elements.shape[1] if set_size is None else set_size
        counts = set_sizes(elements, self.schema)
        if counts.max(initial=0) > self.set_size:
            first = int((counts > self.set_size).argmax())
            raise InputError(
                f"{name}: {'set' if self.inputs else 'image'} {first} has {counts[first]} objects, but the model holds "
                f"sets of at most {self.set_size}; use a set size of at least {counts.max()}"
            )
        padding = max(0, self.set_size - elements.shape[1])
        self._elements = np.pad(elements[:, : self.set_size], ((0, 0), (0, padding), (0, 0)))

    def __len__(self) -> int:
        return len(self._elements)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = np.asarray(indices, dtype=np.int64)
        # torch.from_numpy shares memory: the image keeps the layout it has on the disk
        elements = torch.from_numpy(self._elements[index])
        return self._batch_inputs(index) | {
            "elements": elements,
            "mask": presence_mask(elements),
            "index": torch.from_numpy(index),
        }

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([range(len(self))[index]]).items()}

    def _batch_inputs(self, index: np.ndarray) -> Batch:
        """The inputs of a batch by name."""
        inputs, *instances = self._read(index)
        if self.inputs is None:
            return {"image": inputs.permute(0, 3, 1, 2)} | dict(zip([INSTANCES], instances, strict=False))
        return set_inputs(inputs, padded=self.inputs.padded)

    def name(self, index: int) -> str:
        """Name of an example for the people who look at it: that of its file where it is known, else its number."""
        return f"{'image' if self.inputs is None else 'example'} {self.image_index[index]}"

    @abstractmethod
    def camera(self, index: int) -> np.ndarray:
        """Location of the camera of an image, float64 `[3]`, NaN where unknown."""

    @abstractmethod
    def _read(self, index: np.ndarray) -> tuple[Tensor, ...]:
        """Images uint8 `[batch, S, S, 3]`, or input sets float32 `[batch, M, K]` padded with NaN; perhaps instances.

        As copies.
        """


def set_inputs(rows: Tensor, *, padded: bool) -> Batch:
    """The inputs of a batch from sets `[batch, M, K]` that are padded with NaN; with a mask if some are `padded`."""
    present = ~rows[..., 0].isnan()
    return {"input": fill_absent(rows, present)} | ({"input_mask": present} if padded else {})


def as_batch(batch: Batch) -> Batch:
    """Return the batch: the `collate_fn` for data sets whose `__getitems__` makes batches."""
    return batch


def fitting_workers(workers: int, data: Dataset, batch_size: int) -> int:
    """The most worker processes, up to `workers`, whose batches fit into shared memory at once.

    A `DataLoader` holds two batches a worker in /dev/shm and the one in use, and waits for ever for one that does not
    fit (containers have 64 MB by default), or whose socket in the folder of temporary files has too long a name.
    """
    folder = tempfile.gettempdir()
    if workers > 0 and len(os.fsencode(folder)) > LONGEST_TEMPORARY:
        warnings.warn(
            f"the path of the folder of temporary files has {len(os.fsencode(folder))} bytes, which leaves no room for "
            "the sockets of reading processes; reading in 0 (set TMPDIR to a shorter path)",
            stacklevel=2,
        )
        return 0
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

    The sets of objects are read at once, the inputs when asked for. Each process opens the file for itself: a forked
    process closes an inherited handle first, and handles are not pickled. Threads may share the data set.

    The layout and every set are checked on opening. The checksum needs all images: `python -m setpred data verify`.

    Args:
        image_size: expected side of the images; that of the file by default.
        set_size: size of the sets; the schema's `max_objects` by default.
        schema: schema of the elements; a file with the same fields is converted. That of the file by default.
        images: only the first so many.
        in_memory: read all images at first use and keep them; None does so under 2 GB. A process that this data set
            was sent to reads from the file.
        instances: batches have `instances`, the visible pixels of each object.

    Raises:
        InputError: a missing, damaged or foreign file; another image size or schema; sets too large; a file without
            masks where `instances` are asked for; later, a damaged mask.
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
        instances: bool = False,
    ) -> None:
        self.path = Path(path).resolve()
        self._handle: h5py.File | None = None
        self._kept: list[Tensor] | None = None
        self._owner: int | None = os.getpid()  # the process that may fill its memory with images
        if images is not None and images < 1:
            raise InputError(f"expected at least 1 image, got {images}")
        with open_set_file(path) as file:
            header = read_header(file, path)
            if image_size is not None and header.image_size is None:
                raise InputError(
                    f"expected images of {image_size}x{image_size}, but {path} has {header.noun}s; leave out image_size"
                )
            if image_size is not None and header.image_size != image_size:
                raise InputError(
                    f"expected images of {image_size}x{image_size}, but {path} has {header.image_size}x"
                    f"{header.image_size}; make it again with --image-size {image_size}, or set the image size to it"
                )
            if instances and not header.instances:
                raise InputError(
                    f"expected masks of the objects in {path}, got {header}; make it again with --masks of "
                    "`setpred data render` or `prepare`, or train with --data.masks false --model.metric null"
                )
            self.schema = header.schema if schema is None else schema
            self.image_size, self.inputs, self.source = header.image_size, header.inputs, dict(header.source)
            layout = header.layout()
            read = (next(iter(layout)), *([INSTANCES] if instances else []))
            self._layout = [(layout[name][0][1:], np.dtype(layout[name][1])) for name in read]  # of what is read later
            rows = read_sets(file, header, path, images)
            self._names = read_names(file, header.images, path)
            self.image_index, self._cameras = rows.index, rows.camera
            try:
                elements = self.schema.converted(rows.elements, header.schema)
            except InputError as error:
                raise InputError(f"{path} holds elements of another schema than the model: {error}") from error
            self._keep(elements, set_size, path)
            self._counts = set_sizes(elements, self.schema)
        self.in_memory = self._bytes < IN_MEMORY_BYTES if in_memory is None else in_memory

    @property
    def _bytes(self) -> int:
        return len(self) * sum(math.prod(shape) * kind.itemsize for shape, kind in self._layout)

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
        if self._kept is not None and device in (None, self._kept[0].device):
            return
        device = torch.device("cpu" if device is None else device)
        if device.type == "cuda" and self._bytes > (free := torch.cuda.mem_get_info(device)[0]):
            raise InputError(
                f"the {len(self)} {'images' if self.inputs is None else 'inputs'} of {self.path} take "
                f"{self._bytes / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB "
                'free; keep them in the host\'s memory (in_memory: true instead of "device"), or use fewer images'
            )
        kinds = [torch.from_numpy(np.empty(0, kind)).dtype for _, kind in self._layout]
        kept = [
            torch.empty((len(self), *shape), dtype=kind, device=device)
            for (shape, _), kind in zip(self._layout, kinds, strict=True)
        ]
        for start in range(0, len(self), BLOCK):  # the host's memory never has all of them at once
            rows = np.arange(start, min(start + BLOCK, len(self)))
            for tensor, part in zip(kept, self._stored(rows), strict=True):
                tensor[start : start + BLOCK] = torch.from_numpy(part)
        self._kept = kept  # only now: a block may have been damaged

    def _read(self, index: np.ndarray) -> tuple[Tensor, ...]:
        if os.getpid() == self._owner:
            self.load()
        if self._kept is None:
            return tuple(map(torch.from_numpy, self._stored(index)))
        if (device := self._kept[0].device).type == "cpu":  # NumPy takes two thirds of torch's time
            return tuple(torch.from_numpy(tensor.numpy()[index]) for tensor in self._kept)
        # only the numbers cross, without waiting for the device
        numbers = torch.from_numpy(index).to(device, non_blocking=True)
        return tuple(tensor.index_select(0, numbers) for tensor in self._kept)

    def _stored(self, index: np.ndarray) -> list[np.ndarray]:
        """The inputs of a batch and, if asked for, its instances."""
        if self._handle is None:
            self._handle = open_set_file(self.path)
            _opened.add(self)
        try:
            instances = [read_instances(self._handle, index, self._counts[index])] if len(self._layout) > 1 else []
            return [read_inputs(self._handle, index), *instances]
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged ({error}); copy or make it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_kept": None, "_owner": None}


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

    def _read(self, index: np.ndarray) -> tuple[Tensor, ...]:
        return (torch.from_numpy(np.stack([self.folder.image(number, self.image_size) for number in index])),)


def open_data(
    path: str | os.PathLike[str],
    *,
    image_size: int | None,
    split: str = "val",
    schema: ElementSchema = CLEVR,
    in_memory: bool | None = None,
    instances: bool = False,
    **size: int | None,
) -> SetFile | ClevrImages:
    """Open the data set at `path`: a prepared file, or a split of a CLEVR_v1.0 folder.

    Args:
        image_size: side of the images; None for input sets, which several images of a scene are, too.
        instances: batches have `instances`; of a prepared file.
        size: `set_size` and `images`, as of `SetFile`.

    Raises:
        InputError: neither; images where sets are expected, or the other way round; `instances` of a folder; or what
            `SetFile` and `ClevrImages` raise.
    """
    folder = Path(path).is_dir()
    if folder and instances:
        raise InputError(f"expected a prepared file with masks, got the folder {path}; prepare it with --masks")
    if folder and image_size is not None:
        return ClevrImages(path, split=split, image_size=image_size, schema=schema, **size)
    if image_size is None and not folder and VIEWS in (header := file_header(path)).source and header.inputs is None:
        from setpred.data.views import SceneViews  # which builds on this file

        return SceneViews(path, schema=schema, in_memory=in_memory, instances=instances, **size)
    if image_size is None and (folder or file_header(path).inputs is None):
        raise InputError(f"expected a file of sets as inputs, but {path} has images; give other data or another model")
    return SetFile(path, image_size=image_size, schema=schema, in_memory=in_memory, instances=instances, **size)
