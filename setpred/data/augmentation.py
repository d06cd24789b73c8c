"""Augmentation of training images, which moves the objects with their image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pictures

from setpred.errors import InputError
from setpred.schema import ElementSchema, Field
from setpred.sets import presence_mask, present_first

STREAM = 2  # apart from the other random numbers of a seed
LENGTHS = ("extent", "radius", "diameter")  # fields that are lengths on the image, whoever made the schema
COLOURS = ("color", "colour")  # fields that a change of colours would make wrong


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random flips, turns, crops, colours and noise of training images; positions, sizes and angles follow.

    The numbers of an example depend on (seed, epoch, number of the example) alone: a resumed run sees the same images,
    whatever the batch size and the number of processes. Validations and batch statistics see the images as they are.

    With positions c in [-1, 1]², the image is cropped to a square of w times its side around m, flipped and turned:

        c' = A c + b,    A = turn · flip / w,    b = -A m

    Extents become |A| extent, lengths grow by 1 / w, and a direction u becomes A u. Objects whose position leaves the
    crop are dropped; boxes that a crop cuts end at its edge.

    Args:
        flip: mirrors half of the images, left to right.
        turns: turns by 0, 90, 180 or 270 degrees, each as likely; with `flip` all eight symmetries of a square.
        zoom: least and largest magnification 1 / w. Above 1 crops at a random place; below 1 shrinks the image and
            pads it with black.
        colour: brightness, contrast and saturation are multiplied by factors in [1 - colour, 1 + colour].
        hue: the hue turns by up to this share of the circle, at most 0.5.
        noise: largest standard deviation of Gaussian noise, as a share of white; that of an image is uniform below it.
        lengths: fields that are lengths on the image, besides `extent`, `radius` and `diameter`.
        angles: fields that are angles from the x axis towards the y axis (clockwise), with their period: 360, or 180
            for directions without a sense; of radians 6.2832 or 3.1416.
        unchanged: fields of numbers that do not change with the image.
        insist: allows `colour` and `hue` for a schema with a field `color`.
    """

    flip: bool = False
    turns: bool = False
    zoom: tuple[float, float] = (1.0, 1.0)
    colour: float = 0.0
    hue: float = 0.0
    noise: float = 0.0
    lengths: tuple[str, ...] = ()
    angles: dict[str, float] | None = None
    unchanged: tuple[str, ...] = ()
    insist: bool = False

    def __post_init__(self) -> None:
        least, most = self.zoom
        shares = (0 <= self.colour < 1, 0 <= self.hue <= 0.5, 0 <= self.noise < math.inf)
        if not (
            0 < least <= most < math.inf and all(shares) and all(0 < each < math.inf for each in self.periods.values())
        ):
            raise InputError(
                "augment: expected 0 < zoom[0] <= zoom[1], colour in [0, 1), hue in [0, 0.5], noise >= 0 and periods "
                f"of angles > 0, got {self}"
            )

    @property
    def periods(self) -> dict[str, float]:
        """The periods of fields that are angles, by name."""
        return self.angles or {}

    @property
    def zooms(self) -> bool:
        """Whether it changes sizes."""
        return tuple(self.zoom) != (1.0, 1.0)

    def check(self, schema: ElementSchema) -> None:
        """Raise `InputError` if objects of the schema cannot follow their image."""
        numbers = [each.name for each in schema.continuous]
        if lacking := [name for name in (*self.lengths, *self.periods, *self.unchanged) if name not in numbers]:
            raise InputError(
                f"augment: expected fields of numbers of the schema {schema.name!r}, {', '.join(numbers) or 'none'}, "
                f"got {', '.join(lacking)}"
            )
        if wide := [name for name in self.periods if schema.field(name).numbers != 1]:
            raise InputError(
                f"augment: expected angles of one number, got {wide[0]} of {schema.field(wide[0]).numbers}"
            )
        if (self.colour or self.hue) and not self.insist and (named := {f.name for f in schema.fields} & {*COLOURS}):
            raise InputError(
                f"augment: the schema {schema.name!r} has a field {min(named)!r}, which other colours make wrong; "
                "leave out colour and hue, or add insist: true"
            )
        if not (self.flip or self.turns or self.zooms):
            return
        if schema.side is None and (numbers or self.zooms):
            raise InputError(
                f"augment: flip, turns and zoom need positions in pixels of the image; those of the schema "
                f"{schema.name!r} are in other units and would no longer belong to the image; use colour and noise only"
            )
        known = {*LENGTHS, *self.lengths, *self.periods, *self.unchanged}
        fields = [each for each in schema.continuous if not is_place(each, schema)]
        unknown = [f.name for f in fields if f.name not in ({*self.unchanged} if f.optional else known)]
        if unknown:
            raise InputError(
                f"augment: expected to know how {', '.join(unknown)} changes with the image; name it in lengths, "
                f"angles or unchanged, such as --data.init_args.augment.unchanged=[{unknown[0]}]"
            )

    def apply(self, batch: Mapping[str, Any], schema: ElementSchema, *, seed: int, epoch: int) -> dict[str, Any]:
        """Augment a batch of uint8 images `[batch, 3, S, S]`, with `elements`, `mask` and `index`."""
        images = batch["image"]
        draws = [self._draw([seed, epoch, number, STREAM], images.shape[-1]) for number in batch["index"].tolist()]
        changed = torch.stack([draw.image(image) for draw, image in zip(draws, images, strict=True)])
        maps = torch.from_numpy(np.stack([draw.map for draw in draws])).to(images.device, torch.float32)
        cropped = torch.tensor([draw.crop < images.shape[-1] for draw in draws], device=images.device)
        elements, mask = self.moved(batch["elements"], schema, maps, cropped)
        changed = changed.contiguous(memory_format=torch.channels_last)
        return {**batch, "image": changed, "elements": elements, "mask": mask}

    def moved(self, elements: Tensor, schema: ElementSchema, maps: Tensor, cropped: Tensor) -> tuple[Tensor, Tensor]:
        """The objects after the maps of their images, those that remain first, and the mask of them.

        Args:
            elements: `[batch, set_size, set_dim]`.
            maps: [A, b] `[batch, 2, 3]`.
            cropped: bool `[batch]`, whether a part of the image is lost.
        """
        found, present = elements.clone(), presence_mask(elements)
        turn, shift = maps[:, :, :2], maps[:, None, :, 2]
        grown = torch.linalg.det(turn).abs().sqrt().view(-1, 1, 1)
        for each in schema.continuous:
            numbers = elements[..., (place := schema.slice(each.name))]
            if is_place(each, schema):
                at = numbers[..., : each.numbers]
                points = at.unflatten(-1, (-1, 2)).flatten(1, 2) @ turn.mT + shift
                points = points.reshape(at.shape)
                if each.optional:  # absent ones stay zeros; those that leave a crop become absent
                    left = (points.abs() > 1).any(-1, keepdim=True) & cropped.view(-1, 1, 1)
                    points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
                    points = points.masked_fill(left | (numbers[..., -1:] <= 0.5), 0.0)
                found[..., place] = points
                continue
            values = each.read(numbers)
            if each.name == "extent":
                values = values @ turn.abs().mT
            elif each.name in self.periods:
                values = _turned(values, turn, self.periods[each.name], each.offset)
            elif each.name in (*LENGTHS, *self.lengths):
                values = values * grown
            else:
                continue
            if each.period:
                angle = values * (2 * math.pi / each.period)
                found[..., place] = torch.cat([angle.cos(), angle.sin()], dim=-1)
            else:
                found[..., place] = (values - each.offset) / each.scale
        if self.zooms:
            centre = found[..., schema.slice("coords")]
            present = present & ((centre.abs() <= 1).all(-1) | ~cropped.unsqueeze(-1))
            if any(each.name == "extent" for each in schema.continuous) and not self.periods:
                _cut(found, schema, cropped.view(-1, 1, 1))
        return present_first(found, present)

    def _draw(self, seed: Sequence[int], size: int) -> "_Draw":
        rng = np.random.default_rng(seed)
        flipped, quarters = self.flip and rng.random() < 0.5, int(rng.integers(4)) if self.turns else 0
        crop, corner = size, (0, 0)
        if self.zooms:
            zoom = math.exp(rng.uniform(*map(math.log, self.zoom)))
            crop = max(1, round(size / zoom))
            low, high = sorted((0, size - crop))
            corner = tuple(rng.integers(low, high + 1, 2).tolist())
        factors = 1 + self.colour * rng.uniform(-1, 1, 3)
        return _Draw(
            flipped=flipped,
            quarters=quarters,
            size=size,
            crop=crop,
            corner=corner,
            factors=tuple(factors.tolist()) if self.colour else None,
            hue=self.hue * rng.uniform(-1, 1) if self.hue else 0.0,
            noise=self.noise * rng.uniform() if self.noise else 0.0,
            rng=rng,
        )


@dataclass(frozen=True)
class _Draw:
    """The numbers of one example: crop from `corner` (left, top) of `crop` pixels, flip, quarter turns, colours."""

    flipped: bool
    quarters: int
    size: int
    crop: int
    corner: tuple[int, ...]
    factors: tuple[float, ...] | None
    hue: float
    noise: float
    rng: np.random.Generator

    @property
    def map(self) -> np.ndarray:
        """[A, b] of positions in [-1, 1]², float64 `[2, 3]`."""
        turn = np.linalg.matrix_power(np.array([[0.0, 1.0], [-1.0, 0.0]]), self.quarters)
        turn = turn @ np.diag([-1.0 if self.flipped else 1.0, 1.0]) * (self.size / self.crop)
        middle = (2 * np.array(self.corner) + self.crop) / self.size - 1
        return np.column_stack([turn, -turn @ middle])

    def image(self, image: Tensor) -> Tensor:
        """The image `[3, S, S]` after it."""
        if (self.crop, *self.corner) != (self.size, 0, 0):
            left, top = self.corner
            image = pictures.resized_crop(image, top, left, self.crop, self.crop, [self.size] * 2, antialias=True)
        if self.flipped:
            image = pictures.horizontal_flip(image)
        image = torch.rot90(image, self.quarters, (-2, -1))
        if self.factors is not None:
            changes = (pictures.adjust_brightness, pictures.adjust_contrast, pictures.adjust_saturation)
            for change, factor in zip(changes, self.factors, strict=True):
                image = change(image, factor)
        if self.hue:
            image = pictures.adjust_hue(image, self.hue)
        if self.noise:
            noise = self.rng.standard_normal(tuple(image.shape), dtype=np.float32) * (255 * self.noise)
            image = (image + torch.from_numpy(noise).to(image.device)).round_().clamp_(0, 255).to(torch.uint8)
        return image


def is_place(each: Field, schema: ElementSchema) -> bool:
    """Whether a field holds places x, y on the image: `coords`, and others in its units, such as keypoints."""
    half = (schema.side or math.nan) / 2
    return not (each.categorical or each.period) and each.numbers % 2 == 0 and each.scale == each.offset == half


def _turned(angles: Tensor, turn: Tensor, period: float, middle: float) -> Tensor:
    """Angles `[batch, n, 1]` after a turn, in the period around `middle`."""
    unit = math.pi / 180 if period > 7 else 1.0  # degrees, or radians
    ahead = torch.cat([(angles * unit).cos(), (angles * unit).sin()], dim=-1) @ turn.mT
    turned = torch.atan2(ahead[..., 1:], ahead[..., :1]) / unit
    return turned - period * torch.round((turned - middle) / period)


def _cut(found: Tensor, schema: ElementSchema, cropped: Tensor) -> None:
    """End boxes at the edges of the cropped images, in place."""
    centre, size = schema.slice("coords"), schema.slice("extent")
    extent = schema.field("extent")
    half = (found[..., size] * extent.scale + extent.offset) / schema.side
    low, high = (found[..., centre] - half).clamp(min=-1), (found[..., centre] + half).clamp(max=1)
    wide = ((high - low) / 2 * schema.side - extent.offset) / extent.scale
    found[..., centre] = torch.where(cropped, (low + high) / 2, found[..., centre])
    found[..., size] = torch.where(cropped, wide, found[..., size])
