"""Train a set predictor: `python train.py --help`."""

import sys

from setpred.cli import main

if __name__ == "__main__":
    sys.exit(main())
