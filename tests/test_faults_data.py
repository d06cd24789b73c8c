"""What users and systems get wrong with data: one clear sentence each, and nothing is lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from setpred import CLEVR, ElementSchema, InputError, files
from setpred.commands.data import main
from setpred.data import hdf5_writer as writer
from setpred.data.dataset import SetFile, open_data
from setpred.data.hdf5 import verify
from setpred.data.scenes import render_file
from setpred.schema import continuous

SMALL = {"images": 6, "image_size": 16, "objects": (1, 3)}


@pytest.fixture
def file(tmp_path, made) -> Path:
    return Path(shutil.copy(made, tmp_path / "a.h5"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "made.h5"
    render_file(path, **SMALL)
    return path


# Writing


def test_no_room_is_said_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.h5.*the disk is full.*the file takes 0\.0 MB"):
        render_file(tmp_path / "a.h5", **SMALL)
    assert os.listdir(tmp_path) == []


# A limit on the size of files that falls while the file is written, with the disk space not taken beforehand: the
# system then refuses real writes under HDF5, as a full disk does.
NO_MORE_ROOM = """
import os, resource, sys
from setpred.data import hdf5_writer as writer
from setpred.data import scenes as rendered
from setpred.commands.data import main

def limited(function, items, *, workers):
    for numbers in items:
        if 20 in numbers:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        yield function(numbers)

if hasattr(os, "posix_fallocate"):
    del os.posix_fallocate
rendered.ordered_map, rendered.BLOCK, writer.SECONDS_BETWEEN_COMMITS = limited, 10, 0
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_leaves_what_was_done(tmp_path):
    path = tmp_path / "a.h5"
    arguments = [
        "render",
        "--images",
        "40",
        "--image-size",
        "16",
        "--objects",
        "1",
        "2",
        "--workers",
        "0",
        "--out",
        path,
    ]
    done = subprocess.run([sys.executable, "-c", NO_MORE_ROOM, *arguments], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the same command goes on from there" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["a.h5.partial"]
    with h5py.File(tmp_path / "a.h5.partial", "r") as partial:
        assert writer.rows_done(partial) == 20
    assert main([str(argument) for argument in arguments]) == 0
    verify(path)


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EIO, "check the disk")],
)
def test_an_error_on_the_last_step_publishes_nothing(tmp_path, monkeypatch, operation, number, words):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as context:
        context.setattr(os, operation, fail)
        with pytest.raises(InputError, match=rf"cannot write .*a\.h5.*{words}"):
            render_file(tmp_path / "a.h5", **SMALL)
    assert os.listdir(tmp_path) == ["a.h5.partial"]
    render_file(tmp_path / "a.h5", **SMALL)
    verify(tmp_path / "a.h5")


def test_no_permission(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"cannot write .*a\.h5: no permission"):
        render_file(tmp_path / "a.h5", **SMALL)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "folder").write_text("not a folder")
    for path in (tmp_path / "folder" / "a.h5", tmp_path / "folder" / "deeper" / "a.h5"):
        with pytest.raises(InputError, match="is a file, not a folder"):
            render_file(path, **SMALL)
    with pytest.raises(InputError, match="a folder has this name"):
        render_file(tmp_path, **SMALL)


def test_small_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    files.write_atomically(path, "before")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for operation in ("fsync", "replace"):
        with monkeypatch.context() as context:
            context.setattr(os, operation, fail)
            with pytest.raises(InputError, match=r"cannot write .*a\.json: the disk is full"):
                files.write_atomically(path, "after")
        assert path.read_text() == "before"
        assert os.listdir(path.parent) == ["a.json"]
    files.write_atomically(path, b"after")
    assert path.read_bytes() == b"after"


# Prepared files


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*a\.h5$"):
        SetFile(tmp_path / "a.h5")
    (tmp_path / "a.h5.partial").touch()
    with pytest.raises(InputError, match=r"a\.h5\.partial lies there: run the command that makes it again"):
        SetFile(tmp_path / "a.h5")


def test_not_an_hdf5_file(tmp_path):
    (tmp_path / "a.h5").write_text("hello")
    for use in (SetFile, verify):
        with pytest.raises(InputError, match="is not an HDF5 file"):
            use(tmp_path / "a.h5")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file(file, kept):
    os.truncate(file, int(file.stat().st_size * kept))
    for use in (SetFile, verify):
        with pytest.raises(InputError, match="cut short or damaged"):
            use(file)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(file):
    """No flip raises anything but an `InputError`, and none that passes `verify` changes what is read."""
    good = file.read_bytes()
    expected = SetFile(file).__getitems__(range(6))
    rng = np.random.default_rng(0)
    noticed = 0
    for where, bit in zip(rng.integers(len(good), size=60), rng.integers(8, size=60), strict=True):
        bad = bytearray(good)
        bad[where] ^= 1 << bit
        file.write_bytes(bad)
        try:
            verify(file)
            got = SetFile(file).__getitems__(range(6))
        except InputError:
            noticed += 1
        else:
            assert all((got[name] == expected[name]).all() for name in expected)
    assert noticed > 25  # half of a file as small as this is content


def test_a_foreign_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as foreign:
        foreign["images"] = np.zeros(3)
    with pytest.raises(InputError, match="not one of setpred's"):
        SetFile(tmp_path / "a.h5")


def test_a_newer_version(file):
    with h5py.File(file, "r+") as handle:
        handle.attrs["version"] = 99
    with pytest.raises(InputError, match="format version 99, this setpred reads 1"):
        SetFile(file)


def test_another_layout(file):
    with h5py.File(file, "r+") as handle:
        del handle["camera"]
        handle["camera"] = np.zeros((6, 2))
    with pytest.raises(InputError, match=r"expected camera \[6, 3\] <f8, got \[6, 2\] float64"):
        SetFile(file)


def test_another_image_size(file):
    with pytest.raises(InputError, match=r"expected images of 32x32, but .* has 16x16.*--image-size 32"):
        open_data(file, image_size=32)


def test_another_schema(file):
    other = ElementSchema("clevr", [continuous("coords", 3, scale=2.0), *CLEVR.fields[1:]], max_objects=10)
    with pytest.raises(InputError, match="another schema than the model: field 'coords'"):
        open_data(file, image_size=16, schema=other)


def test_larger_sets_than_the_model_holds(file):
    counts = SetFile(file).__getitems__(range(6))["mask"].sum(1)
    first = int((counts == 3).int().argmax())
    with pytest.raises(InputError, match=f"image {first} has 3 objects, but the model holds sets of at most 2"):
        open_data(file, image_size=16, set_size=2)


# Commands


def test_commands_answer_with_one_sentence(tmp_path, file, capsys):
    output = ["--out", str(tmp_path / "b.h5")]
    for arguments, words in [
        (["verify", str(tmp_path / "none.h5")], "there is no file"),
        (["info", str(tmp_path)], "there is no file"),
        (["render", "--images", "0", *output], "at least 1 image"),
        (["render", "--images", "1000000000000", *output], "at most 100000000 images"),
        (["render", "--images", "1", "--image-size", "100000", *output], "at most 4096x4096 pixels"),
        (["render", "--images", "3", "--objects", "5", "4", *output], "least <= most"),
        (["render", "--images", "3", "--workers", "-1", *output], "--workers"),
        (["render", "--images", "3", "--image-size", "8", "--out", str(file)], "exists already"),
        (["prepare", str(tmp_path / "none"), *output], "is no folder"),
        (["prepare", str(tmp_path), "--split", "test", *output], "'test'"),
        (["prepare", str(tmp_path), "--images", "0", *output], "at least 1 image"),
    ]:
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("error: ")
        assert words in said[0]
    assert os.listdir(tmp_path) == ["a.h5"]


def test_unknown_options_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["render", "--images", "3", "--out", str(tmp_path / "b.h5"), "--sede", "3"])
    assert stopped.value.code == 2
    assert "--sede" in capsys.readouterr().err
