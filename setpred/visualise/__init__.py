"""Figures that show what a model predicts, how it got there and where it errs; `write_report` draws them all."""

from setpred.visualise.confusion import draw_confusion
from setpred.visualise.curves import draw_precision_recall
from setpred.visualise.distances import draw_distance_errors
from setpred.visualise.predictions import draw_predictions
from setpred.visualise.refinement import Descent, draw_refinement_film, draw_refinement_strip
from setpred.visualise.report import write_report

__all__ = [
    "Descent",
    "draw_confusion",
    "draw_distance_errors",
    "draw_precision_recall",
    "draw_predictions",
    "draw_refinement_film",
    "draw_refinement_strip",
    "write_report",
]
