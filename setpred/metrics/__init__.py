"""How good predicted sets are: average precision in two protocols, and what lies behind it."""

from setpred.metrics.attributes import attribute_report
from setpred.metrics.gathered import AveragePrecision
from setpred.metrics.precision import (
    THRESHOLDS,
    average_precision,
    average_precision_per_image,
    precision_recall,
    threshold_name,
)

__all__ = [
    "THRESHOLDS",
    "AveragePrecision",
    "attribute_report",
    "average_precision",
    "average_precision_per_image",
    "precision_recall",
    "threshold_name",
]
