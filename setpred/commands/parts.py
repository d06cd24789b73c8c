"""`setpred parts`: list the parts that a configuration can name, or describe one."""

import inspect
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from setpred import aggregators, decoders, encoders, inner, losses, metrics, training
from setpred.checkpoint.allowlist import imported
from setpred.commands.common import Parser, exit_code
from setpred.data import toy
from setpred.errors import InputError, nearest

DATA = ("datamodule.SetDataModule", "datamodule.RenderedScenes", "streamed.StreamedScenes")  # of setpred.data
FILLED = ("set_size", "set_dim", "image_size")  # arguments that the command line takes from the data
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Group(NamedTuple):
    """Parts of one kind.

    Args:
        name: heading of the list.
        key: where a configuration names one.
        package: the package that exports them; or their paths in `setpred.data`, which exports nothing.
        has: whether a class is one of them; the first group that has a class lists it.
    """

    name: str
    key: str
    package: Any
    has: Callable[[type], bool] = lambda part: True


def _in(*modules: str) -> Callable[[type], bool]:
    """Whether a class is defined in one of these modules of its package."""
    return lambda part: part.__module__.rpartition(".")[2] in modules


DECODER = "model.decoder.init_args"
GROUPS = (
    Group("trunks", "model.encoder.init_args.trunk", encoders, lambda part: part.__name__.endswith("Trunk")),
    Group("positions", "model.encoder.init_args.positions", encoders, _in("positions")),
    Group("encoders", "model.encoder", encoders),
    Group("decoders", "model.decoder", decoders, lambda part: hasattr(part, "refine")),
    Group("starts", f"{DECODER}.start", decoders, _in("starts")),
    Group("attention", f"{DECODER}.attention", decoders),
    Group("descents", f"{DECODER}.descent", inner, _in("descent")),
    Group("projections", f"{DECODER}.descent.init_args.projection", inner, _in("projections")),
    Group("differentiation", f"{DECODER}.differentiation", inner, _in("differentiation")),
    Group("solvers", f"{DECODER}.differentiation.init_args.solver", inner, _in("linear_solvers")),
    Group("objectives", f"{DECODER}.objective", inner),
    Group("aggregators", "model.encoder.init_args.aggregator", aggregators),
    Group("losses", "model.loss", losses),
    Group("metrics", "model.metric", metrics),
    Group("schedules", "model.schedule", training, _in("schedules")),
    Group("callbacks", "trainer.callbacks", training),
    Group("data", "data", DATA),
    Group("augmentation", "data.init_args.augment", ("augmentation.Augmentation",)),
    Group("toy", "data", toy),
)
UNLISTED = ("Examples", "Mean", "Problem", "SetDecoder", "SetPrediction")  # no part of a configuration by themselves


@cache
def parts() -> Mapping[str, tuple[Group, dict[str, type]]]:
    """The parts of each group, by the group's name and their own public path."""
    return {group.name: (group, dict(_members(group))) for group in GROUPS}


def _members(group: Group) -> Iterator[tuple[str, type]]:
    if isinstance(group.package, tuple):
        yield from imported(f"setpred.data.{path}" for path in group.package).items()
        return
    for name in group.package.__all__:
        part = getattr(group.package, name)
        if not isinstance(part, type) or issubclass(part, tuple) or inspect.isabstract(part) or name in UNLISTED:
            continue  # functions, results, base classes
        if "base class" in summary(part).lower():
            continue
        if next(other for other in GROUPS if other.package is group.package and other.has(part)) is group:
            yield f"{group.package.__name__}.{name}", part


def summary(part: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(part) or "").partition("\n")[0]


def parameters(part: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class, with those that it passes on to its base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in part.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        passed = [each for each in own if each.kind is each.VAR_KEYWORD]
        found |= {each.name: each for each in own if each not in passed and each.name not in found}
        if not passed:
            break
    return {name: each for name, each in found.items() if each.kind is not each.VAR_POSITIONAL}


def listing(names: Sequence[str], width: int | None = None) -> str:
    """One line for each part of these groups.

    Args:
        width: of the lines, which are cut; None leaves them in full.
    """
    lines = []
    for name in names:
        group, members = parts()[name]
        lines += ["", f"{name} ({group.key})"]
        for path, part in members.items():
            line = f"  {path.rpartition('.')[2]:32} {summary(part)}"
            lines.append(line if width is None or len(line) <= width else f"{line[: width - 1]}…")
    return "\n".join(lines[1:])


def description(path: str, part: type, group: Group) -> str:
    """Docstring, arguments with defaults, and YAML that names a part."""
    lines = [path, "", inspect.getdoc(part) or "", "", "arguments:"]
    for name, each in parameters(part).items():
        kind = each.annotation if isinstance(each.annotation, str) else inspect.formatannotation(each.annotation)
        kind = "" if each.annotation is each.empty else f": {kind.replace('torch.nn.modules.module.', 'nn.')}"
        filled = "from the data" if name in FILLED else "required"
        lines.append(f"  {name}{kind}" + (f" ({filled})" if each.default is each.empty else f" = {each.default!r}"))
    if len(lines) == 5:
        lines.append("  none")
    example, source = snippet(path, part, group)
    return "\n".join([*lines, "", f"in a configuration{source}:", "", example.rstrip()])


def snippet(path: str, part: type, group: Group) -> tuple[str, str]:
    """YAML that uses a part, and the configuration it is from; without one, `...` is what the user has to fill in."""
    for file in sorted(CONFIGS.rglob("*.yaml"), key=lambda file: (len(file.parts), file.name)):
        text = file.read_text()
        if path in text and (found := _use(_content(text), path)):
            return _as_yaml(*found), f", as in configs/{file.relative_to(CONFIGS)}"
    lacking = [name for name, each in parameters(part).items() if each.default is each.empty and name not in FILLED]
    use = {"class_path": path} | ({"init_args": dict.fromkeys(lacking, ...)} if lacking else {})
    return _as_yaml(group.key, use), ""


@cache
def _content(text: str) -> Any:
    return yaml.safe_load(text)


def _use(value: Any, path: str, key: str = "") -> tuple[str, dict[str, Any]] | None:
    """Key and content of the first place of a configuration with a class path."""
    if isinstance(value, dict):
        if value.get("class_path") == path:
            return key, value
        for name, each in value.items():
            if found := _use(each, path, f"{key}.{name}".lstrip(".")):
                return found
    for each in value if isinstance(value, list) else ():
        if found := _use(each, path, key):
            return found
    return None


def _as_yaml(key: str, use: dict[str, Any]) -> str:
    nested: Any = use
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return yaml.dump(nested, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


class _Dumper(yaml.SafeDumper):
    """Plain YAML without aliases; `...` stays as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(type(...), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:str", "..."))


def found_part(name: str) -> tuple[str, type, Group]:
    """The part of a name or class path, in any case; raise `InputError` if there is none, with the nearest names."""
    known = {path: (path, part, group) for group, members in parts().values() for path, part in members.items()}
    for path, each in known.items():
        if name.lower() in (path.lower(), path.rpartition(".")[2].lower()):
            return each
    close = nearest(name.rpartition(".")[2], [path.rpartition(".")[2] for path in known] + list(parts()))
    raise InputError(f"expected a part or a group of parts, got {name!r}{close or '; `setpred parts` lists them'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `setpred parts`; return the exit status."""
    parser = Parser("parts", "List the parts that a configuration can name, or describe one of them.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a part, such as FSPool, or a group, such as losses")

    def run() -> None:
        name = parser.parse_args(arguments).name
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        if name is None:
            print(listing(list(parts()), width))
            print("\nsetpred parts NAME describes one: its arguments, and the lines of a configuration that use it.")
        elif name in parts():
            print(listing([name], width))
        else:
            print(description(*found_part(name)))

    return exit_code(run)
