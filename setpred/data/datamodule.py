"""Lightning data modules: prepared files or CLEVR folders, and built-in scenes rendered on demand."""

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

import setpred
from setpred.data.augmentation import Augmentation
from setpred.data.dataset import Batch, ClevrImages, SetFile, as_batch, fitting_workers, open_data
from setpred.data.hdf5 import Header, InputSets, file_header
from setpred.data.loading import EpochOrder, EpochPermutation, training_loader, validation_loader
from setpred.data.scenes import render_records, rendered_header, rendered_name
from setpred.data.views import view_inputs
from setpred.errors import InputError
from setpred.files import locked, make_folder, writing
from setpred.schema import CLEVR, ElementSchema
from setpred.workers import leave_signals_to_parent

InMemory = bool | Literal["device"] | None

LONGEST_WAIT = 24 * 3600.0  # seconds, for another process that renders a file
FOLDER_SIZE = 128  # side of the images of a CLEVR folder, by default
AUGMENT = "augment"  # entry of a batch that is to be augmented
VALIDATION_SEED = 1_000_000  # added to the seed of the training scenes: no training seed comes near


class SetData(LightningDataModule, ABC):
    """Batches of training examples in an order that the seed decides, and of validation examples in order.

    Args:
        batch_size: training examples per step and process; the last, smaller batch of an epoch is left out.
        eval_batch_size: validation examples at a time; `batch_size` by default.
        seed: of the order of the training examples; None takes the seed of the run, from the command line.
    """

    def __init__(self, *, batch_size: int = 128, eval_batch_size: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        _check_least({"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1), "seed": (seed, 0)})
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size or batch_size, seed
        self.train_data: Dataset | None = None
        self.val_data: Dataset | None = None

    @abstractmethod
    def open_split(self, split: str) -> Dataset:
        """The examples of "train" or "val"."""

    def order(self) -> EpochOrder:
        """The order of the training examples."""
        return EpochPermutation(len(self.train_data), seed=self.seed or 0)

    def reading(self, data: Dataset) -> dict[str, Any]:
        """The arguments of `DataLoader` that training and validation share."""
        return {"collate_fn": as_batch}

    def setup(self, stage: str | None = None) -> None:
        if stage in (None, "fit") and self.train_data is None:
            self.train_data = self.open_split("train")
        if self.val_data is None:
            self.val_data = self.open_split("val")

    def train_dataloader(self) -> DataLoader:
        assert self.train_data is not None, "setup('fit') comes first"
        reading = self.reading(self.train_data)
        return training_loader(self.train_data, self.batch_size, self.order(), self.trainer, **reading)

    def val_dataloader(self) -> DataLoader:
        assert self.val_data is not None, "setup comes first"
        return validation_loader(self.val_data, self.eval_batch_size, self.trainer, **self.reading(self.val_data))


def to_augment(batch: Batch) -> dict[str, Any]:
    """Mark a batch of the training loader, apart from the same examples for batch statistics."""
    return batch | {AUGMENT: True}


def _check_least(values: dict[str, tuple[int | None, int]]) -> None:
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise InputError(f"expected {name} of at least {least}, got {value}")


class ImageData(SetData):
    """Images, or input sets, with sets, read by worker processes.

    Args:
        image_size: side of the images; a file of another size is an error. None for input sets.
        set_size: size of the sets; the schema's `max_objects` by default.
        num_workers: processes that read; 0 suits files in memory, and is what a set in a GPU's memory gets.
        in_memory: keep a file's images in memory; None does so under 2 GB. "device" keeps them as uint8 in the memory
            of the device that trains, to which only the numbers of a batch's images are sent.
        augment: random changes of the training images, whose objects move with them; none by default.
        masks: batches of the validation data have `instances`, the visible pixels of each object. Those of the training
            data do not: no loss compares with masks.
        arguments: those of `SetData`.

    Raises:
        InputError: an argument out of range; on `setup`, objects that cannot follow the changes of `augment`.
    """

    schema = CLEVR
    inputs: InputSets | None = None
    train_path: str | None
    val_path: str

    def __init__(
        self,
        *,
        image_size: int | None = 128,
        set_size: int | None = None,
        num_workers: int = 0,
        in_memory: InMemory = None,
        augment: Augmentation | None = None,
        masks: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        _check_least({"image_size": (image_size, 1), "num_workers": (num_workers, 0)})
        self.augment, self.masks = augment, masks
        self.image_size, self.set_size = image_size, set_size
        self.num_workers, self.in_memory = num_workers, in_memory

    @property
    def input_dim(self) -> int | None:
        """Numbers of an element of the inputs; None for images."""
        return None if self.inputs is None else self.inputs.dim

    def open_images(
        self, path: str, split: str = "val", images: int | None = None, *, masks: bool = False
    ) -> SetFile | ClevrImages:
        """Open a file, or a split of a folder, of this module's image size, set size and schema."""
        size = {"image_size": self.image_size, "set_size": self.set_size, "schema": self.schema, "images": images}
        on_device = self.in_memory == "device"
        in_memory = False if on_device else self.in_memory
        data = open_data(path, split=split, in_memory=in_memory, instances=masks, **size)
        if on_device and not isinstance(data, SetFile):
            raise InputError(
                f'in_memory "device" is for prepared files, and {path} is a folder; make a file of it with '
                "`setpred data prepare`, or leave in_memory out"
            )
        return data

    def reading(self, data: Dataset) -> dict[str, Any]:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if isinstance(data, SetFile):  # before the workers fork, so that they share the memory
            data.load(device if self.in_memory == "device" else None)
        there = isinstance(data, SetFile) and self.in_memory == "device" and device.type != "cpu"
        # workers cannot read a GPU's memory
        workers = 0 if there else fitting_workers(self.num_workers, data, max(self.batch_size, self.eval_batch_size))
        augmented = data is self.train_data and self.augment is not None
        return (
            super().reading(data)
            | ({"collate_fn": to_augment} if augmented else {})
            | {
                "num_workers": workers,
                "persistent_workers": workers > 0,
                "worker_init_fn": leave_signals_to_parent,
                "pin_memory": device.type == "cuda" and not there,
            }
        )

    def check_augment(self) -> None:
        """Raise `InputError` if objects of the schema cannot follow `augment`."""
        if self.augment is not None:
            self.augment.check(self.schema)

    def setup(self, stage: str | None = None) -> None:
        self.check_augment()
        super().setup(stage)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Augment a batch of the training loader, on the device that trains."""
        if AUGMENT not in batch:
            return batch
        batch = {name: value for name, value in batch.items() if name != AUGMENT}
        return self.augment.apply(batch, self.schema, seed=self.seed or 0, epoch=self.trainer.current_epoch)

    def statistics_batches(self, images: int) -> Iterator[dict[str, Any]]:
        """Full batches of the first training examples, of at most `images` examples; the same in each call."""
        assert self.train_data is not None, "setup('fit') comes first"
        last = min(images, len(self.train_data)) - self.batch_size
        for first in range(0, max(last, 0) + 1, self.batch_size):
            yield self.train_data.__getitems__(range(first, first + self.batch_size))

    def teardown(self, stage: str | None = None) -> None:
        """End the workers; torch would do so when the program ends, too late for their temporary folders."""
        for loader in () if self.trainer is None else (self.trainer.train_dataloader, self.trainer.val_dataloaders):
            if (iterator := getattr(loader, "_iterator", None)) is not None:
                loader._iterator = None
                iterator._shutdown_workers()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown()


class DataSizes(NamedTuple):
    """Sizes that a model takes from its data; None and 0 for unknown ones."""

    schema: ElementSchema
    set_size: int
    image_size: int | None
    images: int = 0
    inputs: InputSets | None = None


class SetDataModule(ImageData):
    """Training and validation data, each a prepared file of images or of input sets, or a CLEVR_v1.0 folder.

    Args:
        train: training data; None to evaluate only.
        val: validation data.
        train_split, val_split: split of the data, if it is a folder.
        train_images, val_images: only the first so many.
        image_size: side of the images; by default that of the files, 128 for folders.
        arguments: those of `ImageData`.

    Raises:
        InputError: on `setup`, something is wrong with the data.
    """

    @classmethod
    def sizes(cls, arguments: Mapping[str, Any]) -> DataSizes:
        """Read the sizes of data with these arguments from the headers of the files.

        The schema is that of the training data, with room for the largest set of both. Folders, and files that do not
        exist yet, count as CLEVR's. Offset and scale of input sets are those of the training data.

        Raises:
            InputError: one of the two has images, the other sets; input sets of elements of different lengths.
        """
        paths = [os.path.expanduser(path) for path in (arguments.get("train"), arguments.get("val")) if path]
        headers = [file_header(path) if Path(path).is_file() else None for path in paths]
        if not paths:  # of a subclass with other arguments
            return DataSizes(
                cls.schema, arguments.get("set_size") or cls.schema.max_objects, arguments.get("image_size")
            )
        schemas = [cls.schema if header is None else header.schema for header in headers]
        schema = schemas[0].with_room(max(each.max_objects for each in schemas))
        files = [header for header in headers if header is not None]
        image_size = arguments.get("image_size") or (files[0].image_size if files else FOLDER_SIZE)
        images = 0 if headers[0] is None else headers[0].images
        kinds = ["images" if each is None or each.inputs is None else f"{each.inputs.dim} numbers" for each in headers]
        if len(set(kinds)) > 1:
            raise InputError(f"expected inputs of one kind, got {kinds[0]} in {paths[0]} and {kinds[1]} in {paths[1]}")
        inputs = None if headers[0] is None else headers[0].inputs
        return DataSizes(schema, arguments.get("set_size") or schema.max_objects, image_size, images, inputs)

    def __init__(
        self,
        train: str | None,
        val: str,
        *,
        train_split: str = "train",
        val_split: str = "val",
        train_images: int | None = None,
        val_images: int | None = None,
        image_size: int | None = None,
        **arguments: Any,
    ) -> None:
        sizes = self.sizes({"train": train, "val": val, "image_size": image_size})
        super().__init__(image_size=sizes.image_size, **arguments)
        self.schema, self.inputs = sizes.schema, sizes.inputs
        self.train_path, self.val_path = (None if path is None else os.path.expanduser(path) for path in (train, val))
        self.train_split, self.val_split = train_split, val_split
        self.train_images, self.val_images = train_images, val_images

    def setup(self, stage: str | None = None) -> None:
        self.schema = self.sizes({"train": self.train_path, "val": self.val_path}).schema
        super().setup(stage)

    def open_split(self, split: str) -> SetFile | ClevrImages:
        if split == "val":
            return self.open_images(self.val_path, self.val_split, self.val_images, masks=self.masks)
        if self.train_path is None:
            raise InputError("this data has no training part; give `train` a file or a CLEVR folder")
        return self.open_images(self.train_path, self.train_split, self.train_images)


@dataclass(frozen=True)
class RenderedFile:
    """A file of built-in scenes in a folder, rendered by `setpred.data.scenes.render_file` if it does not exist.

    Args:
        header: description of the file.
        workers: processes that render; all cores by default.
    """

    header: Header
    folder: str
    workers: int | None = None

    @property
    def _which(self) -> dict[str, Any]:
        return {name: value for name, value in self.header.source.items() if name != "kind"}

    @property
    def path(self) -> str:
        return str(Path(self.folder).expanduser() / rendered_name(self.header))

    def prepare(self) -> None:
        """Render the file if it does not exist, and check it.

        Raises:
            InputError: the rendering failed (it has printed why), or a file of that name is something else.
        """
        if not os.path.exists(self.path):
            self._render_once()
        images, size, source = self.header.images, self.header.image_size, self.header.source
        data = SetFile(self.path, image_size=size, schema=CLEVR, in_memory=False, instances=self.header.instances)
        if data.source != source or len(data) != images:
            raise InputError(
                f"expected {images} images of {source} in {self.path}, got {len(data)} of {data.source}; move it away "
                "and it will be rendered"
            )
        now = render_records([0], image_size=size, **self._which)[0]
        shades = np.abs(data[0]["image"].permute(1, 2, 0).numpy().astype(int) - now.image).mean()
        # other processors and versions of NumPy may round otherwise
        if shades >= 1 or not np.allclose(data[0]["elements"].numpy(), now.elements, atol=1e-4):
            raise InputError(
                f"{self.path} was rendered by another version of the renderer, which draws other pictures; move it "
                "away to render it again, or train on it with setpred.data.datamodule.SetDataModule"
            )

    def _render_once(self) -> None:
        """Render it, or wait for another process that does: jobs that start together share the file."""
        make_folder(Path(self.path).parent)
        lock = Path(f"{self.path}.lock")
        with writing(lock), ExitStack() as held:
            try:
                held.enter_context(locked(lock, passing=True, patience=0.2))
            except InputError:
                print(f"waiting for another process that renders {self.path}", flush=True)
                held.enter_context(locked(lock, passing=True, patience=LONGEST_WAIT))
            if not os.path.exists(self.path):
                self._render()

    def _render(self) -> None:
        # Another process, for its workers import the main program, which here would be torch and Lightning.
        options = {"images": self.header.images, "image-size": self.header.image_size, "out": self.path} | self._which
        options |= {} if self.workers is None else {"workers": self.workers}
        options |= {"masks": []} if self.header.instances else {}
        words = ([f"--{name}", *(value if isinstance(value, list) else [value])] for name, value in options.items())
        command = [sys.executable, "-m", "setpred.data", "render", *(str(word) for each in words for word in each)]
        paths = filter(None, (str(Path(setpred.__file__).parents[1]), os.environ.get("PYTHONPATH")))
        if subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}).returncode != 0:
            raise InputError(f"rendering {self.path} failed, for the reason given above")


class BuiltInScenes(ImageData):
    """Built-in scenes, no download: files under `folder`, rendered if they do not exist.

    Args:
        val_images: number of validation scenes.
        objects: least and most objects of a scene.
        scenes_seed: seed of the scenes, apart from `seed`, so that runs of several seeds share the files.
        condition: colours that each shape may have: "clevr", "cogent-a" or "cogent-b".
        views: images of each scene, from cameras around it, that a model of sets takes together, with their poses (see
            `setpred.data.views.SceneViews`); by default a model of images takes one. `StreamedScenes` has none.
        folder: folder of the files, kept for the next run.
        workers: processes that render; all cores by default.
        arguments: those of `ImageData`.

    Raises:
        InputError: an argument out of range; on `prepare_data` and `setup`, what is wrong with the files.
    """

    def __init__(
        self,
        *,
        val_images: int = 1_000,
        objects: tuple[int, int] = (3, 10),
        scenes_seed: int = 0,
        condition: str = "clevr",
        views: int | None = None,
        folder: str = "data",
        workers: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        _check_least({"scenes_seed": (scenes_seed, 0), "views": (views, 1), "workers": (workers, 0)})
        if self.set_size is not None and objects[1] > self.set_size:  # before scenes are rendered
            raise InputError(
                f"expected scenes of at most {self.set_size} objects for sets of {self.set_size}, got objects up to "
                f"{objects[1]}; use a set_size of at least {objects[1]}"
            )
        self.check_augment()  # before scenes are rendered
        self.side, self.which = self.image_size, {"objects": tuple(objects), "condition": condition, "views": views}
        if views is not None:
            if self.augment is not None or self.masks:
                raise InputError("expected views without augmentation and masks; leave augment and masks out")
            self.inputs, self.image_size = view_inputs(views, self.side), None
        self.scenes_seed, self.folder, self.workers = scenes_seed, folder, workers
        self.files = (self.rendered(val_images, scenes_seed + VALIDATION_SEED, masks=self.masks),)
        self.train_path, self.val_path = None, self.files[0].path

    @classmethod
    def sizes(cls, arguments: Mapping[str, Any]) -> DataSizes:
        """The sizes of scenes with these arguments."""
        side, views = arguments["image_size"], arguments.get("views")
        inputs = None if views is None else view_inputs(views, side)
        return DataSizes(cls.schema, arguments.get("set_size") or cls.schema.max_objects, side, inputs=inputs)

    def rendered(self, scenes: int, seed: int, *, masks: bool = False) -> RenderedFile:
        """A file of so many scenes, after checking the arguments."""
        images = scenes * (self.which["views"] or 1)
        header = rendered_header(images=images, image_size=self.side, masks=masks, seed=seed, **self.which)
        return RenderedFile(header, self.folder, self.workers)

    def prepare_data(self) -> None:
        """Render the files that do not exist; errors as in `RenderedFile.prepare`."""
        for file in self.files:
            file.prepare()

    def open_split(self, split: str) -> Dataset:
        path = self.train_path if split == "train" else self.val_path
        return self.open_images(path, masks=self.masks and split == "val")


class RenderedScenes(BuiltInScenes):
    """Built-in scenes in a file of training and a file of validation scenes.

    Args:
        train_images: number of training scenes.
        image_size: side of the images.
        batch_size: training examples per step and process; the last, smaller batch of an epoch is left out.
        mixed_views: training scenes have from one to all of their `views`; validation scenes have all.
        arguments: those of `BuiltInScenes`.
    """

    def __init__(
        self,
        *,
        train_images: int = 12_000,
        image_size: int = 64,
        batch_size: int = 64,
        mixed_views: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, **arguments)
        if mixed_views and self.inputs is None:
            raise InputError("expected views for mixed_views; give their number, or leave mixed_views out")
        self.mixed_views = mixed_views
        self.files = (self.rendered(train_images, self.scenes_seed), *self.files)
        self.train_path = self.files[0].path

    def open_split(self, split: str) -> Dataset:
        data = super().open_split(split)
        if self.mixed_views and split == "train":
            data.mixed = True
        return data
