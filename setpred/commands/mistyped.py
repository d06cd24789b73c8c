"""Explain a mistyped option, key or class path in one line, with the nearest that exist."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from setpred.commands.parts import parameters
from setpred.errors import nearest, shown

# options of `setpred train` for keys that are changed often
SHORT = {
    "--epochs": "--trainer.max_epochs",
    "--batch_size": "--data.init_args.batch_size",
    "--lr": "--model.learning_rate",
    "--seed": "--seed_everything",
}
# names of other programs, by their last part, and the keys for the same
OTHERS = {
    **{name.lstrip("-"): key.lstrip("-") for name, key in SHORT.items()},
    **dict.fromkeys(("epoch", "num_epochs", "n_epochs"), "trainer.max_epochs"),
    **dict.fromkeys(("bs", "batch"), "data.init_args.batch_size"),
    **dict.fromkeys(("learning_rate", "rate"), "model.learning_rate"),
    **dict.fromkeys(("workers", "num_workers"), "data.init_args.num_workers"),
    **dict.fromkeys(("steps", "num_steps", "iters", "max_iters"), "trainer.max_steps"),
    **dict.fromkeys(("device", "cuda", "gpu", "cpu"), "trainer.accelerator"),
    **dict.fromkeys(("gpus", "num_gpus"), "trainer.devices"),
    **dict.fromkeys(("out", "output", "output_dir", "save_dir", "checkpoints"), "runs"),
    **dict.fromkeys(("clip", "grad_clip", "gradient_clip"), "trainer.gradient_clip_val"),
    **dict.fromkeys(("wd", "decay"), "model.weight_decay"),
    **dict.fromkeys(("pretrained", "weights", "checkpoint", "finetune"), "init"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "model.schedule"),
    **dict.fromkeys(("amp", "fp16", "half"), "trainer.precision"),
    **dict.fromkeys(("augmentation", "augmentations"), "data.init_args.augment"),
    **dict.fromkeys(("train", "train_data", "dataset"), "data"),
    **dict.fromkeys(("val_data", "valid", "validation"), "val"),
}
OURS = ("allow", "val", "help_all")  # options that the parser does not see
PART = re.compile(r"Problem with given class_path '([\w.]+)'")
KEY = re.compile(r'Parser key "([\w.]+)"')


def in_full(arguments: Sequence[str]) -> list[str]:
    """Arguments with the options of `SHORT` in full, and underscores for the hyphens of option names.

    >>> in_full(["--batch-size=8", "--lr", "1e-3", "--name", "my-run"])
    ['--data.init_args.batch_size=8', '--model.learning_rate', '1e-3', '--name', 'my-run']
    """
    found = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if re.fullmatch(r"--[a-z]+(-[a-z]+)*", option):  # not the keys of a user's own fields
            option = f"--{option[2:].replace('-', '_')}"
        found.append(SHORT.get(option, option) + equals + value)
    return found


def similar(key: str, keys: Sequence[str]) -> str:
    """The question "did you mean ...?" for a mistyped key such as `trainer.max_epoch`; empty where none is like it."""
    group, _, last = key.rpartition(".")
    if OTHERS.get(last, key) != key:
        return f"; did you mean --{OTHERS[last]}?"
    options = {each: f"--{each}" for each in keys}
    siblings = {each: option for each, option in options.items() if each.rpartition(".")[0] == group}
    by_last = {name: f"--{each}" for name, each in OTHERS.items()}
    by_last |= {each.rpartition(".")[2]: option for each, option in options.items()}
    return nearest(key, siblings) or nearest(key, options) or nearest(last, by_last)


def explained(message: str, keys: Sequence[str], classes: Mapping[str, Any]) -> str:
    """One line for a message of the parser.

    Args:
        keys: the options of the parser, without hyphens in front.
        classes: those that a configuration may name, by class path.
    """
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        option = found[1].partition("=")[0]
        if not option.startswith("-"):
            return f"expected options, got {shown(found[1])}; write --data {found[1]}, --config {found[1]} or the like"
        close = similar(option.lstrip("-"), [*keys, *OURS])
        return f"there is no option {option}{close or '; setpred train --help lists the options'}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        key = f"{found[1]}.{found[2].partition('.')[0]}"
        return f"there is no key {key}{similar(key, keys)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        if not (parts := PART.findall(message[: found.start()])):  # a key of the whole configuration
            return f"there is no key {found[1]}{similar(found[1], keys)}"
        path, name = parts[-1], found[1].partition(".")[0]
        if not isinstance(part := classes.get(path), type):  # a user's own class
            return f"{path} has no argument {name!r}"
        names = list(parameters(part))
        advice = nearest(name, names) or f"; it takes {', '.join(names) or 'none'}"
        return f"{path} has no argument {name!r}{advice}"
    where = ".".join(KEY.findall(message))
    if found := re.search(r"Multiple subclasses with name (\w+)\b", message):
        ours = sorted((path for path in classes if path.endswith(f".{found[1]}")), key=len)[:1]
        return f"{where}: several classes have the name {found[1]}; write {' '.join(ours) or 'the class path'}"
    if found := re.search(r"Expected a path but (\S+) either not|Expected a dot import path string: (\S+)", message):
        name, advice = found[1] or found[2], "; `setpred parts` lists those of setpred"
        return f"{where}: expected a class, got {shown(name)}{similar_class(name, classes) or advice}"
    kinds = dict.fromkeys(re.findall(r"Expected an? <class '([\w.]+)'>", message))
    kinds.pop("NoneType", None)
    given = re.findall(r"(?:Given value|Got value): (?:NestedArg\(.*val='(?=.*'\)))?(.*?)(?:'\))?$", message, re.M)
    if kinds and given:
        return f"{where}: expected {' or '.join(kinds)}, got {shown(given[-1])}"
    text = re.sub(r'^(?:Parser key "([\w.]+)"|argument (-\S+)):', lambda m: f"{m[2] or '--' + m[1]}:", message)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:260]} ... {text[-35:]}"


def similar_class(name: str, paths: Iterable[str]) -> str:
    """The question "did you mean ...?" for a mistyped class name or path."""
    # of equal names the shortest path comes last: it is the public one
    by_name = {path.rpartition(".")[2]: path for path in sorted(paths, key=len, reverse=True)}
    return nearest(name.rpartition(".")[2], by_name)
