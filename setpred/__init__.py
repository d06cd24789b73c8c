"""setpred: from an image to the unordered set of objects in it."""

import importlib.util
import os

from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema

# Notebooks hand their drawing backend on to the programs they start, in whose environment it may be missing
_module = os.environ.get("MPLBACKEND", "").partition("module://")[2].partition(".")[0]
if _module and importlib.util.find_spec(_module) is None:
    os.environ["MPLBACKEND"] = "agg"

__version__ = "0.1.0"

__all__ = ["CLEVR", "ElementSchema", "InputError", "__version__"]
