"""Slow and obvious twins: the same result as the fast code, in loops that cannot hide a mistake."""

import itertools
import math

# --- average precision --------------------------------------------------------------------------------------


def average_precision_twin(predicted, target, thresholds, schema):
    """`average_precision` in loops over Python floats."""
    objects = sum(len(_real_objects(elements, schema)) for elements in target)
    ranked = [(float(row[-1]), image, _described(row, schema)) for image, rows in enumerate(predicted) for row in rows]
    ranked.sort(key=lambda prediction: -prediction[0])  # stable
    scores = {}
    for threshold in thresholds:
        claimed = set()
        hits = []
        for _, image, mine in ranked:
            candidates = []
            for index, theirs in _real_objects(target[image], schema):
                if theirs[0] == mine[0]:
                    candidates.append((_distance_between(mine, theirs), index))
            hit = False
            if candidates:
                distance, index = min(candidates)
                hit = distance < threshold and (image, index) not in claimed
                if hit:
                    claimed.add((image, index))
            hits.append(hit)
        scores[threshold] = math.fsum(_precisions_ahead(hits)) / objects if objects else math.nan
    return scores


def average_precision_per_image_twin(predicted, target, thresholds, schema):
    """`average_precision_per_image` in loops over Python floats."""
    scores = {}
    for threshold in thresholds:
        parts = []
        images = 0
        for rows, elements in zip(predicted, target, strict=True):
            left = _real_objects(elements, schema)
            objects = len(left)
            if not objects:
                continue
            images += 1
            hits = []
            for row in sorted(rows, key=lambda row: -float(row[-1])):
                mine = _described(row, schema)
                candidates = [(_distance_between(mine, o[1]), o[0], o) for o in left if o[1][0] == mine[0]]
                candidates = [candidate for candidate in candidates if math.isfinite(candidate[0])]
                if candidates:
                    distance, _, taken = min(candidates, key=lambda candidate: candidate[:2])
                    left.remove(taken)
                    hits.append(distance < threshold)
                else:
                    hits.append(False)
            parts += [precision / objects for precision in _precisions_ahead(hits)]
        scores[threshold] = math.fsum(parts) / images if images else math.nan
    return scores


def _real_objects(elements, schema):
    return [(index, _described(row, schema)) for index, row in enumerate(elements) if row[-1] > 0.5]


def _described(row, schema):
    """(classes, real numbers in their units) of one element."""
    classes, numbers, start = [], [], 0
    for field in schema.fields:
        values = [float(value) for value in row[start : start + field.size]]
        start += field.size
        if field.categorical:
            classes.append(values.index(max(values)))
        else:
            numbers += [value * field.scale for value in values]
    return classes, numbers


def _distance_between(mine, theirs):
    squared = 0.0
    for a, b in zip(mine[1], theirs[1], strict=True):
        squared += (a - b) * (a - b)
    return math.sqrt(squared)


def _precisions_ahead(hits):
    """For each hit, the best precision reached at it or later: the height of the curve over its step of recall."""
    precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    return [max(precisions[i:]) for i, hit in enumerate(hits) if hit]


# --- boxes --------------------------------------------------------------------------------------------------


def box_average_precision_twin(predicted, target, schema):
    """AP, AP50, AP75, AR1, AR10 and AR100 of `box_average_precision`, one class, threshold and image after another."""
    overlaps = [0.5 + 0.05 * step for step in range(10)]
    classes = {_described(row, schema)[0][0] for rows in target for row in rows if row[-1] > 0.5}
    table, recalls = [], {1: [], 10: [], 100: []}
    for kind in classes:
        row = []
        for overlap in overlaps:
            for most in recalls:
                hits, boxes = _box_hits(predicted, target, schema, kind, overlap, most)
                recalls[most].append(sum(hits) / boxes)
            precisions, precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))], []
            for step in range(101):
                reached = [i for i in range(len(hits)) if sum(hits[: i + 1]) / boxes >= step * 0.01]
                precision.append(max(precisions[reached[0] :]) if reached else 0.0)
            row.append(sum(precision) / 101)
        table.append(row)
    if not table:
        return [math.nan] * 6
    aps = [sum(sum(row) for row in table) / (10 * len(table))]
    aps += [sum(row[place] for row in table) / len(table) for place in (0, 5)]
    return aps + [sum(found) / len(found) for found in recalls.values()]


def _box_hits(predicted, target, schema, kind, overlap, most):
    """Whether each ranked prediction of a class is right, and how many boxes the class has."""
    ranked, boxes = [], 0
    for rows, real in zip(predicted, target, strict=True):
        mine = sorted((row for row in rows if _described(row, schema)[0][0] == kind), key=lambda row: -row[-1])
        free = [row for row in real if row[-1] > 0.5 and _described(row, schema)[0][0] == kind]
        boxes += len(free)
        for row in mine[:most]:
            best = max((_overlap(row, box, schema) for box in free), default=0.0)
            hit = best >= min(overlap, 1 - 1e-10)
            if hit:
                free.remove(next(box for box in reversed(free) if _overlap(row, box, schema) == best))
            ranked.append((-row[-1], hit))
    ranked.sort(key=lambda pair: pair[0])  # stable
    return [hit for _, hit in ranked], boxes


def _overlap(row, box, schema):
    """Intersection over union of two boxes, from their centres and sides."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = (_described(each, schema)[1] for each in (row, box))
    width = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
    height = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (aw * ah + bw * bh - shared)


# --- segmentations ------------------------------------------------------------------------------------------


def adjusted_rand_twin(predicted, instances, foreground):
    """ARI of one image by looking at every pair of its pixels; the formula of scikit-learn."""
    kept = [(t, p) for t, p in _pixels(predicted, instances) if t > 0 or not foreground]
    together = {(a, b): 0 for a in (True, False) for b in (True, False)}  # in the truth, in the prediction
    for i, (t, p) in enumerate(kept):
        for other_t, other_p in kept[:i]:
            together[t == other_t, p == other_p] += 1
    tp, fn, fp, tn = (together[key] for key in [(True, True), (True, False), (False, True), (False, False)])
    if not kept:
        return math.nan
    if fn == fp == 0:
        return 1.0
    return 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))


def mean_best_overlap_twin(predicted, instances):
    """mBO of one image, from sets of pixels."""
    objects, masks = _regions(predicted, instances)
    return _mean([max(len(t & p) / len(t | p) for p in masks) for t in objects])


def mean_iou_twin(predicted, instances):
    """Mean IoU of one image, by trying every matching."""
    objects, masks = _regions(predicted, instances)
    masks += [set()] * len(objects)  # no mask
    matchings = itertools.permutations(masks, len(objects))
    return max(_mean([len(t & p) / len(t | p) for t, p in zip(objects, m, strict=True)]) for m in matchings)


def _pixels(predicted, instances):
    return list(zip(instances.flatten().tolist(), predicted.flatten().tolist(), strict=True))


def _regions(predicted, instances):
    """Sets of pixels of each object and of each mask."""
    true, guess = zip(*_pixels(predicted, instances), strict=True)
    objects = [{place for place, t in enumerate(true) if t == label} for label in sorted(set(true) - {0})]
    return objects, [{place for place, p in enumerate(guess) if p == label} for label in sorted(set(guess))]


def _mean(values):
    return sum(values) / len(values) if values else math.nan
