"""Prepared files and rendered folders: what goes in comes out; nothing incomplete or damaged is taken for complete."""

import errno
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from setpred import CLEVR, ElementSchema, InputError, files, progress
from setpred.commands.data import main
from setpred.data import hdf5_writer, scenes, shards
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import SetFile, open_data
from setpred.data.hdf5 import Header, Record, describe, open_set_file, read_header, verify
from setpred.data.hdf5_writer import write_set_file
from setpred.data.scenes import built_in_scenes, render_file, render_folder
from setpred.files import locked
from setpred.rendering.records import read_cameras, scene_of
from setpred.rendering.renderer import render
from setpred.rendering.sampling import COGENT_A
from setpred.schema import continuous
from setpred.workers import ordered_map

HEADER = Header(7, 8, CLEVR, {"kind": "test"})
FILE = {"images": 5, "image_size": 16, "objects": (1, 3)}
FOLDER = {"split": "val", "images": 5, "objects": (2, 4), "width": 24, "height": 16}


def some_records(count: int = 7, size: int = 8) -> list[Record]:
    """Random images with random sets of 0 to 10 objects."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        objects = [
            {"coords": rng.normal(size=3)} | {f.name: str(rng.choice(f.classes)) for f in CLEVR.categorical}
            for _ in range(rng.integers(11))
        ]
        image = rng.integers(256, size=(size, size, 3), dtype=np.uint8)
        camera = np.full(3, np.nan) if number == 3 else rng.normal(size=3)
        records.append(Record(image, CLEVR.encode(objects), camera, 100 + number))
    return records


RECORDS = some_records()


def write(path: Path, records: list[Record] = RECORDS, *, header=HEADER, stop=None, **options) -> list[int]:
    """Write the records, fail at number `stop`; return the numbers that were made."""
    made = []

    def make(items):
        for record in items:
            if record.index == 100 + (-1 if stop is None else stop):
                raise InputError("stopped")
            made.append(record.index - 100)
        return items

    write_set_file(path, header, records, make, **{"producer": "p", "description": "test"} | options)
    return made


@pytest.fixture
def small_shards(monkeypatch):
    """Two images each."""
    monkeypatch.setattr(shards, "SHARD", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "made.h5"
    render_file(path, **FILE)
    return path


@pytest.fixture
def file(tmp_path, made) -> Path:
    return Path(shutil.copy(made, tmp_path / "a.h5"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    render_folder(root, **FOLDER)
    return root


def content(path: Path) -> dict[str, bytes]:
    """What is in a file, or every file of a folder."""
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    with open_set_file(path) as file:
        arrays = {name: file[name][:].tobytes() for name in ("images", "elements", "camera", "index")}
        return arrays | {name: str(value).encode() for name, value in file.attrs.items()}


def test_what_goes_in_comes_out(tmp_path):
    path = tmp_path / "new" / "a.h5"
    write(path)
    with open_set_file(path) as file:
        assert read_header(file, "a").to_json() == HEADER.to_json()
        for name, part in (("images", 0), ("elements", 1), ("camera", 2), ("index", 3)):
            np.testing.assert_array_equal(file[name][:], np.stack([record[part] for record in RECORDS]))
        assert file["images"].chunks == (1, 8, 8, 3)
    assert verify(path).images == 7
    assert os.listdir(tmp_path / "new") == ["a.h5"]
    text = describe(path)
    present = [record.elements[:, -1] > 0 for record in RECORDS]
    red = sum(int(record.elements[rows, 9].sum()) for record, rows in zip(RECORDS, present, strict=True))
    assert f"7 images of 8x8, {sum(map(sum, present))} objects" in text
    assert "cameras   known for 6 images" in text
    assert "coords (3), material (2), color (8), shape (3), size (2), presence (1)" in text
    assert any(line.split()[:2] == ["red", str(red)] for line in text.splitlines())


def test_images_keep_their_names(tmp_path):
    names = [f"{number} \udcff,é.png" for number in range(7)]  # file names need not be UTF-8
    for path, given in ((tmp_path / "a.h5", names), (tmp_path / "b.h5", None)):
        write(path, names=given)
        verify(path)
        data = SetFile(path, images=5)
        assert [data.name(number) for number in range(5)] == (given or [f"image {100 + n}" for n in range(7)])[:5]


def test_rendering_depends_on_the_seed_and_the_number_only(tmp_path, folder, small_shards):
    arguments = {"image_size": 16, "objects": (0, 4)}
    alone = render_file(tmp_path / "a.h5", images=9, seed=5, workers=0, **arguments)
    assert render_file(tmp_path / "c.h5", images=9, seed=6, workers=0, **arguments) != alone
    render_file(tmp_path / "d.h5", images=4, seed=5, workers=0, **arguments)
    with open_set_file(tmp_path / "a.h5") as nine, open_set_file(tmp_path / "d.h5") as four:
        for name in ("images", "elements", "camera", "index"):
            np.testing.assert_array_equal(nine[name][:4], four[name][:])
        assert np.isfinite(nine["camera"][:]).all()
    render_folder(tmp_path / "same", **FOLDER, workers=2)
    assert content(tmp_path / "same") == content(folder)
    render_folder(tmp_path / "other", **FOLDER, seed=1)
    assert content(tmp_path / "other").keys() == content(folder).keys()
    assert not set(content(tmp_path / "other").values()) & set(content(folder).values())


def test_the_layout_of_a_folder(folder, tmp_path):
    names = [f"images/val/CLEVR_val_{number:06d}.png" for number in range(5)]
    assert sorted(content(folder)) == ["cameras.jsonl", *names, "scenes/CLEVR_val_scenes.json"]
    document = json.loads((folder / "scenes" / "CLEVR_val_scenes.json").read_text())
    assert document["info"]["split"] == "val"
    assert document["info"]["source"] == {"kind": "rendered", "objects": [2, 4], "seed": 0}
    expected = built_in_scenes(range(5), seed=0, objects=(2, 4))
    cameras = read_cameras(folder / "cameras.jsonl", split="val")
    pictures = render(expected, width=24, height=16).numpy()
    for number, record in enumerate(document["scenes"]):
        assert scene_of(record, *cameras[number]) == expected[number]
        with Image.open(folder / "images" / "val" / record["image_filename"]) as image:
            np.testing.assert_array_equal(np.asarray(image), pictures[number])
    render_folder(tmp_path, **FOLDER, condition="cogent-a")
    document = json.loads((tmp_path / "scenes" / "CLEVR_val_scenes.json").read_text())
    assert document["info"]["source"]["condition"] == "cogent-a"
    assert all(obj["color"] in COGENT_A[obj["shape"]] for record in document["scenes"] for obj in record["objects"])


def test_a_folder_is_read_as_clevr_is(tmp_path):
    """Its cameras are found from the annotations, also in pictures of another size; it can be prepared."""
    size = {"width": 240, "height": 160}
    render_folder(tmp_path / "folder", split="val", images=2, **size)
    render_file(tmp_path / "a.h5", images=2, image_size=32)
    prepare = ["prepare", str(tmp_path / "folder"), "--image-size", "32", "--workers", "0"]
    assert main([*prepare, "--out", str(tmp_path / "b.h5")]) == 0
    known = read_cameras(tmp_path / "folder" / "cameras.jsonl", split="val")
    one, *others = (open_data(tmp_path / name, split="val", image_size=32) for name in ("a.h5", "b.h5", "folder"))
    prepared, direct = others
    assert prepared.source == direct.source
    np.testing.assert_array_equal(prepared.image_index, direct.image_index)
    batches = [data.__getitems__([1, 0]) for data in others]
    assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])
    for other in others:
        np.testing.assert_array_equal(one.__getitems__([0, 1])["elements"], other.__getitems__([0, 1])["elements"])
        for number in range(2):
            np.testing.assert_allclose(other.camera(number), known[number][0].location, atol=0.02)


def test_splits_share_a_folder(folder, tmp_path):
    for split, seed in (("val", 0), ("train", 1), ("val", 0)):
        render_folder(tmp_path, **FOLDER | {"split": split, "seed": seed}, force=True)
    found = content(tmp_path)
    assert all(found[name] == value for name, value in content(folder).items() if name != "cameras.jsonl")
    lines = [json.loads(line) for line in found["cameras.jsonl"].splitlines()]
    assert sorted((line["split"], line["image_index"]) for line in lines) == [
        (split, number) for split in ("train", "val") for number in range(5)
    ]
    assert len(ClevrFolder(tmp_path, "train")) == 5
    (tmp_path / "cameras.jsonl").write_bytes(found["cameras.jsonl"].rstrip())  # as some editors leave it
    render_folder(tmp_path, **FOLDER | {"split": "more"})
    for split in ("more", "val"):
        assert read_cameras(tmp_path / "cameras.jsonl", split=split).keys() == set(range(5))
    picture = tmp_path / "images" / "test" / "CLEVR_test_000000.png"  # as CLEVR's test split, which has no scenes
    picture.parent.mkdir()
    picture.write_bytes(b"theirs")
    with pytest.raises(InputError, match="images/test exists already"):
        render_folder(tmp_path, **FOLDER | {"split": "test"})
    assert picture.read_bytes() == b"theirs"
    (tmp_path / "cameras.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match=r"cameras.jsonl is not a file of cameras .*move it away"):
        render_folder(tmp_path, **FOLDER | {"split": "new"})


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_stopped_file_resumes_at_its_last_shard(tmp_path, stop, capsys, small_shards):
    path = tmp_path / "a.h5"
    write(tmp_path / "b.h5")
    with pytest.raises(InputError, match="stopped"):
        write(path, stop=stop)
    assert sorted(os.listdir(tmp_path)) == ["a.h5.partial", "b.h5"]
    with pytest.raises(InputError, match=r"a\.h5\.partial is there: run the command that makes it again"):
        SetFile(path)
    capsys.readouterr()
    done = stop // 2 * 2
    assert write(path) == list(range(done, 7))
    assert (f"after {done} of 7" in capsys.readouterr().err) == (done > 0)
    assert content(path) == content(tmp_path / "b.h5")


@pytest.mark.parametrize("change", ["code", "source", "damage"])
def test_shards_of_something_else_are_not_used(tmp_path, change, capsys, small_shards):
    path = tmp_path / "a.h5"
    with pytest.raises(InputError, match="stopped"):
        write(path, stop=4)
    if change == "damage":
        os.truncate(tmp_path / "a.h5.partial" / "000000000", 1000)
        assert write(path) == [0, 1, 4, 5, 6]
    else:
        options = {"producer": "q"} if change == "code" else {"header": Header(7, 8, CLEVR, {"kind": "other"})}
        assert write(path, **options) == list(range(7))
        assert "starting again" in capsys.readouterr().err
    verify(path)


@pytest.fixture
def quick_folder(monkeypatch, small_shards):
    """Renders its folder without torch, whose threads do not survive a fork."""
    made = built_in_scenes(range(5), seed=0, objects=(2, 4))
    pictures = torch.arange(5 * 16 * 24 * 3, dtype=torch.uint8).reshape(5, 16, 24, 3)
    monkeypatch.setattr(scenes, "built_in_scenes", lambda numbers, **_: [made[number] for number in numbers])
    monkeypatch.setattr(scenes, "render", lambda some, **_: torch.stack([pictures[made.index(one)] for one in some]))
    empty = torch.full((16, 24), -1, dtype=torch.int8)
    masks = lambda some, **_: SimpleNamespace(instances=torch.stack([empty + made.index(one) for one in some]))  # noqa: E731
    monkeypatch.setattr(scenes, "annotate", masks)


JOBS = {
    "file": (lambda root, **options: write(root / "a.h5", **options), ["a.h5"]),
    "folder": (
        lambda root, **options: render_folder(root, **FOLDER, masks=True, **options),
        ["images/val", "masks/val", "scenes/CLEVR_val_scenes.json", "cameras.jsonl"],
    ),
}
every_job = pytest.mark.parametrize("job", JOBS)
CALLS = [(os, "fsync"), (os, "replace"), (shutil, "rmtree")]  # by which shards and results are written


def count_calls(monkeypatch, act) -> None:
    """`act()` before every call of `CALLS`."""
    for module, name in CALLS:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (act(), real(*a, **k))[1])


@every_job
def test_killed_at_any_moment_it_resumes_and_ends_the_same(job, tmp_path, monkeypatch, quick_folder):
    run, _ = JOBS[job]
    run(tmp_path / "undisturbed")
    expected = {name: value for name, value in content(tmp_path / "undisturbed").items() if not name.endswith(".h5")}
    moment = 0
    while True:
        root = tmp_path / str(moment)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads of this process, which the child does not have
            child = os.fork()
        if child == 0:
            left = iter(range(moment, -1, -1))
            count_calls(monkeypatch, lambda left=left: next(left) or os.kill(os.getpid(), signal.SIGKILL))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run(root)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        if job == "file" and (root / "a.h5").exists():
            verify(root / "a.h5")
            assert (root / "a.h5.partial").exists()  # only that was left to remove
        else:
            run(root)
        found = {name: value for name, value in content(root).items() if ".h5" not in name}
        assert found == expected
        if job == "file":
            assert content(root / "a.h5") == content(tmp_path / "undisturbed" / "a.h5")
        moment += 1
    assert moment > 10


@every_job
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EIO, "check the disk")],
)
def test_a_failing_disk_is_one_sentence_and_publishes_nothing(job, tmp_path, monkeypatch, quick_folder, number, words):
    run, names = JOBS[job]

    def fail():
        nonlocal moment
        if moment == 0:
            raise OSError(number, os.strerror(number))
        moment -= 1

    for chosen in (0, 1, 4, 9):
        moment, root = chosen, tmp_path / str(chosen)
        with monkeypatch.context() as context:
            count_calls(context, fail)
            with pytest.raises(InputError, match=rf"cannot write .*{words}"):
                run(root)
        assert not (root / names[0]).exists()
        run(root)
        assert (root / names[0]).exists()


@pytest.mark.parametrize("limit", [2_000, 30_000], ids=["shard", "file"])
def test_a_disk_that_fills_up_leaves_what_was_done(tmp_path, limit, small_shards):
    """A limit on the size of files: the system refuses writes, under HDF5 too, as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*larger than this system allows.*"):
            write(tmp_path / "a.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["a.h5.partial"]
    assert write(tmp_path / "a.h5") == (list(range(7)) if limit == 2_000 else [])
    verify(tmp_path / "a.h5")


def test_what_is_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "a.h5.partial").mkdir()
    (tmp_path / "a.h5.partial" / "notes").write_text("mine")
    for path, words in (
        (tmp_path / "a.h5", "has notes, which is not a shard; move the folder away"),
        (tmp_path / "a.h5.partial" / "notes" / "a.h5", "is a file, not a folder"),
        (tmp_path, "a folder has this name"),
    ):
        with pytest.raises(InputError, match=words):
            write(path)
    assert (tmp_path / "a.h5.partial" / "notes").read_text() == "mine"


def test_too_little_room_is_an_error_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hdf5_writer.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(InputError, match=r"cannot write .*a\.h5: the disk is full; expected 0\.1 MB .*got 0\.1 MB"):
        write(tmp_path / "a.h5")
    assert os.listdir(tmp_path) == []


@every_job
def test_what_exists_is_replaced_only_by_force(job, tmp_path, quick_folder):
    run, _ = JOBS[job]
    run(tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"exists already.*--force"):
        run(tmp_path)
    assert content(tmp_path) == before
    if job == "file":
        other = Header(7, 8, CLEVR, {"kind": "other"})
        with pytest.raises(InputError, match="stopped"):
            write(tmp_path / "a.h5", header=other, force=True, stop=5)
        assert content(tmp_path)["a.h5"] == before["a.h5"]
        write(tmp_path / "a.h5", header=other, force=True)
        with open_set_file(tmp_path / "a.h5") as file:
            assert read_header(file, "a.h5").source == {"kind": "other"}
    else:
        render_folder(tmp_path, **FOLDER | {"images": 3}, force=True)
        assert len(content(tmp_path)) == 3 + 2


@every_job
def test_two_writers_are_told_apart(job, tmp_path, quick_folder):
    run, _ = JOBS[job]
    shards_of_it = tmp_path / {"file": "a.h5.partial", "folder": "scenes/CLEVR_val_scenes.json.partial"}[job]
    shards_of_it.mkdir(parents=True)
    with locked(shards_of_it / "lock"), pytest.raises(InputError, match=r"another process is writing .*\.partial"):
        run(tmp_path)
    run(tmp_path)


PREPARE = """
import sys, time
from setpred.commands.data import main
from setpred.data import shards

def slowly(items, **options):
    for item in items:
        time.sleep(0.05)
        yield item

if __name__ == "__main__":
    shards.SHARD, shards.progress = 2, slowly
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A folder of 60 images."""
    root = tmp_path_factory.mktemp("many")
    render_folder(root, **FOLDER | {"images": 60})
    return root


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_resumes_and_leaves_no_process(tmp_path, many, blow, capsys, small_shards):
    root, path = many, tmp_path / "out" / "a.h5"
    command = ["prepare", str(root), "--image-size", "16", "--out", str(path), "--workers"]
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, *command, "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    unfinished = path.with_name("a.h5.partial")
    while len(list(unfinished.glob("[0-9]" * 9))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    if blow == signal.SIGINT:
        os.killpg(process.pid, blow)  # as a terminal does
    else:
        process.send_signal(blow)
    process.communicate(timeout=20)
    assert process.returncode == (-9 if blow == signal.SIGKILL else 130)
    assert os.listdir(tmp_path / "out") == ["a.h5.partial"]
    assert 2 <= len(list(unfinished.glob("[0-9]" * 9))) < 30
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("worker processes remain")
    assert main([*command, "0"]) == 0
    assert f"resuming {unfinished}" in capsys.readouterr().err
    assert main(["prepare", str(root), "--image-size", "16", "--workers", "0", "--out", str(tmp_path / "b.h5")]) == 0
    assert content(path) == content(tmp_path / "b.h5")


def test_a_malformed_set_is_not_written(tmp_path):
    elements = RECORDS[0].elements.copy()
    elements[0, 0] = np.nan
    with pytest.raises(InputError, match="set of image 100 is malformed"):
        write(tmp_path / "a.h5", [RECORDS[0]._replace(elements=elements)], header=Header(1, 8, CLEVR, {}))


def test_files_of_other_models(file):
    with pytest.raises(InputError, match=r"expected images of 32x32, but .* has 16x16.*--image-size 32"):
        open_data(file, image_size=32)
    other = ElementSchema("clevr", [continuous("place", 3, scale=2.0), *CLEVR.fields[1:]], max_objects=10)
    with pytest.raises(InputError, match="another schema than the model: expected elements of the same fields"):
        open_data(file, image_size=16, schema=other)
    first = int((SetFile(file).__getitems__(range(5))["mask"].sum(1) == 3).int().argmax())
    with pytest.raises(InputError, match=f"image {first} has 3 objects, but the model holds sets of at most 2"):
        open_data(file, image_size=16, set_size=2)


def test_producing_data_does_not_import_torch():
    """Every worker process imports these modules."""
    code = "import sys, setpred.commands.data, setpred.data.clevr; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_answer_with_one_sentence(tmp_path, file, capsys):
    output = ["--out", str(tmp_path / "b.h5")]
    folder = ["render-folder", "--images", "1", "--workers", "0", "--out", str(tmp_path / "new")]
    for arguments, words in [
        (["verify", str(tmp_path / "none.h5")], "there is no file"),
        (["info", str(tmp_path)], "there is no file"),
        (["compare", str(tmp_path / "none")], "is no folder"),
        (["render", "--images", "0", *output], "at least 1 image"),
        (["render", "--images", "1", "--image-size", "100000", *output], "at most 4096x4096 pixels"),
        (["render", "--images", "1", "--image-size", "4", *output], "at least 8x8 pixels"),
        (["render", "--images", "3", "--workers", "-1", *output], "--workers"),
        (["render", "--images", "3", "--image-size", "8", "--out", str(file)], "exists already"),
        (["prepare", str(tmp_path / "none"), *output], "is no folder"),
        (["prepare", str(tmp_path), "--split", "test", *output], "'test'"),
        ([*folder, "--width", "4"], "got 1 of 4x320"),
        ([*folder, "--split", "../val"], "expected a split's name of letters"),
        ([*folder, "--seed", "-1"], "a seed of at least 0"),
        ([*folder, "--condition", "cogent-c"], "a condition out of clevr, cogent-a, cogent-b, got 'cogent-c'"),
    ]:
        assert main(arguments) == 2
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert sentence.startswith("error: ")
        assert words in sentence
        assert os.listdir(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}, {"workers": 2, "threads": True}], ids=str)
def test_ordered_map_keeps_the_order_and_the_errors_and_takes_no_more_than_it_needs(tmp_path, options):
    paths = [tmp_path / str(number) for number in range(30)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(number))
    taken = []
    items = (taken.append(path) or path for path in [*paths, tmp_path, *[paths[0]] * 1000])
    results = ordered_map(partial(files.require_regular, advice="give a file"), items, **options)
    assert [next(results) for _ in range(30)] == list(range(30))
    assert len(taken) < 50
    with pytest.raises(InputError, match=r"not a regular file .*; give a file"):
        next(results)


FAULTS = """
import resource, sys
import numpy
from setpred.commands.common import start
from setpred.workers import ordered_map

def faults(rounds):
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            arrays = [numpy.ones(2**19) for _ in range(8)]
            del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if __name__ == "__main__":
    print(faults(3), *ordered_map(faults, [3], workers=1), flush=True)
    start(lambda: print(faults(3)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the malloc of glibc")
def test_freed_memory_stays_with_the_process_of_a_command_and_of_a_worker(tmp_path):
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    plain, worker, command = map(int, done.stdout.split())  # pages asked for by 20 times 8 arrays of 4 MiB
    assert max(worker, command) < 100 < plain


def test_ordered_map_reports_a_dead_worker():
    with pytest.raises(InputError, match=r"worker process died.*fewer --workers"):
        list(ordered_map(os._exit, range(30), workers=1))


def test_progress_in_a_log(monkeypatch):
    clock = iter(range(0, 1000, 4))  # each look at the clock is four seconds later
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    log = io.StringIO()
    assert list(progress.progress("abcdefgh", total=10, initial=2, description="work", file=log)) == list("abcdefgh")
    assert log.getvalue().splitlines() == [
        "work: 5 of 10, 0.2 per second, 20 s left",
        "work: 8 of 10, 0.2 per second, 8 s left",
        "work: 10 of 10, 0.2 per second, 36.0 s",
    ]


def test_progress_on_a_terminal():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    assert list(progress.progress("abc", total=3, description="work", file=terminal)) == list("abc")
    assert "work: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
