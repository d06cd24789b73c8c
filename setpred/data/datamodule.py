"""Lightning data modules: prepared files or CLEVR folders, and built-in scenes rendered on demand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

import setpred
from setpred.data.dataset import ClevrImages, SetFile, as_batch, fitting_workers, open_data
from setpred.data.hdf5 import Header
from setpred.data.loading import EpochPermutation, training_loader, validation_loader
from setpred.data.scenes import render_records, rendered_header
from setpred.data.workers import leave_signals_to_parent
from setpred.errors import InputError
from setpred.files import locked, make_folder, writing
from setpred.schema import CLEVR

InMemory = bool | Literal["device"] | None

LONGEST_WAIT = 24 * 3600.0  # seconds, for another process that renders a file
VALIDATION_SEED = 1_000_000  # added to the seed of the training scenes: no training seed comes near


class SetDataModule(LightningDataModule):
    """Training and validation data, each a prepared file or a CLEVR_v1.0 folder.

    Args:
        train: training data; None when only evaluating.
        val: validation data.
        train_split, val_split: which split, where the data is a folder.
        image_size: side of the images; a file of another size is refused.
        set_size: size of the sets; the schema's largest unless given.
        batch_size: training examples per step and process; the last, smaller batch of an epoch is left out.
        eval_batch_size: validation examples at a time; as `batch_size` unless given.
        num_workers: processes that read; 0 is right for files in memory, and what a set in a GPU's memory gets.
        in_memory: keep a file's images in memory; None does so under 2 GB. "device" keeps them in the memory of the
            device that trains, as uint8: a batch is picked there, and only the numbers of its images cross. On a CPU
            that is the same as True.
        seed: of the order of the training examples; None takes the seed of the run, from the command line.
        train_images, val_images: only so many, the first ones.

    Raises:
        InputError: on `setup`, whatever is wrong with the data.
    """

    schema = CLEVR

    def __init__(
        self,
        train: str | None,
        val: str,
        *,
        train_split: str = "train",
        val_split: str = "val",
        image_size: int = 128,
        set_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        in_memory: InMemory = None,
        seed: int | None = None,
        train_images: int | None = None,
        val_images: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "image_size": image_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"expected {name} of at least 1, got {size}")
        if num_workers < 0:
            raise InputError(f"expected num_workers of at least 0, got {num_workers}")
        train, val = (None if path is None else os.path.expanduser(path) for path in (train, val))
        self.train_path, self.val_path = train, val
        self.train_split, self.val_split = train_split, val_split
        self.image_size, self.set_size, self.in_memory = image_size, set_size, in_memory
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.train_images, self.val_images = train_images, val_images
        self.train_data: Dataset | None = None
        self.val_data: SetFile | ClevrImages | None = None

    def setup(self, stage: str | None = None) -> None:
        if stage in (None, "fit") and self.train_data is None:
            if self.train_path is None:
                raise InputError("this data has no training part; give `train` a file or a CLEVR folder")
            self.train_data = self._open(self.train_path, self.train_split, self.train_images)
            if len(self.train_data) < self.batch_size:
                raise InputError(
                    f"{self.train_path} has {len(self.train_data)} training images, fewer than one batch of "
                    f"{self.batch_size}; use a smaller batch size"
                )
        if self.val_data is None:
            self.val_data = self._open(self.val_path, self.val_split, self.val_images)

    def train_dataloader(self) -> DataLoader:
        assert self.train_data is not None, "setup('fit') comes first"
        order = EpochPermutation(len(self.train_data), seed=self.seed or 0)
        return training_loader(self.train_data, self.batch_size, order, self.trainer, **self._reading(self.train_data))

    def val_dataloader(self) -> DataLoader:
        assert self.val_data is not None, "setup comes first"
        return validation_loader(self.val_data, self.eval_batch_size, self.trainer, **self._reading(self.val_data))

    def teardown(self, stage: str | None = None) -> None:
        self._end_workers()

    def on_exception(self, exception: BaseException) -> None:
        self._end_workers()

    def _end_workers(self) -> None:
        """Of a training that is over: torch would end them with the program, too late for their temporary folders."""
        for loader in () if self.trainer is None else (self.trainer.train_dataloader, self.trainer.val_dataloaders):
            if (iterator := getattr(loader, "_iterator", None)) is not None:
                loader._iterator = None
                iterator._shutdown_workers()

    def statistics_batches(self, images: int) -> Iterator[dict[str, Any]]:
        """The first training examples, at most so many, in whole batches: the same ones whenever it is asked."""
        assert self.train_data is not None, "setup('fit') comes first"
        last = min(images, len(self.train_data)) - self.batch_size
        for first in range(0, max(last, 0) + 1, self.batch_size):
            yield self.train_data.__getitems__(range(first, first + self.batch_size))

    def _open(self, path: str, split: str, images: int | None) -> SetFile | ClevrImages:
        data = open_data(
            path,
            split=split,
            image_size=self.image_size,
            set_size=self.set_size,
            schema=self.schema,
            images=images,
            in_memory=False if self.in_memory == "device" else self.in_memory,
        )
        if self.in_memory == "device" and not isinstance(data, SetFile):
            raise InputError(
                f'in_memory "device" is for prepared files, and {path} is a folder; make a file of it with '
                "python -m setpred data prepare, or leave in_memory out"
            )
        return data

    def _reading(self, data: Dataset) -> dict[str, Any]:
        """What the loaders have in common."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if isinstance(data, SetFile):  # before the workers fork, so that they share the memory
            data.load(device if self.in_memory == "device" else None)
        there = isinstance(data, SetFile) and self.in_memory == "device" and device.type != "cpu"
        # a GPU's memory is not for the workers
        workers = 0 if there else fitting_workers(self.num_workers, data, max(self.batch_size, self.eval_batch_size))
        return {
            "num_workers": workers,
            "collate_fn": as_batch,
            "persistent_workers": workers > 0,
            "worker_init_fn": leave_signals_to_parent,
            "pin_memory": device.type == "cuda" and not there,
        }


@dataclass(frozen=True)
class RenderedFile:
    """A file of built-in scenes that is rendered when it is not there yet; see `setpred.data.scenes.render_file`.

    Args:
        folder: where it lies.
        workers: processes that render; all cores unless given.
    """

    folder: str
    images: int
    image_size: int
    objects: tuple[int, int]
    seed: int
    condition: str = "clevr"
    workers: int | None = None

    @property
    def path(self) -> str:
        least, most = self.objects
        scenes = f"{least}to{most}" if self.condition == "clevr" else f"{least}to{most}-{self.condition}"
        return str(
            Path(self.folder).expanduser() / f"rendered-{self.image_size}-{scenes}-seed{self.seed}-{self.images}.h5"
        )

    def header(self) -> Header:
        """What it holds.

        Raises:
            InputError: there is no such file.
        """
        return rendered_header(images=self.images, image_size=self.image_size, **self._which())

    def _which(self) -> dict[str, Any]:
        return {"objects": self.objects, "seed": self.seed, "condition": self.condition}

    def prepare(self) -> None:
        """Renders it if it is not there, and checks it.

        Raises:
            InputError: rendering failed (it has said why), or a file of that name is something else.
        """
        if not os.path.exists(self.path):
            self._render_once()
        data = SetFile(self.path, image_size=self.image_size, schema=CLEVR, in_memory=False)
        expected = self.header().source
        if data.source != expected or len(data) != self.images:
            raise InputError(
                f"{self.path} is not what its name says: expected {self.images} images of {expected}, "
                f"got {len(data)} of {data.source}; move it away and it will be rendered"
            )
        if not self._up_to_date(data):
            raise InputError(
                f"{self.path} was rendered by another version of the renderer, which draws other pictures; move it "
                "away and it will be rendered again, or train on it as it is with "
                "setpred.data.datamodule.SetDataModule"
            )

    def _up_to_date(self, data: SetFile) -> bool:
        now = render_records([0], image_size=self.image_size, **self._which())[0]
        stored = data[0]
        shades = np.abs(stored["image"].permute(1, 2, 0).numpy().astype(int) - now.image).mean()
        # other processors and versions of NumPy may round otherwise
        return shades < 1 and np.allclose(stored["elements"].numpy(), now.elements, atol=1e-4)

    def _render_once(self) -> None:
        """Renders it, or waits for another process that does: jobs that begin together share the file."""
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
        # As a command of its own: worker processes import the main program, which here would be torch and all.
        least, most = map(str, self.objects)
        command = [sys.executable, "-m", "setpred.data", "render", "--images", str(self.images)]
        command += ["--image-size", str(self.image_size), "--objects", least, most]
        command += ["--seed", str(self.seed), "--condition", self.condition, "--out", self.path]
        command += [] if self.workers is None else ["--workers", str(self.workers)]
        here = str(Path(setpred.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        if subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}).returncode != 0:
            raise InputError(f"rendering {self.path} failed, for the reason given above")


class RenderedScenes(SetDataModule):
    """Built-in scenes, no download: two files under `folder`, rendered when they are not there yet.

    Args:
        train_images, val_images: how many scenes.
        objects: least and most objects of a scene.
        scenes_seed: which scenes; the validation scenes have a seed of their own. `seed` is that of the order, so
            that runs of several seeds share the files.
        condition: which colours each shape may have: "clevr", "cogent-a" or "cogent-b".
        folder: where the files lie, for the next run too.
        workers: processes that render; all cores unless given.
    """

    def __init__(
        self,
        *,
        train_images: int = 12_000,
        val_images: int = 1_000,
        image_size: int = 64,
        objects: tuple[int, int] = (3, 10),
        scenes_seed: int = 0,
        condition: str = "clevr",
        folder: str = "data",
        workers: int | None = None,
        set_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        in_memory: InMemory = None,
        seed: int | None = None,
    ) -> None:
        seeds = (scenes_seed, scenes_seed + VALIDATION_SEED)
        self.files = tuple(
            RenderedFile(folder, images, image_size, tuple(objects), seed, condition, workers)
            for images, seed in zip((train_images, val_images), seeds, strict=True)
        )
        super().__init__(
            *(file.path for file in self.files),
            image_size=image_size,
            set_size=set_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            in_memory=in_memory,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Renders the files that are not there yet.

        Raises:
            InputError: see `RenderedFile.prepare`.
        """
        for file in self.files:
            file.prepare()
