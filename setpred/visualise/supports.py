"""The votes of an image's tokens: which object each token supports, and the paths of the objects to their votes."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from torch import Tensor

from setpred.visualise import world
from setpred.visualise.predictions import Comparison, compare
from setpred.visualise.refinement import Descent
from setpred.visualise.style import DISTINCT, INK, Sheet, styled

# in inches
IMAGE, MAP, SIDE = (3.24, 2.16), 4.4, 1.75
HEAD, ROW, LEGEND = 0.95, 4.95, 0.85
OPACITY = 0.75  # of the heaviest token on the image
LARGEST = 60.0  # area in square points of the dot of the heaviest token's vote
_TINY = 1e-9
_NO_OBJECT = "#ffffff"


class Voting(NamedTuple):
    """The votes of the tokens of m images; tokens are in rows on a square grid.

    votes: the elements voted for `[m, tokens, set_dim]`; supports: the mass with which each token supports each element
    of the prediction, summing to the token's mass `[m, set_size, tokens]`; energies: of the iterates `[steps + 1, m]`.
    """

    votes: Tensor
    supports: Tensor
    energies: Tensor


def check_voting(voting: Voting, iterates: Tensor) -> None:
    """Raise `ValueError` unless the shapes of the votes fit iterates `[steps + 1, m, set_size, set_dim]`."""
    count, m, set_size, set_dim = iterates.shape
    tokens = voting.supports.shape[-1]
    expected = [[m, tokens, set_dim], [m, set_size, tokens], [count, m]]
    found = [list(part.shape) for part in voting]
    if found != expected:
        raise ValueError(f"expected votes, supports and energies {expected}, got {found}")


@styled()
def draw_supports(path: Path, descents: Sequence[Descent], voting: Voting, *, about: str) -> Path:
    """Draw a row for each example: the image, the tokens' supports on it, the votes from above, the energy.

    Args:
        path: path of the PNG.
        descents: the examples; their last iterate is the prediction.
        voting: votes of these examples, in the same order.
        about: small text right of the title.
    """
    middle = 0.3 + IMAGE[0] + 0.15
    right = middle + MAP + 0.6
    sheet = Sheet(right + SIDE + 0.2, HEAD + ROW * len(descents) + LEGEND)
    subtitle = "Each token, a position of the image, votes for an object and has the colour of its prediction."
    sheet.heading("Support of the objects by tokens", subtitle, about)
    for row, descent in enumerate(descents):
        bottom = sheet.height - HEAD - ROW * (row + 1) + 0.1
        comparison = compare(descent.iterates[-1], descent.target, descent.schema)
        count = len(comparison.predicted)
        order = descent.iterates[-1][:, -1].argsort(descending=True, stable=True)  # as `compare` numbers them
        supports = voting.supports[row, order].nan_to_num()
        colours = [*itertools.islice(itertools.cycle(DISTINCT), count), *[_NO_OBJECT] * (len(order) - count)]
        tokens = support_colours(supports, colours)
        sheet.note(0.3, bottom + MAP + 0.17, f"Image {row}, {comparison.summary}", fontsize=11)
        world.show_image(sheet.panel(0.3, bottom + MAP - IMAGE[1], *IMAGE), descent.picture)
        _show_supports(sheet.panel(0.3, bottom, *IMAGE), descent.picture, supports, tokens, comparison)
        axes = sheet.panel(middle, bottom, MAP, MAP)
        world.show_map(axes, descent.camera)
        votes = world.on_map(descent.schema.values(voting.votes[row], "coords"), descent.camera)
        for obj in comparison.real:
            world.draw_outlined(axes, obj, world.on_map(obj["coords"], descent.camera), colour="white")
        dots = tokens.reshape(-1, 4)
        sizes = {"s": LARGEST * dots[:, 3], "linewidths": 0.5 * dots[:, 3]}
        axes.scatter(*votes.T, c=dots, edgecolors=INK, zorder=3, **sizes)
        _show_paths(axes, descent, order, colours, comparison)
        _show_energy(sheet.panel(right, bottom + 2.85, SIDE, 1.35), voting.energies[:, row].numpy())
        _show_masses(sheet.panel(right, bottom + 0.42, SIDE, 1.5), supports.sum(1).numpy(), colours, count)
    _draw_legend(sheet)
    return sheet.save(path)


def support_colours(supports: Tensor, colours: Sequence[str]) -> np.ndarray:
    """Supports `[set_size, tokens]` as RGBA `[side, side, 4]` in rows of tokens.

    A token mixes the colours of the elements that it supports; its opacity is its mass over the largest mass.
    """
    masses, side = supports.sum(0).numpy(), math.isqrt(supports.shape[1])
    mixed = supports.T.numpy() @ to_rgba_array(colours)[:, :3] / np.maximum(masses, _TINY)[:, None]
    opacity = masses / max(masses.max(), _TINY)
    return np.concatenate([mixed, opacity[:, None]], axis=1).clip(0, 1).reshape(side, side, 4)


def _show_supports(
    axes: Axes, picture: np.ndarray, supports: Tensor, tokens: np.ndarray, comparison: Comparison
) -> None:
    """Show the tokens over the grey image, and each object's number above the centre of its support."""
    world.show_image(axes, np.repeat(picture.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1))
    extent = (0, world.VIEW[0], world.VIEW[1], 0)
    axes.imshow(tokens * (1, 1, 1, OPACITY), extent=extent, interpolation="nearest", aspect="equal", zorder=2)
    down, right = (np.indices(tokens.shape[:2]) + 0.5).reshape(2, -1) / len(tokens)
    weights = supports[: len(comparison.predicted)].numpy()
    weights = weights / np.maximum(weights.sum(1, keepdims=True), _TINY)
    _number(axes, np.stack([weights @ right, weights @ down], axis=1) * world.VIEW, comparison, room=(30, -26))


def _show_paths(axes: Axes, descent: Descent, order: Tensor, colours: Sequence[str], comparison: Comparison) -> None:
    """Draw the predicted objects with the path of their descent, and mark extra and missed ones."""
    paths = world.on_map(descent.schema.values(descent.iterates[:, order], "coords"), descent.camera)
    paths = paths[:, : len(comparison.predicted)]
    for path, colour in zip(paths.swapaxes(0, 1), colours, strict=False):
        _draw_path(axes, path, colour)
    _number(axes, paths[-1], comparison, room=(0.9, 0.5), extra=" extra")
    for index in comparison.missed:
        world.caption(axes, world.on_map(comparison.real[index]["coords"], descent.camera), "missed")


def _draw_path(axes: Axes, points: Sequence[Iterable[float]], colour: str) -> None:
    """Draw a path from an open start to a filled end."""
    axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.0, zorder=4)
    open_dot = {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 2}
    axes.plot(*points[0], "o", markersize=8, zorder=4, **open_dot)
    axes.plot(*points[-1], "o", markersize=10, markerfacecolor=colour, markeredgecolor=INK, zorder=5)


def _number(
    axes: Axes, centres: np.ndarray, comparison: Comparison, *, room: tuple[float, float], extra: str = ""
) -> None:
    """Number the predicted objects over their centres, at least `room` apart; wrong ones are red."""
    taken: list[np.ndarray] = []
    for number, spot in enumerate(centres):
        spot = np.add(spot, (0, room[1]))
        while any((np.abs(spot - other) < np.abs(room)).all() for other in taken):
            spot = np.add(spot, (0, room[1] / 4))
        taken.append(spot)
        suffix = extra if comparison.partner[number] is None else ""
        world.badge(axes, spot, f"{number + 1}{suffix}", wrong=comparison.is_wrong(number))


def _show_energy(axes: Axes, energies: np.ndarray) -> None:
    axes.plot(energies, color=INK, linewidth=1.6, marker=".")
    axes.set(xlabel="step of the descent", title="energy", xticks=sorted({0, len(energies) - 1}))
    axes.yaxis.get_major_locator().set_params(nbins=4)


def _show_masses(axes: Axes, masses: np.ndarray, colours: Sequence[str], count: int) -> None:
    """Plot the mass that supports each of the `count` objects, and all other elements together."""
    bars = [*masses[:count], masses[count:].sum()]
    axes.barh(range(count + 1), bars, color=[*colours[:count], _NO_OBJECT], edgecolor=INK, linewidth=0.6)
    axes.set_yticks(range(count + 1), [*map(str, range(1, count + 1)), "none"])
    axes.set(ylim=(count + 0.6, -0.6), xlabel="mass of its tokens", title="support of each object")
    axes.tick_params(axis="y", length=0)


def _draw_legend(sheet: Sheet) -> None:
    legend = world.Legend(sheet, LEGEND, MAP)
    first, second, colour = 0.26, 0.6, DISTINCT[0]
    legend.write(0.3, first, "On the map:")
    for x, down, mass, fill in ((1.28, first, 0.25, colour), (1.43, first, 1, colour), (1.43, second, 1, _NO_OBJECT)):
        size = {"s": LARGEST * mass, "linewidths": 0.5}
        legend.axes.scatter(*legend.at(x, down), c=fill, alpha=mass, edgecolors=INK, **size)
    legend.write(1.6, first, "vote of a token, larger where it has more mass")
    legend.write(1.6, second, "token that supports no predicted object")
    _draw_path(legend.axes, [legend.at(5.05, first), legend.at(5.35, first)], colour)
    legend.write(5.55, first, "object, from the start to the end of its descent")
    for x, wrong, text in ((5.35, False, "all attributes right"), (7.35, True, "extra, or some attribute wrong")):
        world.badge(legend.axes, legend.at(x, second), "3", wrong=wrong)
        legend.write(x + 0.2, second, text)
    world.draw_outlined(legend.axes, {"size": "small"}, legend.at(9.28, first), colour="white")
    legend.write(9.6, first, "real object")
