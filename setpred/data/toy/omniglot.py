"""Counting of Omniglot's characters, from files that the user has."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from setpred.data.images import read_image
from setpred.data.toy.digits import Counting
from setpred.errors import InputError

FOLDERS = {"train": "images_background", "val": "images_evaluation"}


class OmniglotCounting(Counting):
    """Sets of handwritten characters whose classes are counted; see `Counting`.

    On the data of Lake, Salakhutdinov and Tenenbaum (2015). Training sets have the 964 characters of
    `images_background`, validation sets the 659 of `images_evaluation`, of other alphabets: a model has to tell unseen
    characters apart. An element is an image of `image_size²` numbers, 1 for ink.

    Args:
        folder: folder with images_background.zip and images_evaluation.zip of github.com/brendenlake/omniglot,
            unpacked: FOLDER/ALPHABET/CHARACTER/*.png for both.
        image_size: side to which the images of 105x105 are reduced by averaging.
        arguments: those of `Counting`.

    Raises:
        InputError: on `setup`, folders or images that are missing or damaged.
    """

    def __init__(self, *, folder: str, image_size: int = 28, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.folder, self.image_size = Path(folder), image_size

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.count(*read_characters(self.folder / FOLDERS[split], self.image_size), count, rng)


def read_characters(folder: Path, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 `[count, image_size, image_size]`, ink 1, and their characters int64 `[count]`, in path order."""
    paths = sorted(folder.glob("*/*/*.png"))
    if not paths:
        raise InputError(
            f"expected Omniglot's images at {folder}/ALPHABET/CHARACTER/*.png, found none; unpack {folder.name}.zip "
            "of github.com/brendenlake/omniglot there"
        )
    _, classes = np.unique([str(path.parent) for path in paths], return_inverse=True)
    size = (image_size, image_size)
    grey = [
        read_image(path, advice="unpack it again").convert("L").resize(size, Image.Resampling.BOX) for path in paths
    ]
    return 1 - np.stack([np.asarray(image, dtype=np.float32) for image in grey]) / 255, classes.astype(np.int64)
