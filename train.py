"""Train a set predictor: `python train.py --help`."""

import sys

from setpred.commands.common import start
from setpred.commands.train import main

if __name__ == "__main__":
    sys.exit(start(main))
