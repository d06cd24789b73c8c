"""Metrics: average precision by distance and of boxes, segmentations, accuracies, errors and distances."""

from setpred.metrics.attributes import attribute_report, match_by_position
from setpred.metrics.average_precision import (
    THRESHOLDS,
    AveragePrecision,
    GatheredSets,
    average_precision,
    average_precision_per_image,
    pairwise_distance,
    precision_recall,
    threshold_name,
    true_positives,
)
from setpred.metrics.averages import AbsoluteError, Accuracy, Mean, MeanMetric
from setpred.metrics.box_precision import BoxAveragePrecision, box_average_precision, match_boxes
from setpred.metrics.calibration import CalibrationFit, fit_calibration, reliability, right_predictions
from setpred.metrics.coverage import Coverage
from setpred.metrics.energy_score import EnergyScore, SampledPrecision, energy_score
from setpred.metrics.numbering import NumberingAccuracy, right_numbers
from setpred.metrics.segmentation import (
    Segmentation,
    adjusted_rand_index,
    contingency,
    masks_to_labels,
    mean_best_overlap,
    mean_iou,
    segmentation_scores,
)
from setpred.metrics.set_distances import ClassWasserstein, SetDistances, symmetry_distances

__all__ = [
    "THRESHOLDS",
    "AbsoluteError",
    "Accuracy",
    "AveragePrecision",
    "BoxAveragePrecision",
    "CalibrationFit",
    "ClassWasserstein",
    "Coverage",
    "EnergyScore",
    "GatheredSets",
    "Mean",
    "MeanMetric",
    "NumberingAccuracy",
    "SampledPrecision",
    "Segmentation",
    "SetDistances",
    "adjusted_rand_index",
    "attribute_report",
    "average_precision",
    "average_precision_per_image",
    "box_average_precision",
    "contingency",
    "energy_score",
    "fit_calibration",
    "masks_to_labels",
    "match_boxes",
    "match_by_position",
    "mean_best_overlap",
    "mean_iou",
    "pairwise_distance",
    "precision_recall",
    "reliability",
    "right_numbers",
    "right_predictions",
    "segmentation_scores",
    "symmetry_distances",
    "threshold_name",
    "true_positives",
]
