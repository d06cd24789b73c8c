"""The command `setpred`, also `python -m setpred`: `setpred COMMAND --help` describes a command."""

import importlib
import os
import sys

from setpred.commands.common import start
from setpred.errors import nearest

COMMANDS = {
    "train": "train a set predictor",
    "evaluate": "score a checkpoint by average precision and draw its predictions",
    "predict": "predict the objects of images",
    "data": "import, prepare, render, verify and describe data",
    "parts": "list and describe encoders, decoders, losses and other parts",
    "compare": "train models under one budget and rank them",
    "release": "turn a checkpoint into one file to publish, or export it",
    "gradients": "measure the gradients of a model's inner problem",
    "replay": "repeat a training step with non-finite numbers",
}


def main() -> int:
    """Run the command that `sys.argv` names; return its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: setpred COMMAND [options]\n")
        print("\n".join(f"  {command:10} {about}" for command, about in COMMANDS.items()))
        print("\nsetpred COMMAND --help lists the options of a command.")
        return 0
    if name.startswith("-") and "LOCAL_RANK" in os.environ:  # of several processes, Lightning has no word of a command
        sys.argv.insert(1, name := "train")
    if name not in COMMANDS:
        close = nearest(name, list(COMMANDS))
        print(f"error: expected a command, one of {', '.join(COMMANDS)}, got {name!r}{close}", file=sys.stderr)
        return 2
    del sys.argv[1]
    return importlib.import_module(f"setpred.commands.{name}").main()


def run() -> int:
    """Run the console command."""
    return start(main)


if __name__ == "__main__":
    sys.exit(run())
