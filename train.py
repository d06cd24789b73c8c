"""Train a set predictor: `python train.py --help`."""

import sys

from setpred.cli import main
from setpred.command import start

if __name__ == "__main__":
    sys.exit(start(main))
