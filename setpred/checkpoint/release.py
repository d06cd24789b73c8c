"""Turn a checkpoint into a release."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from setpred.checkpoint.load import KEY, load_checkpoint, read_checkpoint
from setpred.checkpoint.untrusted import read_yaml
from setpred.checkpoint.weights import SUFFIX, pack
from setpred.errors import InputError
from setpred.files import write_atomically

MEGABYTES = 20.0  # the largest release, unless told otherwise
BESIDE = "config.yaml"  # what train.py writes into the folder of its checkpoints


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    megabytes: float = MEGABYTES,
    allow: Iterable[str] = (),
) -> list[Path]:
    """Writes the weights of a checkpoint in half precision, and the configuration of its training beside them.

    The file is read wherever a .ckpt is, but cannot be resumed: the optimiser's state is left out. Paths of this
    machine are left out too, see `portable`.

    Args:
        checkpoint: a .ckpt of train.py; the `config.yaml` in its folder, if any, becomes NAME.yaml.
        out: NAME.safetensors.
        megabytes: the largest file to write, in 10⁶ bytes.
        allow: class paths of your own parts that may be built.

    Returns:
        What was written.

    Raises:
        InputError: see `load_checkpoint`; a name of another ending, a file too large, a disk that does not take it, a
            NAME.yaml of somebody else's. Only where NAME.yaml cannot be written, something has been.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out}: expected a name that ends in {SUFFIX}")
    load_checkpoint(checkpoint, allow=allow)  # what cannot be loaded is not published
    content = read_checkpoint(checkpoint)
    record = {name: content[name] for name in (KEY, "epoch", "global_step")}
    packed = pack(content["state_dict"], portable(record))
    if len(packed) > 1e6 * megabytes:
        raise InputError(
            f"{out} would have {len(packed) / 1e6:.1f} MB, expected at most {megabytes:g} MB; take a smaller model, or "
            "allow more with --megabytes"
        )
    configuration = _configuration(Path(checkpoint).parent / BESIDE)
    beside, title = out.with_suffix(".yaml"), f"# What {out.name} was trained with.\n"
    if configuration is not None and os.path.lexists(beside) and not _begins(beside, title):
        raise InputError(f"{beside} is not of an earlier release and would be overwritten; choose another --out")
    written = [out]
    write_atomically(out, packed)
    if configuration is not None:
        written.append(beside)
        with after_writing([out]):
            write_atomically(beside, title + configuration)
    return written


def _begins(path: Path, title: str) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(title.encode())) == title.encode()
    except OSError:  # a folder, or not for us to read
        return False


@contextmanager
def after_writing(written: Sequence[Path]) -> Iterator[None]:
    """An error of the block says what had been written before."""
    try:
        yield
    except InputError as error:
        raise InputError("; ".join([str(error), *(f"{path} was written" for path in written)])) from error


def portable(value: Any) -> Any:
    """Plain types with the paths of this machine cut: relative to the working folder, or else the last name alone.

    >>> portable({"folder": "/home/me/data", "runs": "checkpoints", "rate": 0.1})
    {'folder': 'data', 'runs': 'checkpoints', 'rate': 0.1}
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path, here = Path(value), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def _configuration(path: Path) -> str | None:
    """The configuration of a run as YAML, portable; None where there is none."""
    if not path.is_file():
        return None
    try:
        return yaml.safe_dump(portable(read_yaml(path)), sort_keys=False)
    except (InputError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not a configuration ({error}); move it away, or mend it") from error
