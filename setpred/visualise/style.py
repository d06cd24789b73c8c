"""What all figures share: type, colours, words, and files that are whole or absent.

Figures are drawn on matplotlib's Agg canvas without pyplot: no display, no global state.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from setpred.files import write_atomically
from setpred.schema import ElementSchema, Field

DPI = 110
INK = "#222222"
FAINT = "#8a8a8a"
GROUND = "#e9e9e6"
WRONG = "#d1381c"  # vermilion, told from INK and from the blues with any colour vision

# CLEVR's own colours (properties file of its generator)
CLASS_COLOURS = {
    "gray": "#575757",
    "red": "#ad2323",
    "blue": "#2a4bd7",
    "green": "#1d6914",
    "brown": "#814a19",
    "purple": "#8126c0",
    "cyan": "#29d0d0",
    "yellow": "#ffee33",
}
PLAIN = "#4477aa"  # for elements without a colour

# British words for CLEVR's names, and the order in which English lists adjectives
WORDS = {"color": "colour", "gray": "grey"}
ADJECTIVES = ("size", "color", "material", "shape")


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures, whatever matplotlibrc says; `@styled()` over a function that draws and saves."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams |= {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
        yield


def new_figure(width: float, height: float, *, dpi: int = DPI) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, title: str, subtitle: str, about: str) -> Text:
    """Title and a line under it; beside the title, small and cut to fit, what was evaluated. Returns the title."""
    left, top, right = 0.3, 0.32, 0.2  # inches
    width, height = figure.get_size_inches()
    line = 1 - top / height
    name = figure.text(left / width, line, title, fontsize=14, fontweight="bold", va="center")
    figure.text(left / width, 1 - (top + 0.29) / height, subtitle, fontsize=10, color="#555555", va="center")
    if about:
        renderer = figure.canvas.get_renderer()
        start = name.get_window_extent(renderer).x1 / figure.dpi + 0.3
        style = {"fontsize": 9, "color": "#555555", "va": "center", "ha": "right"}
        aside = figure.text(1 - right / width, line, about, parse_math=False, **style)
        with boxes_for_missing_glyphs():
            while len(about) > 1 and aside.get_window_extent(renderer).x0 / figure.dpi < start:
                about = about[1:]  # the end of a path says more than its start
                aside.set_text("…" + about)
    return name


@contextmanager
def boxes_for_missing_glyphs() -> Iterator[None]:
    """Within, matplotlib does not warn of characters that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save_png(figure: Figure, path: Path) -> Path:
    """Writes the figure whole or not at all; characters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with boxes_for_missing_glyphs():
        figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
    return path


def word(name: str) -> str:
    """A name of the schema as prose spells it."""
    return WORDS.get(name, name)


def in_english_order(schema: ElementSchema) -> list[Field]:
    """Categorical fields in the order that English lists adjectives: large red metal cube."""

    def rank(field: Field) -> int:
        return ADJECTIVES.index(field.name) if field.name in ADJECTIVES else len(ADJECTIVES)

    return sorted(schema.categorical, key=rank)


def plural(count: int, noun: str) -> str:
    """'1 object', '2,000 objects'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
