"""Files of models: load them without running their code, release and export them."""

from setpred.checkpoint.allowlist import allowed_classes
from setpred.checkpoint.describe import save_model
from setpred.checkpoint.load import Checkpoint, build, load_checkpoint, read_checkpoint, save_checkpoint
from setpred.checkpoint.release import export

__all__ = [
    "Checkpoint",
    "allowed_classes",
    "build",
    "export",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "save_model",
]
