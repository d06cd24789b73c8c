"""Scores of segmentations: adjusted Rand index, mean best overlap and mean IoU of label maps, image by image."""

import torch
from torch import Tensor
from torch.nn import functional

from setpred.errors import NotFiniteError
from setpred.matching import hungarian
from setpred.metrics.averages import MeanMetric
from setpred.nn import composite
from setpred.sets import mean_present

SCORES = {"ari": "ARI", "fg_ari": "FG-ARI", "mbo": "mBO", "miou": "mIoU"}  # how publications write them


def masks_to_labels(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Label each pixel with the index of its largest mask: int64 `[batch, height, width]`.

    Smaller masks, such as attention or supports on a grid of tokens, are first interpolated to the size, bilinearly. Of
    equal masks, the first counts.

    Args:
        masks: floating point `[batch, slots, h, w]`: probabilities, logits or shares that compare over the slots.
        size: height and width of the instances, at least h and w.

    Raises:
        ValueError: another shape, no slot, or masks that are larger.
        NotFiniteError: NaN or infinity, naming the samples.

    >>> masks_to_labels(torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]]), (1, 4))
    tensor([[[0, 0, 1, 1]]])
    """
    if masks.ndim != 4 or 0 in masks.shape[1:] or not masks.is_floating_point():
        raise ValueError(f"expected floating point masks [batch, slots, h, w], got {masks.dtype} {list(masks.shape)}")
    if masks.shape[2] > size[0] or masks.shape[3] > size[1]:
        raise ValueError(f"expected masks of at most {list(size)} pixels, got {list(masks.shape[2:])}; reduce them")
    finite = masks.isfinite().flatten(1).all(1)
    if not finite.all():
        raise NotFiniteError("stack of masks", (~finite).nonzero().flatten().tolist())
    if masks.shape[2:] != tuple(size):
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32))  # half precision would make masks equal
        masks = functional.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)
    return masks.max(1).indices  # several times as fast as `argmax` here


def contingency(predicted: Tensor, instances: Tensor) -> Tensor:
    """Count the pixels of each pair of labels: int64 `[batch, true, predicted]`.

    Row 0 is the background of the truth. The other rows and the columns are the labels of the batch in rising order;
    labels that an image lacks have zeros.

    Args:
        predicted, instances: as in `adjusted_rand_index`.
    """
    for name, labels in (("predicted", predicted), ("instances", instances)):
        if labels.ndim != 3 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"expected integer {name} [batch, H, W], got {labels.dtype} {list(labels.shape)}")
    if predicted.shape != instances.shape:
        raise ValueError(
            f"expected predicted labels {list(instances.shape)} as the instances, got {list(predicted.shape)}; "
            "masks_to_labels gives that size"
        )
    (true, rows), (guess, columns) = _ranks(instances, "instances"), _ranks(predicted, "predicted labels")
    image = torch.arange(len(true), device=true.device).view(-1, 1, 1)
    pairs = ((image * rows + true) * columns + guess).flatten()
    return pairs.bincount(minlength=len(true) * rows * columns).view(-1, rows, columns)


def _ranks(labels: Tensor, name: str) -> tuple[Tensor, int]:
    """Each label's rank among 0 and the labels of the batch, and their number: any labels need few counts."""
    flat = torch.cat([labels.new_zeros(1), labels.flatten()]).long()
    found, ranks = flat.unique(return_inverse=True)
    if found[0] < 0:
        raise ValueError(f"expected {name} of at least 0, got {int(found[0])}")
    return ranks[1:].view_as(labels), len(found)


def adjusted_rand_index(predicted: Tensor, instances: Tensor, *, foreground: bool) -> Tensor:
    """Adjusted Rand index of each image, float64 `[batch]`: agreement over pairs of pixels, 0 if at random.

        ARI = (Σ_tp P(n_tp) - E) / (½ (Σ_t P(a_t) + Σ_p P(b_p)) - E),   E = Σ_t P(a_t) Σ_p P(b_p) / P(n)

    with P(k) = k (k - 1), n_tp pixels of true label t and predicted label p, a and b the sums of n over p and t. Which
    numbers the labels have does not matter. Equal partitions have 1, also where the formula is 0 / 0: both sides one
    cluster, or each pixel its own. One true cluster in several predicted ones has 0.

    Args:
        predicted: integer labels `[batch, H, W]`, at least 0; label 0 is a label as any other.
        instances: integer `[batch, H, W]`: 0 for the background, others for objects.
        foreground: True compares the pixels of objects alone (FG-ARI): what is predicted on the background does not
            count. NaN for an image without objects, which has nothing to compare. False compares all pixels, with the
            background as one more cluster.

    Raises:
        ValueError: another shape or dtype, or a negative label.

    Source: Hubert, Arabie, Journal of Classification 1985; FG-ARI: Greff et al., ICML 2019. It equals scikit-learn's
    `adjusted_rand_score` of the same pixels, which gives 1 for no pixels. The TensorFlow code of
    `multi_object_datasets`, which publications use, differs in images with less than two objects: it may give NaN.

    >>> instances, predicted = torch.tensor([[[0, 0, 1, 1, 2, 2]]]), torch.tensor([[[0, 1, 1, 1, 0, 0]]])
    >>> adjusted_rand_index(predicted, instances, foreground=True)
    tensor([1.], dtype=torch.float64)
    >>> adjusted_rand_index(predicted, instances, foreground=False).round(decimals=4)
    tensor([0.2424], dtype=torch.float64)
    """
    return _rand(contingency(predicted, instances), foreground)


def _rand(counts: Tensor, foreground: bool) -> Tensor:
    """`adjusted_rand_index` from the counts of `contingency`."""
    counts = counts[:, 1:] if foreground else counts
    # int64 holds the numbers of pairs exactly, but not their products
    both, true, guess, every = (
        (k * (k - 1)).flatten(1).sum(1) for k in (counts, counts.sum(2), counts.sum(1), counts.sum((1, 2)).unsqueeze(1))
    )
    expected = true.double() * guess.double() / every.double()
    index = (both - expected) / ((true + guess).double() / 2 - expected)
    equal = (both == true) & (both == guess)
    return torch.where(equal, 1.0, index).masked_fill(counts.sum((1, 2)) == 0, torch.nan)


def mean_best_overlap(predicted: Tensor, instances: Tensor) -> Tensor:
    """Mean best overlap (mBO) of each image, float64 `[batch]`: mean over its objects t of max_p IoU_tp.

    IoU_tp = n_tp / (a_t + b_p - n_tp) with the letters of `adjusted_rand_index`; b_p counts all pixels of a mask, also
    on the background. The background of the truth is no object, and neither is a hidden object without pixels. A mask
    may be the best of several objects. NaN for an image without objects.

    Args:
        predicted, instances: as in `adjusted_rand_index`, with its errors.

    Source: Pont-Tuset et al., TPAMI 2017; without background: Seitzer et al., ICLR 2023 (DINOSAUR).
    """
    return _best(*_overlaps(contingency(predicted, instances)))


def mean_iou(predicted: Tensor, instances: Tensor) -> Tensor:
    """Mean IoU of each image, float64 `[batch]`: as `mean_best_overlap`, but each mask serves one object at most.

    Masks and objects are matched one to one by the largest sum of IoU. An object without a mask counts as 0; masks
    without an object do not count.

    Args:
        predicted, instances: as in `adjusted_rand_index`, with its errors.
    """
    return _matched(*_overlaps(contingency(predicted, instances)))


def _overlaps(counts: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of each object and mask, float64 `[batch, objects, masks]`, and which objects have pixels."""
    true, guess, shared = counts.sum(2)[:, 1:], counts.sum(1), counts[:, 1:]
    union = true.unsqueeze(2) + guess.unsqueeze(1) - shared
    return shared.double() / union.clamp(min=1), true > 0


def _best(overlap: Tensor, objects: Tensor) -> Tensor:
    return mean_present(overlap.amax(2), objects).masked_fill(~objects.any(1), torch.nan)


def _matched(overlap: Tensor, objects: Tensor) -> Tensor:
    chosen = hungarian(-overlap.mT, target_mask=objects).unsqueeze(2)
    matched = overlap.gather(2, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0).squeeze(2)
    return mean_present(matched, objects).masked_fill(~objects.any(1), torch.nan)


def segmentation_scores(predicted: Tensor, instances: Tensor) -> dict[str, Tensor]:
    """All scores of each image, float64 `[batch]`, in the order of `SCORES`.

    "ari" and "fg_ari": `adjusted_rand_index` of all pixels and of objects alone; "mbo": `mean_best_overlap`; "miou":
    `mean_iou`.

    Args:
        predicted, instances: as in `adjusted_rand_index`, with its errors.
    """
    counts = contingency(predicted, instances)
    overlaps = _overlaps(counts)
    scores = _rand(counts, False), _rand(counts, True), _best(*overlaps), _matched(*overlaps)
    return dict(zip(SCORES, scores, strict=True))


class Segmentation(MeanMetric):
    """Scores of the masks of predicted layers against instances: "ari", "fg_ari", "mbo" and "miou".

    Means over images of `adjusted_rand_index` of all pixels and of objects alone, `mean_best_overlap` and `mean_iou`;
    1 is perfect. Images without objects count in "ari" alone; without any other image the rest is NaN. Each pixel
    belongs to the layer of the largest mask (`setpred.nn.composite`), see `masks_to_labels`.

    `update(predicted, instances)` takes layers `[batch, n, 4 · T²]`, as of `setpred.decoders.SpatialBroadcast`, and
    integer instances `[batch, S, S]` with S >= T. For attention or supports, use the functions.
    """

    truth = "instances"  # the entry of the batch to compare with
    keys = tuple(SCORES)
    monitor, mode, higher_is_better = "fg_ari", "max", True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", default=torch.zeros(len(self.keys), dtype=torch.long), dist_reduce_fx="sum")

    def values(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        if target.ndim != 3 or target.shape[1] != target.shape[2]:
            raise ValueError(f"expected instances [batch, S, S], got {list(target.shape)}")
        return segmentation_scores(masks_to_labels(composite(predicted).masks, target.shape[1:]), target)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        values = self.values(predicted.detach(), target)
        rows = torch.stack([values[key] for key in self.keys])
        self.totals += rows.nansum(1)
        self.count += (~rows.isnan()).sum(1)  # of images with objects
