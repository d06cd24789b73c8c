"""Write docs/api.md, the map of the public names, from the docstrings: `python docs/make_api.py`."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
HEAD = """# API

Every public name by room, with its arguments and the first line of its docstring. The docstring has the equation,
shapes, units, errors and source. `python docs/make_api.py` writes this page.
"""
MODULES = ("setpred", "setpred.schema", "setpred.model")
MODULES += ("setpred.encoders", "setpred.decoders", "setpred.aggregators", "setpred.inner", "setpred.losses")
MODULES += ("setpred.matching", "setpred.metrics", "setpred.sets", "setpred.nn")
MODULES += tuple(f"setpred.data.{name}" for name in ("datamodule", "dataset", "importing", "images", "clevr"))
MODULES += tuple(f"setpred.data.{name}" for name in ("clevr_with_masks", "hdf5", "hdf5_writer", "scenes", "streamed"))
MODULES += ("setpred.data.toy",)
MODULES += tuple(f"setpred.rendering.{name}" for name in ("renderer", "sampling", "scenes", "camera", "records"))
MODULES += ("setpred.training", "setpred.checkpoint", "setpred.evaluation", "setpred.visualise", "setpred.errors")


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """Names and objects that a module exports: its `__all__`, or the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        yield from ((name, getattr(module, name)) for name in module.__all__ if not name.startswith("_"))
        return
    for name, part in vars(module).items():
        own = getattr(part, "__module__", None) == module.__name__ and (inspect.isclass(part) or callable(part))
        if own and not name.startswith("_") and inspect.getdoc(part):
            yield name, part


def signature(part: Any) -> str:
    """Names and defaults of the arguments, without their types; nothing for what is not called."""
    if inspect.isclass(part) and part.__init__ in (nn.Module.__init__, ValueError.__init__):
        return ""  # of no arguments, and of any
    found = inspect.signature(part)
    plain = [each.replace(annotation=each.empty, default=short(each.default)) for each in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


def short(default: Any) -> Any:
    """A default that is readable in a signature."""
    if default is inspect.Parameter.empty or (len(repr(default)) <= 20 and not callable(default)):
        return default
    name = getattr(default, "__name__", "...")
    return type("Short", (), {"__repr__": lambda self: "..." if name == "<lambda>" else name})()


def line(name: str, part: Any, module: Any) -> str:
    """A link to the file, the arguments, and the first line of the docstring."""
    called = inspect.isclass(part) or inspect.isfunction(part)
    kind = inspect.unwrap(part) if called else type(part)
    own = kind.__module__.startswith("setpred")  # else an alias of types
    file = Path(inspect.getsourcefile(kind if own else module)).resolve().relative_to(ROOT)
    arguments = f"`{found}`" if called and (found := signature(part)) else ""
    summary = inspect.getdoc(kind).partition("\n")[0] if called else f"an object of the class `{kind.__name__}`."
    return f"- [`{name}`](../{file.as_posix()}){arguments}: {summary}"


def page() -> str:
    """The text of docs/api.md."""
    sections, listed = [HEAD], set()
    for path in MODULES:
        module = importlib.import_module(path)
        lines = []
        for name, part in public(module):
            if id(part) not in listed:  # by another room
                lines.append(line(name, part, module))
            listed.add(id(part))
        about = " ".join(inspect.getdoc(module).partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
        sections.append(f"## `{path}`\n\n{about}.\n\n" + "\n".join(lines) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page())
