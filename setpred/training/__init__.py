"""One training run: the LightningModule, its callbacks and schedules, checkpoints and processes."""

from setpred.training.ema import EMA
from setpred.training.faset import FASet
from setpred.training.schedules import Constant, Schedule, StepDecay, WarmupCosine
from setpred.training.task import SetPrediction

__all__ = ["EMA", "Constant", "FASet", "Schedule", "SetPrediction", "StepDecay", "WarmupCosine"]
