"""Files of sets: what goes in comes out, whatever happens on the way; a name never stands for half a file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from setpred import CLEVR, InputError
from setpred.commands.data import main
from setpred.data import hdf5_writer as writer
from setpred.data.hdf5 import Header, Record, open_set_file, read_header, verify
from setpred.data.info import describe
from setpred.data.scenes import render_file, rendered_header
from setpred.data.workers import ordered_map
from setpred.files import locked

HEADER = Header(7, 8, CLEVR, {"kind": "test"})


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


def write(
    path: Path, records: list[Record], *, header: Header = HEADER, stop: int | None = None, **options
) -> list[int]:
    """Writes the records, fails at number `stop`; returns the numbers asked for."""
    asked = []

    def produce(start):
        for number in range(start, len(records)):
            assert options.get("force") or not path.exists()
            if number == stop:
                raise InputError("stopped")
            asked.append(number)
            yield records[number]

    writer.write_set_file(path, header, produce, **{"producer": "p", "description": "test"} | options)
    return asked


def test_what_goes_in_comes_out(tmp_path):
    records = some_records()
    write(tmp_path / "new" / "a.h5", records)
    with open_set_file(tmp_path / "new" / "a.h5") as file:
        assert read_header(file, "a").to_json() == HEADER.to_json()
        for name, part in (("images", 0), ("elements", 1), ("camera", 2), ("index", 3)):
            np.testing.assert_array_equal(file[name][:], np.stack([record[part] for record in records]))
        assert file["images"].chunks == (1, 8, 8, 3)
        assert file.attrs["objects"] == sum(record.elements[:, -1].sum() for record in records)
    assert verify(tmp_path / "new" / "a.h5").images == 7
    assert os.listdir(tmp_path / "new") == ["a.h5"]


def test_rendering_depends_on_the_seed_and_the_number_only(tmp_path):
    arguments = {"image_size": 16, "objects": (0, 4)}
    alone = render_file(tmp_path / "a.h5", images=9, seed=5, workers=0, **arguments)
    assert render_file(tmp_path / "b.h5", images=9, seed=5, workers=2, **arguments) == alone
    assert render_file(tmp_path / "c.h5", images=9, seed=6, workers=0, **arguments) != alone
    render_file(tmp_path / "d.h5", images=4, seed=5, workers=0, **arguments)
    with open_set_file(tmp_path / "a.h5") as nine, open_set_file(tmp_path / "d.h5") as four:
        for name in ("images", "elements", "camera", "index"):
            np.testing.assert_array_equal(nine[name][:4], four[name][:])
        assert np.isfinite(nine["camera"][:]).all()


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_stopped_file_goes_on_and_ends_the_same(tmp_path, stop, capsys):
    records, path, whole = some_records(), tmp_path / "a.h5", tmp_path / "b.h5"
    write(whole, records)
    with pytest.raises(InputError, match="stopped"):
        write(path, records, stop=stop)
    assert sorted(os.listdir(tmp_path)) == ["a.h5.partial", "b.h5"]
    assert write(path, records) == list(range(stop, 7))
    assert f"goes on after {stop} of 7" in capsys.readouterr().err
    assert content(path) == content(whole)


@pytest.mark.parametrize(
    "change",
    [{"producer": "q"}, {"header": Header(7, 8, CLEVR, {"kind": "other"})}, {"damage": True}],
    ids=["code", "source", "damaged"],
)
def test_a_partial_file_of_something_else_is_not_continued(tmp_path, change, capsys):
    records, path = some_records(), tmp_path / "a.h5"
    with pytest.raises(InputError, match="stopped"):
        write(path, records, stop=4)
    if change.pop("damage", False):
        os.truncate(tmp_path / "a.h5.partial", 2000)
    assert write(path, records, **change) == list(range(7))
    assert "starting again" in capsys.readouterr().err
    verify(path)


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path):
    records, path = some_records(), tmp_path / "a.h5"
    write(path, records)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"exists already.*--force"):
        write(path, records)
    other = Header(7, 8, CLEVR, {"kind": "other"})
    with pytest.raises(InputError, match="stopped"):
        write(path, records, header=other, force=True, stop=5)
    assert path.read_bytes() == before
    write(path, records, header=other, force=True)
    with open_set_file(path) as file:
        assert read_header(file, path).source == {"kind": "other"}


def test_two_cannot_write_one_file(tmp_path):
    partial = tmp_path / "a.h5.partial"
    with locked(partial), pytest.raises(InputError, match=r"another process is writing .*a\.h5\.partial"):
        write(tmp_path / "a.h5", some_records())
    write(tmp_path / "a.h5", some_records())
    verify(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["images", "elements", "camera", "index"])
def test_a_changed_number_is_noticed(tmp_path, name):
    path = tmp_path / "a.h5"
    write(path, some_records())
    with h5py.File(path, "r+") as file:
        position = (5,) + (0,) * (file[name].ndim - 1)
        file[name][position] = file[name][position] + 1
    with pytest.raises(InputError, match=r"SHA-256 differs|malformed|have one number"):
        verify(path)


@pytest.mark.parametrize("attribute", ["source", "schema", "sha256", "objects"])
def test_a_changed_attribute_is_noticed(tmp_path, attribute):
    path = tmp_path / "a.h5"
    write(path, some_records())
    with h5py.File(path, "r+") as file:
        value = file.attrs[attribute]
        replaced = {"source": ("test", "tess"), "schema": ("cyan", "cyam"), "sha256": (value and str(value)[:1], "x")}
        file.attrs[attribute] = value.replace(*replaced[attribute]) if attribute in replaced else value + 1
    with pytest.raises(InputError, match="SHA-256 differs"):
        verify(path)


def test_flipped_bytes_of_the_content_are_noticed(tmp_path):
    path = tmp_path / "a.h5"
    records = some_records()
    write(path, records)
    content = bytearray(path.read_bytes())
    where = content.find(records[4].image.tobytes())
    assert where > 0
    content[where + 17] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="SHA-256 differs"):
        verify(path)


@pytest.mark.parametrize(
    ("damage", "where"),
    [(np.nan, (0, 0)), (0.5, (0, 18)), (1.0, (9, 2)), (1.0, (0, slice(5, 13)))],
    ids=["nan", "half present", "full padding", "two classes"],
)
def test_a_malformed_set_is_noticed(tmp_path, damage, where):
    elements = CLEVR.encode(
        [{"coords": (1, 2, 0), "material": "metal", "color": "red", "shape": "cube", "size": "small"}]
    )
    elements[where] = damage
    record = Record(np.zeros((8, 8, 3), np.uint8), elements, np.zeros(3), 41)
    write(tmp_path / "a.h5", [record], header=Header(1, 8, CLEVR, {}))
    with pytest.raises(InputError, match="set of image 41 is malformed"):
        verify(tmp_path / "a.h5")


def test_a_description_counts(tmp_path):
    path = tmp_path / "a.h5"
    records = some_records()
    write(path, records)
    text = describe(path)
    present = [record.elements[:, -1] > 0 for record in records]
    red = sum(int(record.elements[rows, 9].sum()) for record, rows in zip(records, present, strict=True))
    assert f"7 images of 8x8, {sum(map(sum, present))} objects" in text
    assert "cameras   known for 6 images" in text
    assert "coords (3), material (2), color (8), shape (3), size (2), presence (1)" in text
    assert any(line.split()[:2] == ["red", str(red)] for line in text.splitlines())


def content(path: Path) -> dict[str, bytes]:
    with open_set_file(path) as file:
        arrays = {name: file[name][:].tobytes() for name in ("images", "elements", "camera", "index")}
        return arrays | {name: str(value).encode() for name, value in file.attrs.items()}


RENDER = ["render", "--images", "60", "--image-size", "16", "--objects", "0", "3", "--seed", "2", "--workers"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.h5"
    assert main([*RENDER, "0", "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_rendering_goes_on_and_ends_the_same(tmp_path, whole, blow):
    path, partial = tmp_path / "a.h5", tmp_path / "a.h5.partial"
    command = [sys.executable, "-c", SLOW, *RENDER, "2", "--out", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while committed(partial) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    assert os.listdir(tmp_path) == ["a.h5.partial"]
    if blow == signal.SIGINT:
        os.killpg(process.pid, blow)  # as a terminal does
    else:
        process.send_signal(blow)
    process.communicate(timeout=20)
    assert process.returncode == (-9 if blow == signal.SIGKILL else 130)
    assert os.listdir(tmp_path) == ["a.h5.partial"]
    assert 4 <= committed(partial) < 60
    wait_for_the_end_of(process.pid)
    assert main([*RENDER, "0", "--out", str(path)]) == 0
    assert content(path) == content(whole)


# the command, but every image takes a while and is committed at once
SLOW = """
import sys, time
from setpred.data import hdf5_writer as writer
from setpred.data import scenes as rendered
from setpred.commands.data import main, stop_as_on_ctrl_c

def slowly(*arguments, **options):
    for record in fast(*arguments, **options):
        time.sleep(0.05)
        yield record

if __name__ == "__main__":
    fast, rendered.ordered_map, writer.SECONDS_BETWEEN_COMMITS = rendered.ordered_map, slowly, 0
    stop_as_on_ctrl_c()
    sys.exit(main(sys.argv[1:]))
"""


def committed(partial: Path) -> int:
    """Rows of a file that another process is writing."""
    try:
        with h5py.File(partial, "r", locking=False) as file:
            return writer.rows_done(file)
    except (OSError, KeyError):
        return 0


def wait_for_the_end_of(session: int) -> None:
    """Returns when no process of the session is left."""
    for _ in range(200):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("worker processes are left behind")


def double(number: int) -> int:
    if number == 13:
        os._exit(1)
    if number == 31:
        raise InputError("31 is not welcome")
    return 2 * number


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_map_keeps_the_order_and_the_errors(workers):
    results = ordered_map(double, range(14, 40), workers=workers)
    assert [next(results) for _ in range(17)] == [2 * number for number in range(14, 31)]
    with pytest.raises(InputError, match="31 is not welcome"):
        next(results)


def test_ordered_map_reports_a_dead_worker():
    with pytest.raises(InputError, match=r"worker process died.*fewer --workers"):
        list(ordered_map(double, range(30), workers=2))


def test_ordered_map_takes_no_more_than_it_needs():
    taken = []
    results = ordered_map(double, (taken.append(n) or n for n in range(100, 1000)), workers=1)
    assert next(results) == 200
    assert len(taken) < 20
    results.close()


def test_rendered_header_refuses_nonsense():
    good = {"images": 1, "image_size": 8, "objects": (0, 10), "seed": 0}
    assert rendered_header(**good).source == {"kind": "rendered", "objects": [0, 10], "seed": 0}
    for bad in ({"images": 0}, {"image_size": 4}, {"objects": (4, 3)}, {"objects": (0, 11)}, {"seed": -1}):
        with pytest.raises(InputError, match="expected"):
            rendered_header(**good | bad)
