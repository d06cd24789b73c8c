"""`python -m setpred.data`: the same as `setpred data`."""

import sys

from setpred.commands.common import start
from setpred.commands.data import main

if __name__ == "__main__":
    sys.exit(start(main))
