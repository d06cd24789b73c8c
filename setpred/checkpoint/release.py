"""Turn a checkpoint into a release."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from setpred.checkpoint.load import KEY, load_checkpoint, read_checkpoint
from setpred.checkpoint.untrusted import read_yaml
from setpred.checkpoint.weights import SUFFIX, pack
from setpred.errors import InputError
from setpred.files import write_atomically

MEGABYTES = 20.0  # largest release by default
CONFIG = "config.yaml"  # the configuration that `setpred train` writes into a run's folder


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    megabytes: float = MEGABYTES,
    allow: Iterable[str] = (),
) -> list[Path]:
    """Write the weights of a checkpoint in half precision, and the configuration of its training.

    All commands read the file as they read a .ckpt, but it cannot be resumed: it has no optimiser state. It has no
    paths of this machine either, see `portable`.

    Args:
        checkpoint: a .ckpt of `setpred train`; the `config.yaml` in its folder, if any, becomes NAME.yaml.
        out: NAME.safetensors.
        megabytes: the largest file to write, in 10⁶ bytes.
        allow: class paths of your own parts that may be built.

    Returns:
        The written files.

    Raises:
        InputError: see `load_checkpoint`; another suffix, a file too large, a NAME.yaml that is no part of a release,
            a write error.
    """
    out = Path(out)
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out}: expected a name that ends in {SUFFIX}")
    content = read_checkpoint(checkpoint)
    load_checkpoint(checkpoint, allow=allow, content=content)  # checks that it can be loaded
    packed = pack(content["state_dict"], portable({name: content[name] for name in (KEY, "epoch", "global_step")}))
    if len(packed) > 1e6 * megabytes:
        raise InputError(
            f"{out} would have {len(packed) / 1e6:.1f} MB, expected at most {megabytes:g} MB; take a smaller model, or "
            "allow more with --megabytes"
        )
    source, sidecar, written = Path(checkpoint).parent / CONFIG, out.with_suffix(".yaml"), {out: packed}
    if source.is_file():
        title = f"# What {out.name} was trained with.\n"
        if sidecar.is_file() and not sidecar.read_text(errors="replace").startswith(title):
            raise InputError(f"{sidecar} is not of an earlier release and would be overwritten; choose another --out")
        written[sidecar] = title + yaml.safe_dump(portable(read_yaml(source)), sort_keys=False)
    for path, text in written.items():
        write_atomically(path, text)
    return list(written)


def portable(value: Any) -> Any:
    """Shorten the absolute paths within plain types: relative to the working folder, or to the last name.

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
