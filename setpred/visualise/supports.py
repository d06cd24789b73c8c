"""The votes of an image's tokens: the object each token supports, and the way of the objects to their votes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from torch import Tensor

from setpred.visualise.comparison import Comparison, compare
from setpred.visualise.glyphs import draw_outlined
from setpred.visualise.panels import REACH, badge, caption, show_image, show_map
from setpred.visualise.refinement import Descent
from setpred.visualise.style import INK, heading, new_figure, save_png, styled
from setpred.visualise.world import VIEW, on_map

IMAGE, MAP, SIDE = (3.24, 2.16), 4.4, 1.75  # inches
HEAD, ROW, LEGEND = 0.95, 4.95, 0.85
OPACITY = 0.75  # of the heaviest token on the image
LARGEST = 60.0  # area in square points of the dot of the heaviest token's vote
_TINY = 1e-9
# one for each predicted object, told from each other with most colour vision; then from the start again
_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442", "#882255", "#999933", "#332288", "#44aa99",
)  # fmt: skip
_NO_OBJECT = "#ffffff"


class Voting(NamedTuple):
    """The votes of the tokens of m images, and what became of them; tokens row by row on a square grid.

    votes: `[m, tokens, set_dim]`, the elements voted for; supports: `[m, set_size, tokens]`, the mass with which each
    token supports each element of the prediction, summing to the token's mass; energies: `[steps + 1, m]`, of the
    iterates.
    """

    votes: Tensor
    supports: Tensor
    energies: Tensor


@styled()
def draw_supports(path: Path, descents: Sequence[Descent], voting: Voting, *, about: str) -> Path:
    """For each example a row: the image without and with its tokens' supports, the votes from above, the energy.

    Args:
        path: of the PNG.
        descents: the examples; their last iterate is the prediction.
        voting: of these examples, in their order.
        about: see `heading`.
    """
    width = 0.3 + IMAGE[0] + 0.15 + MAP + 0.6 + SIDE + 0.2
    height = HEAD + ROW * len(descents) + LEGEND
    figure = new_figure(width, height)
    heading(
        figure,
        "Which tokens support which object",
        "Each token, a position of the image, votes for an object. Colour and number: the prediction it supports.",
        about,
    )
    for row, descent in enumerate(descents):
        bottom = height - HEAD - ROW * (row + 1) + 0.1

        def panel(left: float, above: float, size: tuple[float, float], bottom: float = bottom) -> Axes:
            return figure.add_axes((left / width, (bottom + above) / height, size[0] / width, size[1] / height))

        comparison = compare(descent.iterates[-1], descent.target, descent.schema)
        order = descent.iterates[-1][:, -1].argsort(descending=True, stable=True)  # as `compare` numbers them
        supports = voting.supports[row, order].nan_to_num()
        colours = [*itertools.islice(itertools.cycle(_COLOURS), len(comparison.predicted))]
        colours += [_NO_OBJECT] * (len(order) - len(colours))
        tokens = support_colours(supports, colours)
        text = f"Image {row}: {comparison.summary}"
        figure.text(0.3 / width, (bottom + MAP + 0.17) / height, text, fontsize=11, va="center")
        show_image(panel(0.3, MAP - IMAGE[1], IMAGE), descent.picture)
        _show_supports(panel(0.3, 0, IMAGE), descent.picture, supports, tokens, comparison)
        axes = panel(0.3 + IMAGE[0] + 0.15, 0, (MAP, MAP))
        show_map(axes, descent.camera)
        _show_votes(axes, descent, on_map(descent.schema.values(voting.votes[row], "coords"), descent.camera), tokens)
        _show_ways(axes, descent, order, colours, comparison)
        left = 0.3 + IMAGE[0] + 0.15 + MAP + 0.6
        _show_energy(panel(left, 2.85, (SIDE, 1.35)), voting.energies[:, row].numpy())
        _show_masses(panel(left, 0.42, (SIDE, 1.5)), supports.sum(1).numpy(), colours, comparison)
    _legend(figure, width, height)
    return save_png(figure, path)


def check_voting(voting: Voting, iterates: Tensor) -> None:
    """Raises `ValueError` unless the votes are of these iterates `[steps + 1, m, set_size, set_dim]`."""
    count, m, set_size, set_dim = iterates.shape
    tokens = voting.supports.shape[-1]
    expected = [[m, tokens, set_dim], [m, set_size, tokens], [count, m]]
    found = [list(part.shape) for part in voting]
    if found != expected:
        raise ValueError(f"expected votes, supports and energies {expected}, got {found}")


def support_colours(supports: Tensor, colours: Sequence[str]) -> np.ndarray:
    """Supports `[set_size, tokens]` as RGBA `[side, side, 4]` in rows of tokens.

    A token mixes the colours of the elements that it supports; its opacity is its mass, the heaviest token's 1.
    """
    masses, side = supports.sum(0).numpy(), math.isqrt(supports.shape[1])
    mixed = supports.T.numpy() @ to_rgba_array(colours)[:, :3] / np.maximum(masses, _TINY)[:, None]
    opacity = masses / max(masses.max(), _TINY)
    return np.concatenate([mixed, opacity[:, None]], axis=1).clip(0, 1).reshape(side, side, 4)


def _show_supports(
    axes: Axes, picture: np.ndarray, supports: Tensor, tokens: np.ndarray, comparison: Comparison
) -> None:
    """The image in grey under its tokens; the number of an object above the centre of its support."""
    show_image(axes, np.repeat(picture.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1))
    shown = tokens * (1, 1, 1, OPACITY)
    axes.imshow(shown, extent=(0, VIEW[0], VIEW[1], 0), interpolation="nearest", aspect="equal", zorder=2)
    down, right = (np.indices(tokens.shape[:2]) + 0.5).reshape(2, -1) / len(tokens)
    weights = supports[: len(comparison.predicted)].numpy()
    weights = weights / np.maximum(weights.sum(1, keepdims=True), _TINY)
    centres = np.stack([weights @ right * VIEW[0], weights @ down * VIEW[1]], axis=1)
    _number(axes, centres, comparison, room=(30, -26))


def _show_votes(axes: Axes, descent: Descent, at: np.ndarray, tokens: np.ndarray) -> None:
    """The real objects outlined, and a dot where each token believes its object to be."""
    for obj in descent.schema.decode(descent.target):
        draw_outlined(axes, obj, on_map(obj["coords"], descent.camera), colour="white")
    colours = tokens.reshape(-1, 4)
    sizes = {"s": LARGEST * colours[:, 3], "linewidths": 0.5 * colours[:, 3]}
    axes.scatter(*at.T, c=colours, edgecolors=INK, zorder=3, **sizes)


def _show_ways(axes: Axes, descent: Descent, order: Tensor, colours: Sequence[str], comparison: Comparison) -> None:
    """The predicted objects, each with the start and the way of its descent; what is extra or missed."""
    ways = on_map(descent.schema.values(descent.iterates[:, order], "coords"), descent.camera)
    ways = ways[:, : len(comparison.predicted)]
    for way, colour in zip(ways.swapaxes(0, 1), colours, strict=False):
        axes.plot(*way.T, color=INK, linewidth=1.0, zorder=4)
        _start(axes, way[0], colour)
        _end(axes, way[-1], colour)
    _number(axes, ways[-1], comparison, room=(0.9, 0.5), extra=" extra")
    for index in comparison.missed:
        caption(axes, on_map(comparison.real[index]["coords"], descent.camera), "missed", drop=0)


def _number(
    axes: Axes, centres: np.ndarray, comparison: Comparison, *, room: tuple[float, float], extra: str = ""
) -> None:
    """The numbers of the predicted objects over their centres, each with `room` free of others, red where wrong."""
    taken: list[np.ndarray] = []
    for number, (spot, partner) in enumerate(zip(centres, comparison.partner, strict=True)):
        spot = np.add(spot, (0, room[1]))
        while any((np.abs(spot - other) < np.abs(room)).all() for other in taken):
            spot = np.add(spot, (0, room[1] / 4))
        taken.append(spot)
        alone = partner is None
        badge(axes, spot, f"{number + 1}{extra * alone}", wrong=alone or bool(comparison.wrong[number]))


def _start(axes: Axes, at: Iterable[float], colour: str) -> None:
    axes.plot(*at, "o", markersize=8, markerfacecolor="white", markeredgecolor=colour, markeredgewidth=2, zorder=4)


def _end(axes: Axes, at: Iterable[float], colour: str) -> None:
    axes.plot(*at, "o", markersize=10, markerfacecolor=colour, markeredgecolor=INK, zorder=5)


def _show_energy(axes: Axes, energies: np.ndarray) -> None:
    axes.plot(energies, color=INK, linewidth=1.6, marker=".")
    axes.set(xlabel="step of the descent", title="energy", xticks=sorted({0, len(energies) - 1}))
    axes.yaxis.get_major_locator().set_params(nbins=4)


def _show_masses(axes: Axes, masses: np.ndarray, colours: Sequence[str], comparison: Comparison) -> None:
    """How much mass supports each object, and all elements that are no objects together."""
    count = len(comparison.predicted)
    names = [*map(str, range(1, count + 1)), "none"]
    bars = [*masses[:count], masses[count:].sum()]
    axes.barh(range(count + 1), bars, color=[*colours[:count], _NO_OBJECT], edgecolor=INK, linewidth=0.6)
    axes.set(yticks=range(count + 1), yticklabels=names, ylim=(count + 0.6, -0.6))
    axes.set(xlabel="mass of its tokens", title="support of each object")
    axes.tick_params(axis="y", length=0)


def _legend(figure: Figure, width: float, height: float) -> None:
    """What the marks of the map mean, at the lower edge."""
    scale = 2 * REACH / MAP  # world units in an inch
    axes = figure.add_axes((0, 0, 1, LEGEND / height))
    axes.set(xlim=(0, width * scale), ylim=(0, LEGEND * scale))
    axes.set_axis_off()

    def at(inches: float, line: float) -> tuple[float, float]:
        return inches * scale, (LEGEND - line) * scale

    first, second = 0.26, 0.6
    for inches, line, text in (
        (0.3, first, "On the map:"),
        (1.6, first, "vote of a token, larger where it has more mass"),
        (5.55, first, "object, from its start to the end of the descent"),
        (9.6, first, "real object"),
        (1.6, second, "token that supports no predicted object"),
        (5.55, second, "all attributes right"),
        (7.55, second, "extra, or some attribute wrong"),
    ):
        axes.text(*at(inches, line), text, fontsize=9, va="center")
    for inches, line, mass, colour in (
        (1.28, first, 0.25, _COLOURS[0]),
        (1.43, first, 1.0, _COLOURS[0]),
        (1.43, second, 1.0, _NO_OBJECT),
    ):
        axes.scatter(*at(inches, line), s=LARGEST * mass, c=colour, alpha=mass, edgecolors=INK, linewidths=0.5)
    axes.plot(*zip(at(5.05, first), at(5.35, first), strict=True), color=INK, linewidth=1.0)
    _start(axes, at(5.05, first), _COLOURS[0])
    _end(axes, at(5.35, first), _COLOURS[0])
    draw_outlined(axes, {"size": "small"}, at(9.28, first), colour="white")
    badge(axes, at(5.35, second), "3", wrong=False)
    badge(axes, at(7.35, second), "3", wrong=True)
