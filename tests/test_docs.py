"""The pages name every part, configuration and page; what they name exists, and their Python code runs."""

import argparse
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from torch import nn
from torchvision.models import resnet50

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.__main__ import COMMANDS, main
from setpred.commands.train import build
from setpred.data import toy
from setpred.data.scenes import render_file

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES += [ROOT / "data" / "README.md", ROOT / "checkpoints" / "README.md"]
NOTEBOOK = DOCS / "first_steps.ipynb"
README, PARTS = PAGES[0].read_text(), (DOCS / "parts.md").read_text()
RESULTS, SCALING = (DOCS / "results.md").read_text(), (DOCS / "scaling.md").read_text()
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    if page.name != "own_parts.md"
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
NOT_PARTS = {"Aggregator", "SetDecoder", "SetLoss", "World", "Examples"}  # base classes and types
NOT_PARTS |= {"Differentiation", "LinearSolver", "Projection", "Problem", "State"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def resolved(name):
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


@every_page
def test_named_files_modules_and_commands_exist(page):
    text = page.read_text()
    for path in re.findall(r"\b(?:setpred|tests|benchmarks|configs)/[\w/]*\.?(?:py|yaml)?\b", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in re.findall(r"`(\w+\.py)`", text):
        assert any(ROOT.rglob(name)) or f"\n# {name}\n" in text, f"{page.name} names {name}"
    for name in re.findall(r"\bsetpred(?:\.[a-zA-Z_]\w*)+", text):
        assert resolved(name), f"{page.name} names {name}"
    for command in re.findall(r"python -m setpred (\S+?)[\s`]|`setpred (\w+)", text):
        assert "".join(command) in COMMANDS, f"{page.name} names the command {command}"


def notebook(path):
    """The kind and text of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_their_headings(page):
    text = page.read_text()
    if page == NOTEBOOK:
        text = "\n".join(content for kind, content in notebook(page) if kind == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_the_notebook_runs_and_is_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {}
    for kind, content in notebook(NOTEBOOK):
        assert len(content.splitlines()) <= 25
        if kind == "code":
            exec(compile(content, NOTEBOOK.name, "exec"), names)
    pyplot.close("all")
    assert sum(names["losses"][-20:]) < 0.3 * sum(names["losses"][:20])
    assert NOTEBOOK.stat().st_size < 100_000  # hardly any outputs


@pytest.mark.parametrize("code", BLOCKS)
def test_python_code_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "a page", "exec"), {})


class Parsed(Exception):
    """A command has understood its arguments."""


def commands(page):
    """The commands of setpred in the blocks of a page, but trainings, whose options are keys of a configuration."""
    for block in re.sub(r" \\\n +", " ", page.read_text()).splitlines():
        for line in block.split(" && ") if block.startswith("    ") else ():
            found = re.match(r" *(?:python -m setpred |setpred |python (?=evaluate\.py))(.*)", line)
            words = shlex.split(found[1].replace("evaluate.py", "evaluate"), comments=True) if found else ["train"]
            if words[0] != "train":
                yield words


@every_page
def test_commands_have_the_options_that_pages_give_them(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        parse(self, *arguments)  # raises for an unknown option
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for name, *words in commands(page):
        monkeypatch.setattr(sys, "argv", ["setpred", *words])
        with pytest.raises(Parsed):
            importlib.import_module(f"setpred.commands.{name}").main()


def test_commands_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) > 15


SMALL = [f"--data.init_args.{size}" for size in ("train_images=8", "val_images=4", "batch_size=4")]
TINY = {
    "train": [*SMALL, "--trainer.max_epochs=1"],
    "evaluate": ["--device=cpu"],
    "compare": ["--budget=1steps", "--points=1", "--", *SMALL],
}


def test_files_code_and_commands_of_own_parts_run_with_tiny_sizes(tmp_path, monkeypatch, capsys):
    """Blocks that begin with the name of a file are appended to it; the rest runs in the order of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # the working folder is added by --allow
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    os.symlink(ROOT / "configs", "configs")
    (tmp_path / "data").mkdir()
    for seed, images in ((0, 8), (1_000_000, 4)):  # in this process, which is faster than where a training would
        render_file(
            f"data/rendered-64-3to6-seed{seed}-{images}.h5", images=images, image_size=64, objects=(3, 6), seed=seed
        )
    text, ran = (DOCS / "own_parts.md").read_text(), []
    for name, content in re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", text, re.DOTALL):
        with open(name, "a") as file:
            file.write(content)
    for code, command in re.findall(
        r"```python\n(?!# )(.*?)```|^    setpred ([^\n]*)$", text, re.DOTALL | re.MULTILINE
    ):
        if code:
            exec(compile(code, "a page", "exec"), {})
        else:
            words = shlex.split(command)
            monkeypatch.setattr(sys, "argv", ["setpred", *words, *TINY[words[0]]])
            assert main() == 0, capsys.readouterr().err
            ran.append(words[0])
    assert ran == ["train", "evaluate", "compare"]
    assert all(f"| {name} |" in Path("comparison/table.md").read_text() for name in ("my", "my_pool", "mlp"))


class PublishedDETR(nn.Module):
    """DETR of torch's own layers, with the names of the published weights (Apache 2.0), up to its decoder's norm."""

    def __init__(self, dim, queries, hidden_dim):
        super().__init__()
        body, sizes = resnet50(weights=None), {"dropout": 0.0, "batch_first": True}
        body.fc = nn.Identity()
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        self.input_proj, self.query_embed = nn.Conv2d(2048, dim, 1), nn.Embedding(queries, dim)
        self.transformer = nn.Transformer(dim, 8, 2, 2, hidden_dim, **sizes)
        self.transformer.encoder.norm = None

    def forward(self, image):
        body = self.backbone[0].body
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            image = getattr(body, name)(image)
        maps = self.input_proj(image)
        side, dim = maps.shape[-1], maps.shape[1]
        numbers = torch.empty(side, side, dim, dtype=maps.dtype)
        for row, column, k in itertools.product(range(side), range(side), range(dim)):
            place = (row if k < dim // 2 else column) + 1
            angle = 2 * math.pi * place / side / 10_000 ** (k % (dim // 2) // 2 * 2 / (dim // 2))
            numbers[row, column, k] = math.cos(angle) if k % 2 else math.sin(angle)
        positions, tokens = numbers.flatten(0, 1), maps.flatten(2).mT
        for layer in self.transformer.encoder.layers:
            own = tokens + positions
            tokens = layer.norm1(tokens + layer.self_attn(own, own, tokens)[0])
            tokens = layer.norm2(tokens + layer.linear2(layer.linear1(tokens).relu()))
        queries = self.query_embed.weight.expand(len(maps), -1, -1)
        rows = torch.zeros_like(queries)
        for layer in self.transformer.decoder.layers:
            own = rows + queries
            rows = layer.norm1(rows + layer.self_attn(own, own, rows)[0])
            attended = layer.multihead_attn(rows + queries, tokens + positions, tokens)[0]
            rows = layer.norm2(rows + attended)
            rows = layer.norm3(rows + layer.linear2(layer.linear1(rows).relu()))
        return self.transformer.decoder.norm(rows)


def test_published_weights_of_detr_give_its_outputs():
    (code,) = re.findall(r"```python\n# detr_start.py\n(.*?)```", (DOCS / "own_parts.md").read_text(), re.DOTALL)
    page = {"__name__": "detr_start"}
    exec(compile(code, "detr_start.py", "exec"), page)
    torch.manual_seed(0)
    published = PublishedDETR(16, 5, 12).eval()
    for parameter in published.transformer.parameters():
        nn.init.normal_(parameter)  # biases and norms count, too
    sizes = {"dim": 16, "encoder_layers": 2, "decoder_layers": 2, "hidden_dim": 12}
    model = page["start"](published.state_dict(), 5, 128, **sizes).double().eval()
    image = torch.rand(2, 3, 4, 4).repeat_interleave(32, 2).repeat_interleave(32, 3).double()  # tokens that differ
    trunk = model.encoder.trunk
    with torch.no_grad():
        expected = model.decoder.head(published.double()((image - trunk.mean) / trunk.std))
        torch.testing.assert_close(model(image), expected, rtol=1e-7, atol=1e-7)
        assert expected.std(1).min() > 1e-5  # the queries differ
        few = page["start"](published.state_dict(), 3, 128, **sizes)
    torch.testing.assert_close(few.decoder.queries.double(), published.query_embed.weight[:3])


def test_the_readme_is_short_and_begins_with_the_commands():
    lines = README.splitlines()
    assert len(lines) <= 110
    assert "make demo" in "\n".join(lines[:30])
    assert "make test" in "\n".join(lines[:30])


def test_the_index_lists_every_page():
    linked = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", (DOCS / "README.md").read_text())}
    pages = [page for page in PAGES if page.name != "README.md" or page.parent.name in ("data", "checkpoints")]
    assert {*pages, NOTEBOOK} == linked


@pytest.mark.parametrize("module", [aggregators, decoders, losses, inner, toy], ids=lambda module: module.__name__)
def test_every_part_is_listed(module):
    for name in module.__all__:
        if isinstance(getattr(module, name), type) and name not in NOT_PARTS:
            assert f"`{name}" in PARTS, f"docs/parts.md does not name {module.__name__}.{name}"


def test_every_listed_part_exists():
    known = {name for module in (aggregators, decoders, encoders, inner, losses, toy) for name in module.__all__}
    known |= {
        "AbsoluteError",
        "Accuracy",
        "ClassWasserstein",
        "Coverage",
        "EnergyScore",
        "NumberingAccuracy",
        "SetDistances",
    }
    known |= {"CHECKPOINT", "SetPredictor"}
    assert set(re.findall(r"`([A-Z]\w+)[`(]", PARTS)) <= known


def test_every_compared_configuration_has_its_row():
    for path in (
        path
        for kind in ("compare", "occluded", "views", "worlds")
        for path in (ROOT / "configs" / kind).rglob("*.yaml")
    ):
        assert f"| {path.stem} |" in RESULTS, f"docs/results.md has no row of {path.parent.name}/{path.stem}"


@pytest.mark.parametrize("text", [PARTS, RESULTS], ids=["parts", "results"])
def test_named_configurations_exist(text):
    for named in re.findall(r"(?:configs/)?((?:compare|occluded|worlds|discovery|views)/[\w/.{},]+)", text):
        before, _, rest = named.rstrip(".,").partition("{")
        names, _, after = rest.partition("}")
        for path in [f"{before}{name}{after}" for name in names.split(",")]:
            assert (ROOT / "configs" / path).exists(), f"configs/{path} is named and does not exist"


def cells(text, *, columns):
    """Rows of the tables of a page with so many columns: the cells after the first, by the first."""
    rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|")
    return {row[0]: row[1:] for row in rows if len(row) == columns}


def test_which_model_repeats_the_measured_figures():
    scenes, _, _ = RESULTS.partition("## Random multisets")
    measured = {name: row for name, row in cells(scenes, columns=14).items() if row[0] == "3"}
    table = cells((DOCS / "which_model.md").read_text(), columns=11)
    table = {name: row for name, row in table.items() if name in measured}
    assert list(table) == list(measured)
    assert {path.stem for path in (ROOT / "configs" / "compare").glob("*.yaml")} == set(table)
    for name, row in table.items():
        of_results = measured[name]
        assert row[:5] == [score.split(" ±")[0] for score in of_results[2:7]]
        assert float(row[5]) == pytest.approx(float(of_results[11]) / 32, abs=0.051)
        assert f"{int(row[7].replace(',', '')) / 1000:,.0f} k" == of_results[12]


def make_api():
    """The script docs/make_api.py as a module."""
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_map_of_the_api_is_current_and_has_every_room():
    script = make_api()
    assert (DOCS / "api.md").read_text() == script.page(), "run python docs/make_api.py"
    rooms = {path.parent.name for path in (ROOT / "setpred").glob("*/*.py")}
    rooms |= {path.stem for path in (ROOT / "setpred").glob("[a-z]*.py")}
    internal = {"commands", "files", "nonfinite", "progress", "workers"}
    assert {module.split(".")[1] for module in script.MODULES if "." in module} == rooms - internal


def test_the_sent_bytes_follow_from_the_parameters():
    for name in ("clevr", "clevr_equilibrium", "clevr_fspool"):
        options = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--trainer.logger=false"]
        parameters = sum(part.numel() for part in build([*options, "--resume=auto"]).model.parameters())
        sent = [2 * (among - 1) / among * 4 * parameters / 1e6 for among in (2, 8, 64)]
        row = f"| `{name}.yaml` | {parameters:,} | {4 * parameters / 1e6:.2f} MB |"
        assert row + "".join(f" {megabytes:.1f} MB |" for megabytes in sent) in SCALING


def test_the_kept_share_follows_from_the_times():
    links = ((82.5, 450), (82.5, 12.5), (92.8, 50), (92.8, 12.5))
    for step in (32, 8):
        shares = "".join(f" {100 * step / (step + megabytes / rate):.1f} % |" for megabytes, rate in links)
        assert f"| T = {step} ms |" + shares in SCALING
