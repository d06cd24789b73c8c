"""Training scenes without end: sampled by the loader's workers, rendered in batches on the training device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from setpred.data.datamodule import BuiltInScenes
from setpred.data.loading import EpochOrder, EpochRange
from setpred.errors import InputError
from setpred.rendering.renderer import render
from setpred.rendering.sampling import CONDITIONS, SceneRules, sample_scenes
from setpred.rendering.scenes import SceneBatch
from setpred.schema import CLEVR
from setpred.sets import presence_mask

# The scenes of files come from the seeds [seed, number], which NumPy pads with zeros; any number but 0 keeps apart.
STREAM = 1


class SceneStream(Dataset):
    """Scene after scene, each a function of the seed, the rules and its number.

    `stream.__getitems__(numbers)`, which a `DataLoader` calls, is a dict:

        scenes    `SceneBatch`, padded to `rules.objects[1]`
        elements  float32 [batch, set_size, D]      zero padded
        mask      bool    [batch, set_size]         True where an element is present
        index     int64   [batch]                   numbers of the scenes

    Args:
        length: scenes of an epoch; a scene may have any number of at least 0.
    """

    def __init__(self, length: int, *, seed: int, rules: SceneRules, set_size: int) -> None:
        self.length, self.seed, self.rules, self.set_size = length, seed, rules, set_size

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        scenes = sample_scenes([np.random.default_rng([self.seed, number, STREAM]) for number in numbers], self.rules)
        sets = [CLEVR.encode([obj.as_dict() for obj in scene.objects], self.set_size) for scene in scenes]
        elements = torch.from_numpy(np.stack(sets))
        return {
            "scenes": SceneBatch.of(scenes, max_objects=self.rules.objects[1]),
            "elements": elements,
            "mask": presence_mask(elements),
            "index": torch.tensor(numbers),
        }


class StreamedScenes(BuiltInScenes):
    """Built-in scenes of which none is trained on twice; validation scenes in a file, as those of `RenderedScenes`.

    A training scene is a function of the seed and its number. With P processes step t of epoch e has the numbers

        e * scenes_per_epoch + t * P * batch_size, ...   P * batch_size of them, dealt in turn to the processes,

    whatever the number of workers, and a resumed run continues with the next scenes, also within an epoch. The batches
    hold a `SceneBatch`, which becomes images on the device that trains.

    Args:
        scenes_per_epoch: training scenes between two validations; those that do not fill a last batch are left out.
        arguments: those of `BuiltInScenes`; `num_workers` sample scenes, `seed` decides the training scenes.

    Raises:
        InputError: as `BuiltInScenes`; on resuming, another `scenes_per_epoch`.
    """

    def __init__(self, *, scenes_per_epoch: int = 70_000, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.which["views"] is not None:
            raise InputError("expected no views of streamed scenes; train on setpred.data.datamodule.RenderedScenes")
        self.scenes_per_epoch = scenes_per_epoch
        self.rules = SceneRules(objects=self.which["objects"], palettes=CONDITIONS[self.which["condition"]])

    def open_split(self, split: str) -> Dataset:
        if split == "val":
            return super().open_split(split)
        set_size = self.schema.max_objects if self.set_size is None else self.set_size
        return SceneStream(self.scenes_per_epoch, seed=self.seed or 0, rules=self.rules, set_size=set_size)

    def order(self) -> EpochOrder:
        return EpochRange(self.scenes_per_epoch)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Render the images of training scenes on the device that the batch is on: what a file would have given."""
        if "scenes" in batch:
            images = render(batch["scenes"], width=self.image_size, height=self.image_size)
            rest = {name: value for name, value in batch.items() if name != "scenes"}
            batch = {"image": images.permute(0, 3, 1, 2), **rest}
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, int]:
        return {"scenes_per_epoch": self.scenes_per_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if (before := state_dict["scenes_per_epoch"]) != self.scenes_per_epoch:
            raise InputError(
                f"scenes_per_epoch was {before} before and is {self.scenes_per_epoch} now, so that scenes would repeat "
                f"or be left out; resume with --data.init_args.scenes_per_epoch {before}"
            )
