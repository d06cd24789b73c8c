"""Results of `make bench`: docs/benchmarks.md, a table for people, and docs/benchmarks.json for machines.

A run replaces only the generated parts of benchmarks.md, between marks such as `<!-- table -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from benchmarks import growth
from benchmarks.tables import markdown, number
from benchmarks.topics import EXTRAS, TOPICS
from setpred.errors import InputError
from setpred.files import write_atomically
from setpred.training.mixed_precision import NATIVE, cpu_capabilities, cpu_has_bfloat16, processor

PAGE, RECORD = "benchmarks.md", "benchmarks.json"
PARTS = ("machine", "table", *EXTRAS)
EMPTY_PAGE = "# Benchmarks\n" + "".join(f"\n<!-- {part} -->\n<!-- /{part} -->\n" for part in PARTS)
TITLES = ("", "plain, ms", "ours, ms", "ratio", "±", "floor, ms", "ours / floor", "")


def machine() -> dict[str, Any]:
    """Properties that the results depend on: processor, cores, threads, relevant instructions, GPU."""
    has = cpu_capabilities()
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx2": bool(has.get("avx2")),
        "avx512": bool(has.get("avx512_f")),
        "bfloat16": any(has.get(name) for name in NATIVE),
        "amx": bool(has.get("amx_bf16")),
        "encoder_trains_in": "bfloat16" if cpu_has_bfloat16() else "float32",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }


def described(run: Mapping[str, Any]) -> str:
    """Machine and versions as a sentence."""
    found = run["machine"]
    sets = {"avx2": "AVX2", "avx512": "AVX-512", "bfloat16": "bfloat16 instructions", "amx": "AMX"}
    parts = [
        found["processor"],
        f"{found['cores']} core{'' if found['cores'] == 1 else 's'}",
        f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}",
        *(name if found[key] else f"no {name}" for key, name in sets.items() if key in found),  # older files have fewer
        *(f"the encoder trains in {found[key]}" for key in ("encoder_trains_in",) if key in found),
        found["gpu"] or "no GPU",
        *(f"{name} {version}" for name, version in run["versions"].items()),
    ]
    return "; ".join(parts) + "."


def above_floor(row: Mapping[str, Any]) -> float | None:
    """Time of ours over the floor."""
    return row["ours_ms"] / row["floor_ms"] if row["floor_ms"] else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows, grouped by topic; the head of each group has its command."""
    lines: list[list[str]] = []
    for topic in dict.fromkeys(row["topic"] for row in rows):
        lines.append([f"**{topic.replace('_', ' ')}**", *[""] * 6, f"`python -m benchmarks.{topic}`"])
        for row in rows:
            if row["topic"] == topic:
                figures = (number(row[name]) for name in ("plain_ms", "ours_ms"))
                ratio, spread = f"{row['ratio']:.2f}", f"{row['spread']:.2f}"
                floor = number(row["floor_ms"]), number(above_floor(row))
                lines.append([row["name"], *figures, ratio, spread, *floor, row["note"]])
    return markdown(TITLES, lines, numbers=range(1, 7))


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Replace the parts of `text` between their marks.

    Raises:
        InputError: marks that are missing, repeated or out of order.
    """
    for name, content in parts.items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        if [text.count(mark) for mark in (first, last)] != [1, 1] or text.index(first) > text.index(last):
            raise InputError(
                f"expected {first} and, below it, {last} once each in {PAGE}; add them where the {name} belongs"
            )
        before, _, rest = text.partition(first)
        after = rest.partition(last)[2]
        text = "\n".join([before + first, *content.strip().splitlines(), last + after])
    return text


def of_gpu(row: Mapping[str, Any]) -> bool:
    return row["key"].endswith("_gpu")


class Report:
    """The results in a folder, to which a run adds its own.

    Args:
        folder: folder of benchmarks.md and benchmarks.json. Results of other topics, of a GPU on a machine without one,
            and text written by hand are kept.
        afresh: whether all topics will be measured; results of another machine are then dropped.

    Raises:
        InputError: results of another machine that would stay next to those of this one; missing marks in
            benchmarks.md.
    """

    def __init__(self, folder: Path, *, afresh: bool) -> None:
        self.folder = folder
        run = {"machine": machine(), "versions": versions()}
        record = folder / RECORD
        old = json.loads(record.read_text()) if record.exists() else {}
        if old and not afresh and any(old[name] != run[name] for name in run):
            raise InputError(
                f"the results in {record} are from another machine, or other versions or threads: "
                f"{described(old)} Measure all topics, or pass another folder with --out"
            )
        if afresh:
            kept = [] if run["machine"]["gpu"] else [row for row in old.get("rows", []) if of_gpu(row)]
            elsewhere = {"gpu_run": old.get("gpu_run") or {name: old[name] for name in run}} if kept else {}
            old = {"rows": kept} | elsewhere
        self.content: dict[str, Any] = run | {"ratios": {}, "rows": []} | old | run
        self.page()  # raises its errors before an hour of measuring

    def add(self, topic: str, found: Any) -> None:
        """Replace the results of a topic."""
        if topic in EXTRAS:
            self.content[topic] = found
            return
        stays = self.content["machine"]["gpu"] is None
        kept = [row for row in self.content["rows"] if row["topic"] != topic or (stays and of_gpu(row))]
        self._set_rows(kept + [{"topic": topic} | row.as_dict() for row in found])

    def add_gpu(self, path: Path) -> None:
        """Replace the rows of a GPU by those of another machine's benchmarks.json."""
        other = json.loads(path.read_text())
        new = [row for row in other["rows"] if of_gpu(row)]
        if not new:
            raise InputError(f"expected rows measured on a GPU in {path}, got none; measure on a machine with a GPU")
        self._set_rows([row for row in self.content["rows"] if not of_gpu(row)] + new)
        self.content["gpu_run"] = other.get("gpu_run") or {name: other[name] for name in ("machine", "versions")}

    def _set_rows(self, rows: list[dict[str, Any]]) -> None:
        place = {topic: number for number, topic in enumerate(TOPICS)}
        self.content["rows"] = sorted(rows, key=lambda row: (place.get(row["topic"], len(place)), of_gpu(row)))
        self.content["ratios"] = {row["key"]: row["ratio"] for row in self.content["rows"]}
        above = {row["key"]: above_floor(row) for row in self.content["rows"]}
        self.content["above_floor"] = {key: value for key, value in above.items() if value is not None}

    def page(self) -> str:
        """The text of benchmarks.md."""
        path = self.folder / PAGE
        parts = {"machine": described(self.content), "table": table(self.content["rows"])}
        if "gpu_run" in self.content:
            parts["machine"] += "\n\nRows of a GPU: " + described(self.content["gpu_run"])
        for name, module in EXTRAS.items():
            parts[name] = module.markdown(self.content[name]) if name in self.content else ""
        return filled(path.read_text() if path.exists() else EMPTY_PAGE, parts)

    def write(self) -> None:
        """Write both files and the plot, each atomically."""
        page = self.page()
        if "growth" in self.content:
            growth.draw(self.folder / growth.PICTURE, self.content["growth"])
        write_atomically(self.folder / RECORD, json.dumps(self.content, indent=1) + "\n")
        write_atomically(self.folder / PAGE, page)
