"""The language law: pages, configurations, docstrings, comments and messages use the words of the trade.

`python tests/test_language.py` counts the hits in each room of setpred and lists them.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# pattern -> what to write instead; whole words, any case, also across the end of a line
WORDS = {
    r"refus(e|es|ed|ing|al|als)": "reject, raise, fail",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"said|told": "report, log, print; default: X",
    r"mend(s|ed|ing)?": "fix, repair",
    r"(is|are|was|be|written|read|stays?|appears?|another|newest|last) whole|whole or (absent|not)": "complete",
    r"(numbers?|steps?|samples?|gradients?|values?) (that )?(break|breaks|broke|are broken|is broken)": "non-finite",
    r"broken (numbers?|steps?|samples?|gradients?|values?|losses|weights)": "non-finite",
    r"lie|lies|lain|lying": "is in, is at",
    r"stand|stands|stood|standing": "is in, represents",
    r"strangers?|stranger's": "untrusted",
    r"doors?": "entry point, check",
    r"(any|some)body('s)?": "any, a user",
    r"of (its|their|his) own": "own, separate",
    r"beside": "next to, besides, with",
    r"(which|that|it|this) (is|are) none": "say what it is",
    r"(be|as|is|are) meant": "intended, invalid",
    r"(has|have|had) to do": "depend on, concern",
    r"shall": "must, will",
    r"anew": "again",
    r"by chance": "at random",
    r"r(un|uns|an|unning) away": "diverge",
    r"for (it|they|there|he|these|those) (is|are|was|were|has|have|would|does|do|needs?)": "because, since",
}
LAW = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in WORDS).replace(" ", r"\s+"), re.IGNORECASE)
NO_NOUN = re.compile(r"\s*(What|How|Which|Where)\b")  # how no docstring begins

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
PAGES += [ROOT / "checkpoints" / "README.md", ROOT / "CHANGELOG.md"]
SCRIPTS = [ROOT / "train.py", ROOT / "evaluate.py", ROOT / "Makefile", ROOT / "pyproject.toml"]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SOURCES = sorted((ROOT / "setpred").rglob("*.py"))
ROOMS = sorted({path.relative_to(ROOT / "setpred").parts[0].removesuffix(".py") for path in SOURCES})


def hits(text, line=1):
    """Line number and words of each hit in a text that starts at `line`."""
    return [(line + text.count("\n", 0, found.start()), " ".join(found[0].split())) for found in LAW.finditer(text)]


def prose(path):
    """A page without its code spans; of CHANGELOG.md the newest section alone."""
    text = path.read_text()
    if path.name == "CHANGELOG.md":
        text = "\n## ".join(text.split("\n## ")[:2])
    return re.sub(r"`[^`\n]*`", "``", text)


def comments(text):
    """The comments of YAML, TOML or make, each on its line."""
    return "\n".join(line.partition("#")[2] for line in text.splitlines())


def python_hits(text):
    """Hits in comments, docstrings and other string literals of Python code."""
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = token.string.lstrip("#")
    found = hits("\n".join(lines))
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += hits(node.value, node.lineno)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            found += [
                (node.body[0].lineno, first[1]) for first in [NO_NOUN.match(ast.get_docstring(node) or "")] if first
            ]
    return sorted(found)


def room(name):
    """`file:line: words` of each hit in a room of setpred."""
    for path in SOURCES:
        if path.relative_to(ROOT / "setpred").parts[0].removesuffix(".py") == name:
            yield from (f"{path.relative_to(ROOT)}:{line}: {words}" for line, words in python_hits(path.read_text()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_keep_the_law(path):
    assert not [f"{path.name}:{line}: {words}" for line, words in hits(prose(path))]


def test_scripts_and_configurations_keep_the_law():
    found = [(path, python_hits(path.read_text())) for path in SCRIPTS if path.suffix == ".py"]
    found += [(path, hits(comments(path.read_text()))) for path in [*SCRIPTS, *CONFIGS] if path.suffix != ".py"]
    assert not [f"{path.relative_to(ROOT)}:{line}: {words}" for path, those in found for line, words in those]


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_keep_the_law(name):
    assert not list(room(name))


@pytest.mark.parametrize(
    "text",
    ["It goes\non.", "An option that is none.", "Where numbers break.", "The files lie here.", "Told."],
)
def test_the_law_finds_what_it_forbids(text):
    assert hits(text)
    assert python_hits(f'x = 1  # {text.splitlines()[0]} refused\ny = """{text}"""\n')


@pytest.mark.parametrize("text", ["The whole image.", "For it to resume.", "Nonetheless besides.", "A standard file."])
def test_the_law_leaves_plain_words_alone(text):
    assert not hits(text)


def test_docstrings_begin_with_a_thing_or_a_command():
    assert python_hits('"""What a file holds."""\n') == [(1, "What")]
    assert not python_hits('"""Read a file. What it holds is checked."""\n')


if __name__ == "__main__":
    found = {name: list(room(name)) for name in ROOMS}
    print(*(line for those in found.values() for line in those), sep="\n")
    print(Counter({name: len(those) for name, those in found.items()}))
