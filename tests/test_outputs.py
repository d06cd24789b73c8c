"""No command replaces what it reads, a device or a file that it does not make; each says so before its work."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image
from tiny import clevr_folder, untrained

from setpred.__main__ import main as program
from setpred.commands import evaluate, gradients, predict
from setpred.commands.outputs import check_outputs
from setpred.data.scenes import render_file
from setpred.errors import InputError

COMMANDS = {  # outputs that are files, and folders
    "predict": ("predict {ckpt} {images} --out {file} --figures {folder}", True),
    "evaluate": ("evaluate {ckpt} --data {data} --json {file} --figures {folder}", True),
    "gradients": ("gradients {ckpt} --data {data} --json {file}", False),
    "release": ("release {ckpt} --out {file}", False),
    "export": ("release {ckpt} --export {file}", False),
    "render": ("data render --images 2 --image-size 16 --workers 0 --force --out {file}", False),
    "prepare": ("data prepare {clevr} --workers 0 --force --out {file}", False),
    "import": ("data import --csv {table} --images {images} --workers 0 --force --schema {data} --out {file}", False),
    "compare": ("data compare {clevr} --json {file} --pictures {folder}", True),
}
SUFFIX = {"release": ".safetensors", "export": ".pt2", "render": ".h5", "prepare": ".h5", "import": ".h5"}
STREAMED = ("predict", "evaluate", "gradients", "compare")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    found = {
        "ckpt": untrained(folder),
        "data": folder / "data.h5",
        "images": folder / "images",
        "table": folder / "t.csv",
    }
    render_file(found["data"], images=2, image_size=16, objects=(3, 4))
    found["images"].mkdir()
    Image.new("RGB", (16, 16)).save(found["images"] / "a.png")
    found["table"].write_text("image,x,y\na.png,3,4\n")
    clevr_folder(folder / "clevr")
    return found | {"clevr": folder / "clevr"}


@pytest.fixture
def run(inputs, tmp_path, monkeypatch, capsys):
    """Run a command with `file` and `folder` as its outputs; return the exit status and what it says on stderr."""
    for module in (predict, evaluate, gradients):  # no expensive work is begun
        monkeypatch.setattr(module, "choose_device", lambda name: pytest.fail("the work began"))
    monkeypatch.setattr("setpred.commands.release.load_checkpoint", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr("setpred.workers.ordered_map", lambda *_, **__: pytest.fail("the work began"))

    def run(name, **outputs):
        places = inputs | {"file": tmp_path / f"new{SUFFIX.get(name, '.json')}", "folder": tmp_path / "new"} | outputs
        monkeypatch.setattr(sys, "argv", ["setpred", *COMMANDS[name][0].format(**places).split()])
        return program(), capsys.readouterr().err

    return run


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names_of(path: Path, folder: Path):
    """A file's own name, another spelling, a symbolic link and a hard link."""
    links = [folder / f"{kind}{path.suffix}" for kind in ("soft", "hard")]
    links[0].symlink_to(path)
    os.link(path, links[1])
    return [path, path.parent / ".." / path.parent.name / path.name, *links]


READ = {  # what a command reads, as its output
    "predict": ["ckpt", "images/a.png"],
    "evaluate": ["ckpt", "data"],
    "gradients": ["ckpt", "data"],
    "release": ["ckpt"],
    "export": ["ckpt"],
    "import": ["table", "data"],
}


@pytest.mark.parametrize("name", READ)
def test_an_input_is_no_output_under_any_name(name, run, inputs, tmp_path):
    for part in READ[name]:
        key, _, rest = part.partition("/")
        source = inputs[key] / rest if rest else inputs[key]
        before = contents(source.parent)
        (tmp_path / key).mkdir()
        for path in names_of(source, tmp_path / key):
            status, message = run(name, file=path)
            assert status == 2
            assert f"{path}: the command reads this file" in message
        assert contents(source.parent) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_another_kind_a_folder_and_a_parent_that_is_a_file_are_no_outputs(name, run, tmp_path):
    suffix = SUFFIX.get(name, ".json")
    other = tmp_path / f"notes{suffix}"
    other.write_text("dear diary")
    (tmp_path / f"folder{suffix}").mkdir()
    for path, message in (
        (other, "holds something else than the command writes"),
        (tmp_path / f"folder{suffix}", "expected the name of a file, but it is a folder"),
        (other / f"new{suffix}", "is a file, not a folder"),
    ):
        status, said = run(name, file=path)
        assert status == 2
        assert (
            f"error: --{'export' if name == 'export' else 'json' if '--json' in COMMANDS[name][0] else 'out'} {path}: "
            in said
        )
        assert message in said
    assert other.read_text() == "dear diary"


ANNOTATIONS = {  # which a user made, by suffix; a file of another suffix counts as JSON or CSV
    ".json": ['{"info": {}, "scenes": []}', '{"images": [], "annotations": [], "categories": []}', "[1]", '{"a": 1}'],
    ".jsonl": ['{"image_index": 0}\n'],
    ".csv": ["image,x,y,label\n", "epoch,step,val_loss\n", "id,confidence\n"],
    ".yaml": ["model: {}\n"],
    ".html": ["<html></html>"],
}


def test_annotations_tables_and_configurations_of_users_are_no_outputs(tmp_path):
    for suffix, texts in ANNOTATIONS.items():
        for text in texts:
            path = tmp_path / f"own{suffix}"
            path.write_text(text)
            for option in ("--json",) if suffix == ".json" else ("--out",):
                with pytest.raises(InputError, match="holds something else than the command writes"):
                    check_outputs({option: path})


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name][1]])
def test_a_folder_of_figures_is_no_file_and_not_that_of_the_images(name, run, inputs, tmp_path):
    (tmp_path / "file").write_text("")
    status, said = run(name, folder=tmp_path / "file")
    assert (status, "expected a folder, but it is a file" in said) == (2, True)
    status, said = run(name, folder=tmp_path / "new.json")
    assert (status, "has this name, too" in said) == (2, True)
    own = inputs["clevr"] / "images" / "val"
    images = {"predict": inputs["images"], "compare": own, "evaluate": own}.get(name)
    if images is not None:
        (tmp_path / "link").symlink_to(images)
        for path in (images, tmp_path / "link"):
            status, said = run(name, folder=path, data=inputs["clevr"])
            assert (status, "the images to read are in this folder" in said) == (2, True)


@pytest.mark.parametrize("name", ["render", "prepare", "import"])
def test_a_prepared_file_is_no_device_and_a_link_to_one_stays(name, run, inputs, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", tmp_path / "pipe"):
        status, said = run(name, file=path)
        assert (status, "got a device or pipe" in said) == (2, True)
    assert not Path("/dev/null").is_file()
    if name == "render":
        monkeypatch.undo()
        target, link = tmp_path / "target.h5", tmp_path / "link.h5"
        shutil.copy(inputs["data"], target)
        link.symlink_to(target)
        render_file(link, images=1, image_size=16, force=True)
        assert link.is_symlink()
        assert target.read_bytes() != inputs["data"].read_bytes()


def test_results_of_earlier_runs_are_replaced(inputs, tmp_path):
    ckpt, data, images = (str(inputs[name]) for name in ("ckpt", "data", "images"))
    for name in ("out.json", "out.jsonl", "out.csv", "out.txt"):
        out = tmp_path / name
        for _ in range(2):
            predict.run([ckpt, images, "--out", str(out), "--figures", str(tmp_path / "figures")])
    assert [found["image"] for found in json.loads((tmp_path / "out.json").read_text())] == [f"{images}/a.png"]
    scored = (evaluate.evaluate, ["--report", str(tmp_path / "e.html")]), (gradients.check, ["--images", "2"])
    for number, (run, options) in enumerate(scored):
        for _ in range(2):
            run([ckpt, "--data", data, "--json", str(tmp_path / f"{number}.json"), *options])
    # COCO's three, as `setpred predict --format coco` begins them
    for start in ('{"annotations": [\n{', '{"annotations": [\n]', '[\n{"image_id": 1'):
        out.write_text(start)
        check_outputs({"--out": out})


def test_a_link_is_judged_by_what_it_points_to(tmp_path):
    for name, taken in (("target", True), ("config.yaml", False)):
        (tmp_path / name).write_text("old: 1\n")
        (tmp_path / f"to-{name[:6]}").symlink_to(name)
        with nullcontext() if taken else pytest.raises(InputError, match="something else"):
            check_outputs({"--out": tmp_path / f"to-{name[:6]}"}, inputs=[])
