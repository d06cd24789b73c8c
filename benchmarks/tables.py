"""Markdown tables that are readable in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def number(value: float | None) -> str:
    """Format with three significant digits, and all digits before the point.

    >>> [number(value) for value in (1234.5, 99.96, 41.27, 0.01234, None)]
    ['1,234', '100', '41.3', '0.0123', '']
    """
    if value is None:
        return ""
    rounded = float(f"{value:.3g}")
    return f"{value:,.0f}" if abs(rounded) >= 100 else f"{rounded:#.3g}".rstrip(".")


def cell(text: str) -> str:
    """Escape text for a cell: no bare bars, no line breaks.

    >>> print(cell("a | b"))
    a \\| b
    """
    return " ".join(text.split()).replace("|", "\\|")


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """Columns as wide as their widest cell, except the last; those in `numbers` right-aligned."""
    rows, numbers = [list(map(cell, line)) for line in (titles, *lines)], set(numbers)
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(titles))]
    if len(titles) - 1 not in numbers:
        widths[-1] = 3
    rules = ["-" * (width - 1) + ":" if at in numbers else "-" * width for at, width in enumerate(widths)]

    def padded(row: Sequence[str]) -> list[str]:
        both = enumerate(zip(row, widths, strict=True))
        return [text.rjust(width) if at in numbers else text.ljust(width) for at, (text, width) in both]

    return "\n".join(f"| {' | '.join(line)} |" for line in (padded(rows[0]), rules, *map(padded, rows[1:]))) + "\n"
