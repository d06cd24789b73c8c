"""Fonts, colours, words, layout in inches, and atomic files for all figures.

Figures use matplotlib's Agg canvas without pyplot: no display, no global state.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from setpred.files import write_atomically
from setpred.schema import ElementSchema, Field

DPI = 110
INK, FAINT, GROUND, GRID = "#222222", "#8a8a8a", "#e9e9e6", "#e4e4e4"
WRONG = "#d1381c"  # vermilion, distinct from INK and from blue with any colour vision
PLAIN = "#4477aa"  # of elements without a colour
# CLEVR's colours, from the properties file of its generator
CLASS_COLOURS = {
    "gray": "#575757", "red": "#ad2323", "blue": "#2a4bd7", "green": "#1d6914",
    "brown": "#814a19", "purple": "#8126c0", "cyan": "#29d0d0", "yellow": "#ffee33",
}  # fmt: skip
# of things without a colour, in turn; distinct with most colour vision
DISTINCT = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442", "#882255", "#999933", "#332288", "#44aa99",
)  # fmt: skip
# British words for CLEVR's names, and the English order of adjectives
WORDS = {"color": "colour", "gray": "grey"}
ADJECTIVES = ("size", "color", "material", "shape")


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of all figures, whatever matplotlibrc says; decorate drawing functions with `@styled()`."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams |= {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "legend.frameon": False}
        mpl.rcParams |= {"axes.titlesize": 11, "axes.titlelocation": "left", "axes.edgecolor": FAINT}
        mpl.rcParams |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
        mpl.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID}
        mpl.rcParams |= {"grid.linewidth": 0.7, "axes.axisbelow": True}
        yield


@contextmanager
def boxes_for_missing_glyphs() -> Iterator[None]:
    """Silence matplotlib's warnings about characters that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


class Sheet(Figure):
    """A figure laid out in inches from its lower left corner."""

    def __init__(self, width: float, height: float, *, dpi: int = DPI) -> None:
        super().__init__(figsize=(width, height), dpi=dpi, facecolor="white")
        self.width, self.height = width, height
        FigureCanvasAgg(self)

    def panel(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Add axes."""
        return self.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def note(self, x: float, y: float, text: str, **style: Any) -> Text:
        """Write text, centred vertically; bytes of a file's name that are no text become question marks."""
        text = text.encode(errors="replace").decode()
        return self.text(x / self.width, y / self.height, text, va="center", **style)

    def heading(self, title: str, subtitle: str, about: str) -> None:
        """Write title and subtitle and, right of the title, the end of `about` that fits."""
        name = self.note(0.3, self.height - 0.32, title, fontsize=14, fontweight="bold")
        self.note(0.3, self.height - 0.61, subtitle, color="#555555")
        if not about:
            return
        renderer = self.canvas.get_renderer()
        start = name.get_window_extent(renderer).x1 / self.dpi + 0.3
        style = {"fontsize": 9, "color": "#555555", "ha": "right", "parse_math": False}
        aside = self.note(self.width - 0.2, self.height - 0.32, about, **style)
        about = aside.get_text()
        with boxes_for_missing_glyphs():
            while len(about) > 1 and aside.get_window_extent(renderer).x0 / self.dpi < start:
                about = about[1:]  # the end of a path is its most specific part
                aside.set_text("…" + about)

    def save(self, path: Path) -> Path:
        """Write a PNG atomically."""
        buffer = io.BytesIO()
        with boxes_for_missing_glyphs():
            self.savefig(buffer, format="png")
        write_atomically(path, buffer.getvalue())
        return path


def word(name: str) -> str:
    """Spell a name of the schema as English prose does."""
    return WORDS.get(name, name)


def in_english_order(schema: ElementSchema) -> list[Field]:
    """Categorical fields in the English order of adjectives: large red metal cube."""
    rank = {name: place for place, name in enumerate(ADJECTIVES)}
    return sorted(schema.categorical, key=lambda field: rank.get(field.name, len(rank)))
