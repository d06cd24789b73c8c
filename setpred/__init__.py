"""setpred: from an image to the unordered set of objects in it."""

from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema

__version__ = "0.1.0"

__all__ = ["CLEVR", "ElementSchema", "InputError", "__version__"]
