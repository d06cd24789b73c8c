"""Slow and obvious twins: the same result as the fast code, in loops that cannot hide a mistake."""

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
