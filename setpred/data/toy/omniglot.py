"""Omniglot's characters, from files a user has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from setpred.data.images import BROKEN, open_image
from setpred.data.toy.base import World
from setpred.data.toy.digits import check_sizes, sets_to_count
from setpred.errors import InputError

FOLDERS = {"train": "images_background", "val": "images_evaluation"}


class OmniglotCounting(World):
    """Sets of handwritten characters; the target is how many different ones are among them.

    The class counting of equilibrium aggregation (Bartunov, Fuchs, Lillicrap, UAI 2022), on the data of Lake,
    Salakhutdinov and Tenenbaum (2015). Training sets are made of the 964 characters of `images_background`, validation
    sets of the 659 of `images_evaluation`: of other alphabets, so a model has to tell characters apart that it has
    never seen. An element is an image of `image_size²` numbers, 1 where there is ink.

    Args:
        folder: where images_background.zip and images_evaluation.zip of github.com/brendenlake/omniglot are unpacked:
            it holds the folders of these names, and they hold ALPHABET/CHARACTER/*.png.
        image_size: to which the images of 105x105 are reduced by averaging.
        sizes: least and most images of a set; sets are padded to the most.
        arguments: those of `World`.

    Raises:
        InputError: on `setup`, folders or images that are missing or damaged.
    """

    def __init__(
        self, *, folder: str, image_size: int = 28, sizes: tuple[int, int] = (3, 10), **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.folder, self.image_size, self.sizes = Path(folder), image_size, check_sizes(sizes)

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        images, classes = read_characters(self.folder / FOLDERS[split], self.image_size)
        return sets_to_count(images.reshape(len(images), -1), classes, count, sizes=self.sizes, rng=rng)


def read_characters(folder: Path, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 `[count, image_size, image_size]`, ink 1, and their characters int64 `[count]`, in path order."""
    paths = sorted(folder.glob("*/*/*.png"))
    if not paths:
        raise InputError(
            f"expected Omniglot's images at {folder}/ALPHABET/CHARACTER/*.png, found none; unpack {folder.name}.zip "
            "of github.com/brendenlake/omniglot there"
        )
    _, classes = np.unique([str(path.parent) for path in paths], return_inverse=True)
    return np.stack([_ink(path, image_size) for path in paths]), classes.astype(np.int64)


def _ink(path: Path, image_size: int) -> np.ndarray:
    try:
        with open_image(path) as image:
            grey = image.convert("L").resize((image_size, image_size), Image.Resampling.BOX)
    except BROKEN as error:
        raise InputError(f"{path} is not an image that can be read ({error}); unpack it again") from error
    return 1 - np.asarray(grey, dtype=np.float32) / 255
