"""Figures of predictions, refinement and errors (`write_report`), of segmentations, and of training runs."""

from setpred.visualise.confusion import draw_confusion
from setpred.visualise.curves import draw_precision_recall
from setpred.visualise.distances import draw_distance_errors
from setpred.visualise.marks import Case, draw_marks, has_marks
from setpred.visualise.page import write_page
from setpred.visualise.predictions import draw_outlined_image, draw_predictions, worst_first
from setpred.visualise.refinement import Descent, draw_refinement_film, draw_refinement_strip
from setpred.visualise.reliability import draw_reliability
from setpred.visualise.report import write_report, write_scores
from setpred.visualise.segmentation import SegmentedImage, draw_segmentation, draw_segmentation_refinement
from setpred.visualise.supports import Voting, draw_supports
from setpred.visualise.training_curves import draw_own_training, draw_training_curves

__all__ = [
    "Case",
    "Descent",
    "SegmentedImage",
    "Voting",
    "draw_confusion",
    "draw_distance_errors",
    "draw_marks",
    "draw_outlined_image",
    "draw_own_training",
    "draw_precision_recall",
    "draw_predictions",
    "draw_refinement_film",
    "draw_refinement_strip",
    "draw_reliability",
    "draw_segmentation",
    "draw_segmentation_refinement",
    "draw_supports",
    "draw_training_curves",
    "has_marks",
    "worst_first",
    "write_page",
    "write_report",
    "write_scores",
]
