"""Segment images by the masks of discovered slots or the supports of a voting model; score, draw and encode them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from setpred.data.dataset import SetImages, as_batch, fitting_workers
from setpred.data.hdf5 import INSTANCES
from setpred.decoders import IDSPN
from setpred.errors import InputError, plural
from setpred.evaluation import PASS, check_finite, encoder_autocast, for_evaluation, pad_to_pass
from setpred.inner import Problem, Sum, VotingEnergy
from setpred.inner.voting import Ballot
from setpred.losses import Reconstruction
from setpred.metrics import adjusted_rand_index, masks_to_labels, segmentation_scores
from setpred.metrics.segmentation import SCORES
from setpred.model import SetPredictor
from setpred.nn import composite
from setpred.progress import progress
from setpred.sets import presence_mask
from setpred.visualise import SegmentedImage
from setpred.visualise.world import as_pictures

NUMBERS_AT_ONCE = 2**22  # of masks that are enlarged to an image


class Segments(NamedTuple):
    """Elements `[batch, set_size, set_dim]` of images and their masks `[batch, set_size, h, w]`, or those of one image.

    Masks of slots sum to 1 at every pixel. Supports sum to the mass of the token at that place, at most 1.
    """

    elements: Tensor
    masks: Tensor


def discovers(model: SetPredictor) -> bool:
    """Whether the elements of a model are layers of the image, as of object discovery."""
    return getattr(model.decoder, "draws_layers", False)


def voting_energy(model: SetPredictor) -> VotingEnergy | None:
    """The `VotingEnergy` in the objective of a model, if any."""
    return _energy_in(model.decoder.objective) if isinstance(model.decoder, IDSPN) else None


def _energy_in(objective: nn.Module) -> VotingEnergy | None:
    if isinstance(objective, Sum):
        return next(filter(None, map(_energy_in, objective.objectives)), None)
    return objective if isinstance(objective, VotingEnergy) else None


def require_masks(model: SetPredictor, option: str) -> None:
    """Raise `InputError` unless a model of images has masks or supports; the message begins with the option."""
    if model.takes_sets or not (discovers(model) or voting_energy(model)):
        got = "a model of sets" if model.takes_sets else f"the decoder {type(model.decoder).__name__}"
        raise InputError(
            f"{option}: expected a model of images with masks, of discovery (such as SpatialBroadcast) or with support "
            f"maps (IDSPN with a VotingEnergy), got {got}; leave the option out"
        )


@torch.no_grad()
def segment(model: SetPredictor, images: Tensor, *, iterations: int | None = None) -> Iterator[Segments]:
    """Yield the elements and masks of images, `setpred.evaluation.PASS` of them at a time.

    The elements are those of `setpred.evaluation.predict_in_passes`, so they depend on the image and the model alone.

    Args:
        model: a model in evaluation mode that passes `require_masks`.
        images: `[batch, 3, H, W]`, on the model's device.
        iterations: descent steps; the decoder's own number by default.
    """
    for some in images.split(PASS):
        with encoder_autocast(images.device):
            features = model.encode(pad_to_pass(some))
            elements = model.decoder(features, iterations=iterations)[: len(some)].float()
        yield Segments(elements, masks_of(model, features[: len(some)], elements))


def masks_of(model: SetPredictor, features: Tensor, elements: Tensor) -> Tensor:
    """Masks `[batch, set_size, h, w]` of elements that a model predicts from features."""
    if discovers(model):
        return composite(elements).masks
    energy, problem = voting_energy(model), Problem(features.float(), elements)
    with torch.autocast(features.device.type, enabled=False):
        if any(getattr(part, "gated", False) for part in model.encoder.modules()):
            # the mass of an object is in few of its tokens, its presence in all
            presence = Ballot.of(problem.latent, energy.set_dim).votes[..., -1].clamp(0, 1)
            supports = energy.shares(elements, problem) * presence.unsqueeze(1)
        else:
            supports = energy.supports(elements, problem)
    side = math.isqrt(supports.shape[-1])
    if side**2 != supports.shape[-1]:
        raise InputError(f"expected tokens on a square grid for masks, got {supports.shape[-1]}; use another model")
    return supports.unflatten(-1, (side, side))


def with_background(supports: Tensor) -> Tensor:
    """Masks `[batch, 1 + n, h, w]`: the background, what supports `[batch, n, h, w]` of present elements lack of 1."""
    return torch.cat([1 - supports.sum(1, keepdim=True), supports], dim=1)


def scored_masks(model: SetPredictor, segments: Segments) -> Tensor:
    """The masks that compete for each pixel: of all slots, or of the background and each element.

    The background has all mass that supports no present element: that of elements with a presence of at most one half,
    whose masks are 0, and what a token's mass lacks of 1.
    """
    if discovers(model):
        return segments.masks
    return with_background(segments.masks * presence_mask(segments.elements)[..., None, None])


def segmentation_report(
    model: SetPredictor,
    data: SetImages,
    *,
    iterations: int | None,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> dict[str, Any]:
    """Score the segmentations of a data set with instances, in memory for a few batches.

    "scores" has the means over images of `setpred.metrics.segmentation_scores`; images without objects count in "ari"
    alone. "reconstruction" is the mean squared error of a model of discovery. "fg_ari_of_objects" is FG-ARI of supports
    among which the background does not compete, as where attention is scored.

    Raises:
        InputError: non-finite predictions; the message names the images.
    """
    model, discovery = for_evaluation(model, device), discovers(model)
    loader = DataLoader(
        data, batch_size=batch_size, num_workers=fitting_workers(workers, data, batch_size), collate_fn=as_batch
    )
    rows, errors, alone = [], [], []
    for batch in progress(loader, total=len(loader), description=f"segmenting {len(data)} images, batches"):
        images, instances = batch["image"].to(device, non_blocking=True), batch[INSTANCES]
        parts = zip(
            segment(model, images, iterations=iterations), images.split(PASS), instances.split(PASS), strict=True
        )
        for number, (segments, inputs, truth) in enumerate(parts):
            check_finite(segments.elements, batch["index"][number * PASS :])
            masks = scored_masks(model, segments)
            labels = masks_to_labels(masks, truth.shape[1:]).cpu()
            rows.append(torch.stack([*segmentation_scores(labels, truth).values()]))
            if discovery:
                errors.append(Reconstruction()(segments.elements, inputs).cpu())
            else:
                labels = masks_to_labels(masks[:, 1:], truth.shape[1:]).cpu()
                alone.append(adjusted_rand_index(labels, truth, foreground=True))
    scores = torch.cat(rows, dim=1)
    name, values = ("reconstruction", errors) if discovery else ("fg_ari_of_objects", alone)
    return {
        "masks": "decoder" if discovery else "supports",
        "segments": model.decoder.set_size,
        "images": len(data),
        "images_with_objects": int((~scores[1].isnan()).sum()),
        "scores": dict(zip(SCORES, scores.nanmean(1).tolist(), strict=True)),
        name: torch.cat(values).double().nanmean().item(),
    }


def format_segmentation(result: dict[str, Any]) -> str:
    """Format what `segmentation_report` returns, with the name of its "data", as text."""
    images, known = result["images"], result["images_with_objects"]
    meaning = {
        "decoder": f"the decoder's: each pixel belongs to the largest of {plural(result['segments'], 'mask')}",
        "supports": "supports: each pixel belongs to the object that its token supports most, or to the background",
    }
    lines = [
        f"Segmentation of {plural(images, 'image')} of {result['data']}",
        f"masks: {meaning[result['masks']]}",
        "background: one more true segment in ARI, left out of FG-ARI, mBO and mIoU",
        "",
        "         " + "".join(f"{name:>8}" for name in SCORES.values()),
        "  in %   " + "".join(f"{100 * result['scores'][name]:8.1f}" for name in SCORES),
    ]
    if "reconstruction" in result:
        lines += ["", f"Reconstruction: mean squared error {result['reconstruction']:.5f}, of colours from 0 to 1"]
    else:
        lines += ["", f"FG-ARI if the background does not compete for pixels: {100 * result['fg_ari_of_objects']:.1f}"]
    if known < images:
        lines += ["", f"note: {plural(images - known, 'image')} without visible objects count in ARI alone"]
    return "\n".join(lines)


@torch.no_grad()
def segmented_images(
    model: SetPredictor, data: SetImages, numbers: Sequence[int], *, iterations: int | None, device: torch.device
) -> list[SegmentedImage]:
    """Segment images of a data set with instances for figures, at every iterate of the refinement."""
    batch = data.__getitems__(numbers)
    images, instances = batch["image"], batch[INSTANCES].numpy()
    with encoder_autocast(device):
        features = model.encode(pad_to_pass(images.to(device)))  # the shape in which they were predicted
        iterates = [found[: len(numbers)].float() for found in model.decoder.refine(features, iterations=iterations)]
    masks = [masks_of(model, features[: len(numbers)], elements).cpu() for elements in iterates]
    of_images = [torch.stack(parts, dim=1) for parts in ([elements.cpu() for elements in iterates], masks)]
    return [
        segmented_image(model, data.name(number), picture, Segments(*segments), truth)
        for number, picture, truth, *segments in zip(numbers, as_pictures(images), instances, *of_images, strict=True)
    ]


def segmented_image(
    model: SetPredictor, name: str, picture: np.ndarray, iterates: Segments, instances: np.ndarray | None = None
) -> SegmentedImage:
    """Segment one image, for figures.

    Args:
        picture: uint8 `[S, S, 3]`.
        iterates: elements and masks of the iterates in place of a batch, on the CPU; the last ones are the prediction.
        instances: the true ones, if known.
    """
    size = picture.shape[:2]
    scored = scored_masks(model, iterates)
    if discovers(model):
        drawn = composite(iterates.elements[-1:])
        weights, colours, reconstruction = drawn.masks[0], drawn.colours[0], drawn.image[0].clamp(0, 1)
    else:
        weights = functional.interpolate(scored[-1:], size, mode="bilinear")[0]
        colours, reconstruction = torch.tensor(picture).float().permute(2, 0, 1).unsqueeze(0) / 255, None
    weights = weights.unsqueeze(1)
    parts = (weights * colours + 1 - weights).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # on white
    return SegmentedImage(
        name=name,
        picture=picture,
        instances=instances,
        labels=masks_to_labels(scored, size).numpy(),
        parts={name: (label, parts[label]) for name, label in _labels(model, iterates.elements[-1]).items()},
        reconstruction=None if reconstruction is None else reconstruction.permute(1, 2, 0).numpy(),
    )


def _labels(model: SetPredictor, elements: Tensor) -> dict[str, int]:
    """The labels of an image by their names: of all slots, or of the background and the present elements in order."""
    if discovers(model):
        last = model.decoder.set_size - 1
        own = model.decoder.draws_background
        return {"background" if own and k == last else f"slot {k + 1}": k for k in range(last + 1)}
    order = confident_first(elements)[: int(presence_mask(elements).sum())].tolist()
    return {"background": 0} | {f"object {k + 1}": number + 1 for k, number in enumerate(order)}


def confident_first(elements: Tensor) -> Tensor:
    """The order in which `ElementSchema.decode` lists the elements of a set `[set_size, set_dim]`."""
    return elements[:, -1].argsort(descending=True, stable=True)


def image_labels(masks: Tensor, size: tuple[int, int], *, padded: bool) -> np.ndarray:
    """Label each pixel of an image with the index of its largest mask: uint8 `[height, width]`.

    The masks are interpolated as in `setpred.metrics.masks_to_labels`, some rows of the image at a time.

    Args:
        masks: `[n, h, w]` of the square that an image was resized to, n <= 256.
        size: height and width of the image.
        padded: whether it was padded at right and bottom to a square before.
    """
    extent = (max(size), max(size)) if padded else size
    (upper, lower, down), (left, right, across) = map(_neighbours, size, extent, masks.shape[1:])
    labels, rows = np.empty(size, np.uint8), max(1, NUMBERS_AT_ONCE // (len(masks) * size[1]))
    for start in range(0, size[0], rows):
        some = slice(start, start + rows)
        lines = masks[:, upper[some]].lerp(masks[:, lower[some]], down[some, None])
        labels[some] = lines[..., left].lerp(lines[..., right], across).max(0).indices
    return labels


def _neighbours(count: int, extent: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells around each of the first `count` of `extent` pixels, and the weight of the second cell."""
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * cells / extent - 0.5).clamp(0, cells - 1)
    first = places.long()
    return first, (first + 1).clamp(max=cells - 1), (places - first).float()


def slot_labels(model: SetPredictor, masks: Tensor, size: tuple[int, int], *, padded: bool) -> np.ndarray:
    """Label the pixels of an image with 1 + the number of their slot, those of the background with 0.

    The background is the decoder's own layer for it, the last one, or else the slot with most pixels.
    """
    labels = image_labels(masks, size, padded=padded)
    own = model.decoder.draws_background
    background = len(masks) - 1 if own else np.bincount(labels.ravel(), minlength=len(masks)).argmax()
    return np.where(labels == background, 0, labels + np.uint8(1))
