"""All figures of an evaluation, written to one folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from setpred.files import make_folder
from setpred.metrics import THRESHOLDS, attribute_report, match_by_position
from setpred.schema import CLEVR, ElementSchema
from setpred.visualise.confusion import draw_confusion
from setpred.visualise.curves import draw_precision_recall
from setpred.visualise.distances import draw_distance_errors
from setpred.visualise.predictions import draw_predictions
from setpred.visualise.refinement import Descent, draw_refinement_film, draw_refinement_strip
from setpred.visualise.supports import Voting, check_voting, draw_supports
from setpred.visualise.world import as_pictures, cameras_of, has_world

PICTURED = 6  # images in predictions.png
FILMED = 2  # of them in the refinement
SUPPORTED = 3  # of them in supports.png
_FAR = 1e4  # where an infinite prediction is drawn: off every map


def write_report(
    folder: Path,
    *,
    images: np.ndarray | Tensor,
    predicted: Tensor,
    target: Tensor,
    iterates: Tensor | None = None,
    voting: Voting | None = None,
    camera: np.ndarray | Tensor | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    schema: ElementSchema = CLEVR,
    title: str = "",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Writes the figures of an evaluation as PNG and GIF, each file whole or not at all.

    predictions.png, refinement.gif and refinement.png (with `iterates`), supports.png (with `iterates` and `voting`),
    precision_recall.png, confusion.png and distance_errors.png. The first four show CLEVR's world: without a
    continuous field "coords" of three numbers they are left out, as are the others where the schema has nothing to
    draw, and `say` is told in a sentence.

    Args:
        folder: made if need be.
        images: uint8 `[k, 3, H, W]` or `[k, H, W, 3]`, 1 <= k <= n: those of the first k predictions. Any shape
            shows CLEVR's 3:2 view, squeezed or not.
        predicted: `[n, set_size, set_dim]`.
        target: `[n, target_size, set_dim]`.
        iterates: `[steps + 1, m, set_size, set_dim]`, the descents of the first m predictions, the start first.
        voting: of the first m predictions, where the model's tokens vote.
        camera: locations `[k, 3]` or `[n, 3]` in world units, NaN where unknown; then CLEVR's nominal one is taken.
        title: what was evaluated; a small line beside the title of each figure.

    Returns:
        The paths written, in the order above.

    Raises:
        ValueError: wrong shapes, NaN in predictions or real objects; `InputError` when a file cannot be written.
    """
    pictures = as_pictures(images)
    if not 1 <= len(pictures) <= len(predicted):
        raise ValueError(f"expected 1 to {len(predicted)} images, as many as predictions at most, got {len(pictures)}")
    if iterates is not None and (
        iterates.ndim != 4 or iterates.shape[2:] != predicted.shape[1:] or not iterates.numel()
    ):
        shape = ["steps + 1", "m", *predicted.shape[1:]]
        raise ValueError(f"expected iterates [{', '.join(map(str, shape))}], got {list(iterates.shape)}")
    if iterates is not None and iterates.isnan().any():
        raise ValueError("expected iterates without NaN, got some")
    if voting is not None:
        if iterates is None:
            raise ValueError("expected the iterates beside their voting, got None")
        check_voting(voting, iterates)
    predicted, target = predicted.detach().cpu().double(), target.detach().cpu().double()
    assignment = match_by_position(predicted, target, schema=schema)
    folder = make_folder(folder)
    cameras = cameras_of(camera, min(PICTURED, len(pictures)))
    written: list[Path] = []

    if has_world(schema):
        shown = slice(len(cameras))
        sets = predicted[shown].clamp(-_FAR, _FAR), target[shown]
        path = folder / "predictions.png"
        written.append(draw_predictions(path, pictures[shown], *sets, cameras, schema=schema, about=title))
        if iterates is not None:
            ways = iterates.detach().cpu().double().clamp(-_FAR, _FAR)
            descents = [
                Descent(pictures[k], ways[:, k], target[k], cameras[k], schema)
                for k in range(min(SUPPORTED, len(cameras), iterates.shape[1]))
            ]
            filmed = descents[:FILMED]
            written.append(draw_refinement_film(folder / "refinement.gif", filmed, about=title))
            written.append(draw_refinement_strip(folder / "refinement.png", filmed, about=title))
            if voting is not None and math.isqrt(tokens := voting.votes.shape[1]) ** 2 == tokens:
                seen = Voting(*(part.detach().cpu().double() for part in voting))
                seen = seen._replace(votes=seen.votes.clamp(-_FAR, _FAR))
                written.append(draw_supports(folder / "supports.png", descents, seen, about=title))
            elif voting is not None:
                say(f"No picture of the supports: {tokens} tokens are no square grid.")
    else:
        say(f"No pictures of the sets: schema {schema.name!r} has no continuous field 'coords' of three numbers.")

    path = folder / "precision_recall.png"
    written.append(draw_precision_recall(path, predicted, target, thresholds=thresholds, schema=schema, about=title))
    if schema.categorical:
        report = attribute_report(predicted, target, assignment, schema=schema)
        path = folder / "confusion.png"
        written.append(draw_confusion(path, report, schema=schema, about=title))
    else:
        say(f"No confusion of attributes: schema {schema.name!r} has no classes.")
    if schema.continuous:
        path = folder / "distance_errors.png"
        written.append(
            draw_distance_errors(path, predicted, target, assignment, thresholds=thresholds, schema=schema, about=title)
        )
    else:
        say(f"No distance errors: schema {schema.name!r} has no continuous fields.")
    return written
