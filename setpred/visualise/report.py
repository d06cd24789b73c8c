"""All figures of an evaluation in one folder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from setpred.files import make_folder
from setpred.metrics import attribute_report, match_by_position
from setpred.schema import ElementSchema
from setpred.visualise.confusion import draw_confusion
from setpred.visualise.curves import draw_precision_recall
from setpred.visualise.distances import draw_distance_errors
from setpred.visualise.marks import draw_marks
from setpred.visualise.predictions import draw_predictions
from setpred.visualise.refinement import Descent, draw_refinement_film, draw_refinement_strip
from setpred.visualise.supports import Voting, check_voting, draw_supports
from setpred.visualise.world import as_pictures, cameras_of, has_world

PICTURED = 6  # images in predictions.png
FILMED, SUPPORTED = 2, 3  # of these in the refinement, and in supports.png
_FAR = 1e4  # position of infinite predictions: off every map


def write_report(
    folder: Path,
    *,
    images: np.ndarray | Tensor,
    predicted: Tensor,
    target: Tensor,
    iterates: Tensor | None = None,
    voting: Voting | None = None,
    camera: np.ndarray | Tensor | None = None,
    thresholds: Sequence[float] | None = None,
    schema: ElementSchema,
    title: str = "",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the figures of an evaluation as PNG and GIF, each file atomically.

    predictions.png, refinement.gif and refinement.png (with `iterates`), supports.png (with `iterates` and `voting`),
    precision_recall.png, confusion.png and distance_errors.png. The first four show CLEVR's world and need a
    continuous field "coords" of three numbers; with a schema of places on the image (`side`), predictions.png shows
    marks on the images. `say` gets a sentence for each figure that the schema rules out.

    Args:
        folder: folder of the figures, created if missing.
        images: uint8 `[k, 3, H, W]` or `[k, H, W, 3]`, 1 <= k <= n, of the first k predictions. Any shape shows
            CLEVR's 3:2 view stretched.
        predicted: `[n, set_size, set_dim]`.
        target: `[n, target_size, set_dim]`.
        iterates: `[steps + 1, m, set_size, set_dim]`, the descents of the first m predictions from their starts.
        voting: votes of the tokens of the first m images.
        camera: locations `[k, 3]` or `[n, 3]` in world units; CLEVR's nominal camera replaces NaN.
        thresholds: distances of the average precision; the schema's by default.
        title: small text right of the title of each figure.

    Returns:
        The paths written, in the order above.

    Raises:
        ValueError: wrong shapes, or NaN in predictions or real objects.
        InputError: a file that cannot be written.
    """
    thresholds = schema.thresholds if thresholds is None else thresholds
    pictures = as_pictures(images)
    if not 1 <= len(pictures) <= len(predicted):
        raise ValueError(f"expected 1 to {len(predicted)} images, at most one per prediction, got {len(pictures)}")
    if iterates is not None:
        if iterates.ndim != 4 or iterates.shape[2:] != predicted.shape[1:] or not iterates.numel():
            shape = ", ".join(map(str, predicted.shape[1:]))
            raise ValueError(f"expected iterates [steps + 1, m, {shape}], got {list(iterates.shape)}")
        if iterates.isnan().any():
            raise ValueError("expected iterates without NaN, got some")
        iterates = iterates.detach().cpu().double().clamp(-_FAR, _FAR)
    if voting is not None:
        if iterates is None:
            raise ValueError("expected iterates with the voting, got None")
        check_voting(voting, iterates)
        voting = Voting(*(part.detach().cpu().double() for part in voting))
        voting = voting._replace(votes=voting.votes.clamp(-_FAR, _FAR))
    predicted, target = predicted.detach().cpu().double(), target.detach().cpu().double()
    assignment = match_by_position(predicted, target, schema=schema)
    folder = make_folder(folder)
    cameras = cameras_of(camera, min(PICTURED, len(pictures)))
    written: list[Path] = []

    if has_world(schema):
        ends = predicted.clamp(-_FAR, _FAR)
        examples = [Descent(pictures[k], ends[k][None], target[k], cameras[k], schema) for k in range(len(cameras))]
        written.append(draw_predictions(folder / "predictions.png", examples, about=title))
    elif schema.side:
        sets = predicted[: len(pictures)], target[: len(pictures)]
        written.append(draw_marks(folder / "predictions.png", pictures, *sets, schema=schema, about=title))
    else:
        say(f"No pictures of the sets: schema {schema.name!r} has no 'coords' that can be drawn.")
    if has_world(schema) and iterates is not None:
        descents = [replace(example, iterates=way) for example, way in zip(examples, iterates.unbind(1), strict=False)]
        written.append(draw_refinement_film(folder / "refinement.gif", descents[:FILMED], about=title))
        written.append(draw_refinement_strip(folder / "refinement.png", descents[:FILMED], about=title))
        if voting is not None and math.isqrt(tokens := voting.votes.shape[1]) ** 2 == tokens:
            written.append(draw_supports(folder / "supports.png", descents[:SUPPORTED], voting, about=title))
        elif voting is not None:
            say(f"No picture of the supports: {tokens} tokens are not a square grid.")

    of_all = {"thresholds": thresholds, "schema": schema, "about": title}
    written.append(draw_precision_recall(folder / "precision_recall.png", predicted, target, **of_all))
    if schema.categorical:
        attributes = attribute_report(predicted, target, assignment, schema=schema)
        written.append(draw_confusion(folder / "confusion.png", attributes, schema=schema, about=title))
    else:
        say(f"No confusion of attributes: schema {schema.name!r} has no classes.")
    if schema.continuous:
        path = folder / "distance_errors.png"
        written.append(draw_distance_errors(path, predicted, target, assignment, **of_all))
    else:
        say(f"No distance errors: schema {schema.name!r} has no continuous fields.")
    return written
