"""Configurations trained under the same budget, side by side: `python -m setpred.compare --help`."""
