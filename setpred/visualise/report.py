"""All figures of an evaluation in one folder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from setpred.errors import plural
from setpred.files import make_folder
from setpred.metrics import attribute_report, match_by_position
from setpred.schema import UNCALIBRATED, Calibration, ElementSchema
from setpred.visualise.confusion import draw_confusion
from setpred.visualise.curves import draw_precision_recall
from setpred.visualise.distances import draw_distance_errors
from setpred.visualise.marks import Case, draw_marked_refinement, draw_marks, has_marks
from setpred.visualise.predictions import draw_predictions, worst_first
from setpred.visualise.refinement import Descent, draw_refinement_film, draw_refinement_strip
from setpred.visualise.reliability import draw_reliability
from setpred.visualise.supports import Voting, check_voting, draw_supports
from setpred.visualise.world import as_pictures, cameras_of, has_world

PICTURED = 6  # images in predictions.png
FILMED, SUPPORTED = 2, 3  # of these in the refinement, and in supports.png
MARKED, TRACED = 12, 4  # images with marks in predictions.png, and in refinement.png
_FAR = 1e4  # position of infinite predictions: off every map


def write_report(
    folder: Path,
    *,
    images: np.ndarray | Tensor | None,
    predicted: Tensor,
    target: Tensor,
    inputs: Sequence[np.ndarray | None] = (),
    iterates: Tensor | None = None,
    voting: Voting | None = None,
    camera: np.ndarray | Tensor | None = None,
    thresholds: Sequence[float] | None = None,
    schema: ElementSchema,
    calibration: Calibration = UNCALIBRATED,
    title: str = "",
    pictured: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the figures of an evaluation as PNG and GIF, each file atomically.

    predictions.png, refinement.gif and refinement.png (with `iterates`), supports.png (with `iterates` and `voting`),
    precision_recall.png, reliability.png, confusion.png and distance_errors.png. The first four show CLEVR's world and
    need a field "coords" as CLEVR has it. With other "coords" of two or three numbers, predictions.png and
    refinement.png show marks on the images or in plain axes. `say` gets a sentence for each figure that is ruled out.

    Args:
        folder: folder of the figures, created if missing.
        images: uint8 `[k, 3, H, W]` or `[k, H, W, 3]`, 1 <= k <= n, of the first k predictions, or of those of
            `pictured`. Any shape shows CLEVR's 3:2 view stretched. None where the inputs are sets.
        predicted: `[n, set_size, set_dim]`.
        target: `[n, target_size, set_dim]`.
        inputs: what is drawn of input sets in place of the images: points, vectors `[K]` or nothing, see
            `Case`; an empty sequence where positions cannot be drawn.
        iterates: `[steps + 1, m, set_size, set_dim]`, the descents of the first m images from their starts.
        voting: votes of the tokens of the first m images.
        camera: locations `[k, 3]` or `[n, 3]` in world units; CLEVR's nominal camera replaces NaN.
        thresholds: distances of the average precision; the schema's by default.
        calibration: from presence to confidence.
        title: small text right of the title of each figure.
        pictured: numbers of the predictions that the images show, the worst ones first.
        names: of the images, for the text under them.

    Returns:
        The paths written, in the order above.

    Raises:
        ValueError: wrong shapes, or NaN in predictions or real objects.
        InputError: a file that cannot be written.
    """
    thresholds = schema.thresholds if thresholds is None else thresholds
    pictures = inputs if images is None else as_pictures(images)
    if not (images is not None) <= len(pictures) <= len(predicted):
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
    folder = make_folder(folder)
    written: list[Path] = []

    numbers = list(range(len(pictures)) if pictured is None else pictured)
    names = [f"image {number}" for number in numbers] if names is None else names
    world, ends = images is not None and has_world(schema), predicted.clamp(-_FAR, _FAR)
    if world:
        cameras = cameras_of(camera, min(PICTURED, len(pictures)))
        shown = list(zip(numbers, pictures, cameras, strict=False))
        examples = [
            Descent(picture, ends[k][None], target[k], camera, schema, calibration) for k, picture, camera in shown
        ]
        written.append(draw_predictions(folder / "predictions.png", examples, about=title))
    elif len(pictures) and (images is None or has_marks(schema)):
        cases = [Case(*case, ends[k], target[k]) for k, *case in zip(numbers, names, pictures, strict=True)]
        marked = worst_first(predicted[numbers], target[numbers], schema)[:MARKED]
        total = len(pictures if pictured is None else predicted)
        few = f"The worst {len(marked)} of " if len(marked) < total else ""
        of_all = {"schema": schema, "about": title}
        subtitle = f"{few}{plural(total, 'set' if images is None else 'image')}."
        path = folder / "predictions.png"
        written.append(draw_marks(path, [cases[k] for k in marked], subtitle=subtitle, **of_all))
        if iterates is not None:
            path, traced = folder / "refinement.png", min(TRACED, iterates.shape[1])
            written.append(draw_marked_refinement(path, cases[:traced], iterates, **of_all))
    else:
        say(f"No pictures of the sets: schema {schema.name!r} has no 'coords' that can be drawn.")
    if world and iterates is not None:
        descents = [replace(example, iterates=way) for example, way in zip(examples, iterates.unbind(1), strict=False)]
        written.append(draw_refinement_film(folder / "refinement.gif", descents[:FILMED], about=title))
        written.append(draw_refinement_strip(folder / "refinement.png", descents[:FILMED], about=title))
        if voting is not None and math.isqrt(tokens := voting.votes.shape[1]) ** 2 == tokens:
            written.append(draw_supports(folder / "supports.png", descents[:SUPPORTED], voting, about=title))
        elif voting is not None:
            say(f"No picture of the supports: {tokens} tokens are not a square grid.")
    of_all = {"thresholds": thresholds, "schema": schema, "calibration": calibration, "title": title}
    return written + write_scores(folder, predicted, target, **of_all, say=say)


def write_scores(
    folder: Path,
    predicted: Tensor,
    target: Tensor,
    *,
    thresholds: Sequence[float],
    schema: ElementSchema,
    calibration: Calibration = UNCALIBRATED,
    title: str = "",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Draw what is of all images together: precision_recall, reliability, confusion and distance_errors.png.

    Args as of `write_report`; `folder` exists.
    """
    assignment = match_by_position(predicted, target, schema=schema)
    written: list[Path] = []
    of_all = {"thresholds": thresholds, "schema": schema, "about": title}
    written.append(draw_precision_recall(folder / "precision_recall.png", predicted, target, **of_all))
    rated = {"calibration": calibration, "schema": schema, "about": title}
    written.append(draw_reliability(folder / "reliability.png", predicted, target, **rated))
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
