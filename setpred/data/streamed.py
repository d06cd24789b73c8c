"""Training scenes without end: sampled by the loader's workers, rendered in batches on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from setpred.data.datamodule import VALIDATION_SEED, InMemory, RenderedFile, SetDataModule
from setpred.data.loading import EpochRange, training_loader
from setpred.errors import InputError
from setpred.rendering.renderer import render
from setpred.rendering.sampling import CONDITIONS, SceneRules, sample_scenes
from setpred.rendering.scenes import SceneBatch
from setpred.schema import CLEVR
from setpred.sets import presence_mask

# The scenes of files come from the seeds [seed, number]; NumPy fills up with zeros, so anything but 0 keeps apart.
STREAM = 1


class SceneStream(Dataset):
    """Scene after scene, each a function of the seed, the rules and its number.

    `stream.__getitems__(numbers)`, which a `DataLoader` calls, is a dict:

        scenes    `SceneBatch`, padded to `rules.objects[1]`
        elements  float32 [batch, set_size, D]      zero padded
        mask      bool    [batch, set_size]         True where an element is present
        index     int64   [batch]                   the scenes' numbers

    Args:
        length: scenes of an epoch; any number of at least 0 is a scene, though.
    """

    def __init__(self, length: int, *, seed: int, rules: SceneRules, set_size: int) -> None:
        self.length, self.seed, self.rules, self.set_size = length, seed, rules, set_size

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        scenes = sample_scenes(
            [np.random.default_rng([self.seed, number, STREAM]) for number in numbers], rules=self.rules
        )
        sets = [CLEVR.encode([obj.as_dict() for obj in scene.objects], self.set_size) for scene in scenes]
        elements = torch.from_numpy(np.stack(sets))
        return {
            "scenes": SceneBatch.of(scenes, max_objects=self.rules.objects[1]),
            "elements": elements,
            "mask": presence_mask(elements),
            "index": torch.tensor(numbers),
        }


class StreamedScenes(SetDataModule):
    """Built-in scenes of which none is trained on twice; validation scenes in a file, as those of `RenderedScenes`.

    A training scene is a function of the seed and its number. Step t of epoch e has the numbers

        e * scenes_per_epoch + t * P * batch_size, ...   P * batch_size of them, dealt in turn to P processes,

    so the seed decides what a step sees, whatever the number of workers, and a resumed run goes on with the scenes that
    come next, also from a checkpoint within an epoch. The loader's batches hold a `SceneBatch`, which becomes images
    on the device that trains.

    Args:
        scenes_per_epoch: training scenes between two validations; what does not fill a last batch is left out.
        val_images: how many scenes to validate on.
        image_size: side of the images.
        objects: least and most objects of a scene.
        condition: which colours each shape may have: "clevr", "cogent-a" or "cogent-b".
        scenes_seed: which validation scenes, as for `RenderedScenes`; they are none of the training scenes.
        folder: where the file of the validation scenes lies, for the next run too.
        workers: processes that render it; all cores unless given.
        set_size: size of the sets; the schema's largest unless given.
        batch_size: training scenes per step and process.
        eval_batch_size: validation scenes at a time; as `batch_size` unless given.
        num_workers: processes that sample scenes; 0 samples between the steps.
        in_memory: keep the validation images in memory; None does so under 2 GB, "device" on the device that trains.
        seed: which training scenes; None takes the seed of the run, from the command line.

    Raises:
        InputError: an argument that makes no sense; on `prepare_data` and `setup`, what is wrong with the file; on
            resuming, another `scenes_per_epoch`.
    """

    def __init__(
        self,
        *,
        scenes_per_epoch: int = 70_000,
        val_images: int = 1_000,
        image_size: int = 128,
        objects: tuple[int, int] = (3, 10),
        condition: str = "clevr",
        scenes_seed: int = 0,
        folder: str = "data",
        workers: int | None = None,
        set_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        in_memory: InMemory = None,
        seed: int | None = None,
    ) -> None:
        for name, least, value in (
            ("batch_size", 1, batch_size),
            ("num_workers", 0, num_workers),
            ("scenes_seed", 0, scenes_seed),
            ("seed", 0, seed),
        ):
            if value is not None and value < least:
                raise InputError(f"expected {name} of at least {least}, got {value}")
        if scenes_per_epoch < batch_size:
            raise InputError(
                f"scenes_per_epoch {scenes_per_epoch} is less than one batch of {batch_size}; use more scenes or a "
                "smaller batch_size"
            )
        if set_size is not None and set_size < objects[1]:
            raise InputError(
                f"a set_size of {set_size} does not hold scenes of up to {objects[1]} objects; use a larger one"
            )
        val_seed = scenes_seed + VALIDATION_SEED
        self.file = RenderedFile(folder, val_images, image_size, tuple(objects), val_seed, condition, workers)
        self.file.header()  # checks the arguments, which are the stream's too
        self.rules = SceneRules(objects=self.file.objects, palettes=CONDITIONS[condition])
        self.scenes_per_epoch = scenes_per_epoch
        super().__init__(
            None,
            self.file.path,
            image_size=image_size,
            set_size=set_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            in_memory=in_memory,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Renders the validation scenes if they are not there yet.

        Raises:
            InputError: see `RenderedFile.prepare`.
        """
        self.file.prepare()

    def setup(self, stage: str | None = None) -> None:
        set_size = self.schema.max_objects if self.set_size is None else self.set_size
        self.train_data = SceneStream(self.scenes_per_epoch, seed=self.seed or 0, rules=self.rules, set_size=set_size)
        super().setup(stage)

    def train_dataloader(self) -> DataLoader:
        assert self.train_data is not None, "setup comes first"
        order = EpochRange(self.scenes_per_epoch)
        return training_loader(self.train_data, self.batch_size, order, self.trainer, **self._reading(self.train_data))

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Draws the images of training scenes on the device that the batch is on: what a file would have given."""
        if "scenes" not in batch:
            return batch
        images = render(batch["scenes"], width=self.image_size, height=self.image_size)
        rest = {name: value for name, value in batch.items() if name != "scenes"}
        return {"image": images.permute(0, 3, 1, 2), **rest}

    def state_dict(self) -> dict[str, int]:
        return {"scenes_per_epoch": self.scenes_per_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if (before := state_dict["scenes_per_epoch"]) != self.scenes_per_epoch:
            raise InputError(
                f"scenes_per_epoch was {before} before and is {self.scenes_per_epoch} now, so that scenes would come "
                f"again or be left out; resume with --data.init_args.scenes_per_epoch {before}"
            )
