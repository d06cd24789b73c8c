"""Evaluate a checkpoint: `python evaluate.py --help`."""

import sys

from setpred.commands.common import start
from setpred.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(start(main))
