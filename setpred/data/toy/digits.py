"""Toy tasks on scikit-learn's handwritten digits: count classes, classify turned digits, auto-encode sets of points."""

from typing import Any, NamedTuple

import numpy as np

from setpred.data.toy.base import World
from setpred.errors import InputError

SIDE, CLASSES = 8, 10
TRAINING = 1297  # images, the first ones; the other 500 are for validation


class Digits(NamedTuple):
    """Images float32 `[count, 8, 8]` in [0, 1], strokes bright, and their classes 0 to 9, int64 `[count]`."""

    images: np.ndarray
    classes: np.ndarray


def bundled_digits(split: str) -> Digits:
    """Load the 1,297 training or the 500 validation images that come with scikit-learn.

    Source: test part of the UCI data set Optical Recognition of Handwritten Digits (Alpaydin, Kaynak, 1998).

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed; install it: pip install 'setpred[digits]'"
        ) from error
    bundle = load_digits()
    part = slice(TRAINING) if split == "train" else slice(TRAINING, None)
    return Digits((bundle.images[part] / 16).astype(np.float32), bundle.target[part].astype(np.int64))


def in_turn(available: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices under `available`, shuffled, each as often as any other, give or take one."""
    rounds = [rng.permutation(available) for _ in range(-(-count // available))]
    return np.concatenate(rounds)[:count]


def pixel_points(images: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels over a threshold as points, in reading order, then zeros.

    Positions (x to the right, y up) run from -1 to 1, from the centre of the first pixel to that of the last.

    Args:
        images: `[count, 8, 8]`.

    Returns:
        Positions float32 `[count, most, 2]`, intensities float32 `[count, most]` and mask bool `[count, most]`, for
        the most points that an image has.

    Raises:
        InputError: the threshold is not in [0, 1), the range of intensities.
    """
    if not 0 <= threshold < 1:
        raise InputError(f"expected a threshold from 0 to under 1, of intensities from 0 to 1, got {threshold}")
    flat = images.reshape(len(images), -1)
    bright = flat > threshold
    order = np.argsort(~bright, axis=1, kind="stable")[:, : bright.sum(1).max()]
    mask = np.take_along_axis(bright, order, axis=1)
    rows, columns = np.divmod(order, SIDE)
    positions = np.stack([columns, SIDE - 1 - rows], axis=-1) * (2 / (SIDE - 1)) - 1
    intensities = np.take_along_axis(flat, order, axis=1)
    return (positions * mask[:, :, None]).astype(np.float32), intensities * mask, mask


def turns(angles: np.ndarray) -> np.ndarray:
    """Rotations `[count, 2, 2]` of positions in rows, by angles in radians."""
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.stack([cosine, sine, -sine, cosine], axis=-1).reshape(-1, 2, 2)


class Counting(World):
    """Sets of images; the target is how many different classes are among them, a set of one element.

    The class counting of equilibrium aggregation (Bartunov, Fuchs, Lillicrap, UAI 2022).

    Args:
        sizes: least and most images of a set; sets are padded to the most.
        arguments: those of `World`.
    """

    def __init__(self, *, sizes: tuple[int, int] = (3, 10), **arguments: Any) -> None:
        super().__init__(**arguments)
        if not 1 <= sizes[0] <= sizes[1]:
            raise InputError(f"expected the least and the most images of a set, at least 1, got {list(sizes)}")
        self.sizes = tuple(sizes)

    def count(
        self, images: np.ndarray, classes: np.ndarray, count: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`count` sets of `images [n, ...]` of `classes` int64 `[n]`, from 0, each with at least one image.

        First the size of a set is drawn, then its number of classes, from 1 to what its size allows, all equally
        likely: the size says less than if classes were drawn image by image. Images repeat in other sets, and may
        within one.
        """
        images = images.reshape(len(images), -1)
        by_class, available = np.argsort(classes, kind="stable"), np.bincount(classes)
        start = np.cumsum(available) - available
        least, most = self.sizes
        elements = np.zeros((count, most, images.shape[1]), dtype=np.float32)
        sizes, target = np.zeros(count, dtype=np.int64), np.zeros((count, 1, 1), dtype=np.float32)
        for i in range(count):
            size = rng.integers(least, most + 1)
            different = rng.integers(1, min(size, len(available)) + 1)
            chosen = rng.choice(len(available), different, replace=False)
            # each of the chosen ones once, the others at random
            members = rng.permutation(np.concatenate([chosen, rng.choice(chosen, size - different)]))
            elements[i, :size] = images[by_class[start[members] + rng.integers(available[members])]]
            sizes[i], target[i] = size, different
        return {"input": elements, "input_mask": np.arange(most) < sizes[:, None], "elements": target}


class DigitCounting(Counting):
    """Sets of digits, each an image of 64 numbers, whose classes are counted; see `Counting`.

    Training and validation sets have images of their part only.
    """

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.count(*bundled_digits(split), count, rng)


class RotatedDigits(World):
    """Digits as sets of points [x, y, intensity], turned about the centre by any angle; the target is the class.

    Trained on upright and tested on turned digits, a model has to be invariant by construction. As rotated MNIST for
    group invariant pooling (Bujel, Gideoni, Joshi, Liò, 2023), whose training images are turned, too. Angles are
    uniform, one for each example. The target is one-hot, a set of one element. More training sets than the 1,297 images
    show these again, at other angles if they are turned.

    Args:
        train_rotated, val_rotated: whether the digits of that part are turned.
        stretch: at least 1; over 1, turned digits are first made up to so many times longer along a random line, and as
            much narrower across it, or the reverse: with the turn, any linear map of determinant 1 up to that size.
        threshold: intensity over which a pixel is a point, from 0 to 1.
        arguments: those of `World`.
    """

    def __init__(
        self,
        *,
        train_rotated: bool = False,
        val_rotated: bool = True,
        stretch: float = 1.0,
        threshold: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if not 1 <= stretch < np.inf:
            raise InputError(f"expected a stretch of at least 1, got {stretch}; give the largest ratio of lengths")
        self.rotated = {"train": train_rotated, "val": val_rotated}
        self.stretch, self.threshold = stretch, threshold

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        images, classes = bundled_digits(split)
        positions, intensities, mask = pixel_points(images, self.threshold)
        which = in_turn(len(images), count, rng)
        maps = turns(rng.uniform(0, 2 * np.pi, count) * self.rotated[split])
        if self.stretch > 1 and self.rotated[split]:
            line = turns(rng.uniform(0, np.pi, count))
            ratio = self.stretch ** rng.uniform(-1, 1, (count, 1))
            longer = np.concatenate([ratio, 1 / ratio], axis=1)[:, :, None] * np.eye(2)
            maps = line.mT @ longer @ line @ maps
        turned = (positions[which] @ maps).astype(np.float32)
        elements = np.concatenate([turned, intensities[which][:, :, None]], axis=-1)
        target = np.eye(CLASSES, dtype=np.float32)[classes[which]][:, None]
        return {"input": elements, "input_mask": mask[which], "elements": target}


class DigitPoints(World):
    """Digits as sets of points [x, y, presence] to auto-encode: the target is the input.

    DSPN's sets of MNIST pixels (Zhang, Hare, Prügel-Bennett, NeurIPS 2019), at 8x8. Presence is 1, padding is zeros.
    More training sets than the 1,297 training images show these again.

    Args:
        set_size: places of a set; 27 are enough for every digit at the threshold of 0.5.
        threshold: intensity over which a pixel is a point, from 0 to 1.
        masked: whether the encoder leaves padding out; False lets it read padding as elements, as DSPN does.
        arguments: those of `World`.
    """

    def __init__(self, *, set_size: int = 27, threshold: float = 0.5, masked: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.set_size, self.threshold, self.masked = set_size, threshold, masked

    def examples(self, split: str, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        images, _ = bundled_digits(split)
        positions, _, mask = pixel_points(images, self.threshold)
        if mask.shape[1] > self.set_size:
            raise InputError(
                f"a digit has {mask.shape[1]} pixels over {self.threshold}, more than the {self.set_size} of a set; "
                "give a larger set_size or threshold"
            )
        which = in_turn(len(images), count, rng)
        elements = np.zeros((count, self.set_size, 3), dtype=np.float32)
        elements[:, : mask.shape[1]] = np.concatenate([positions, mask[:, :, None]], axis=-1)[which]
        mask = {"input_mask": elements[:, :, 2] > 0.5} if self.masked else {}
        return {"input": elements, **mask, "elements": elements.copy()}
