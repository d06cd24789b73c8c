"""How good predicted sets are: average precision in two protocols, and what lies behind it."""

from setpred.metrics.attributes import attribute_report, match_by_position
from setpred.metrics.gathered import AveragePrecision
from setpred.metrics.precision import (
    THRESHOLDS,
    average_precision,
    average_precision_per_image,
    pairwise_distance,
    precision_recall,
    threshold_name,
)

__all__ = [
    "THRESHOLDS",
    "AveragePrecision",
    "attribute_report",
    "average_precision",
    "average_precision_per_image",
    "match_by_position",
    "pairwise_distance",
    "precision_recall",
    "threshold_name",
]
