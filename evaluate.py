"""Evaluate a checkpoint: `python evaluate.py --help`."""

import sys

from setpred.command import start
from setpred.evaluation import main

if __name__ == "__main__":
    sys.exit(start(main))
