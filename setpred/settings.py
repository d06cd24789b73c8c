"""Settings of a run as plain types, and what differs between two runs."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """A jsonargparse namespace as dictionaries and lists; a schema too, functions and classes as import paths."""
    for as_dict in ("as_dict", "to_dict"):  # of a namespace, of a schema
        if hasattr(value, as_dict) and not isinstance(value, type):
            value = getattr(value, as_dict)()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__qualname__"):  # as jsonargparse leaves a default that is one
        return f"{value.__module__}.{value.__qualname__}"
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two plain configurations differ, as "key: old against new"; an option newer than old is off if False."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in dict.fromkeys([*old, *new]) if key in old or new[key] is not False]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} in the checkpoint against {new}"]


def without(config: Any, key: str) -> Any:
    """A plain configuration without this key anywhere: one that changes how fast a model is, not what it is."""
    if isinstance(config, dict):
        return {name: without(value, key) for name, value in config.items() if name != key}
    return [without(item, key) for item in config] if isinstance(config, list) else config
