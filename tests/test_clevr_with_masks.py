"""Importing CLEVR with masks: records that a slow writer made, HDF5 copies, and one clear error per fault."""

import gzip
import re
import struct

import h5py
import numpy as np
import pytest
import torch

from setpred.commands.data import main
from setpred.data import clevr_with_masks, tfrecord
from setpred.data.clevr_with_masks import CODES, PLACE
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import verify
from setpred.schema import CLEVR

HEIGHT, WIDTH, SQUARE, K = 12, 20, np.s_[1:11, 5:15], 11


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Images of 20x12 pixels, cut to 10x10."""
    for name, value in (("HEIGHT", HEIGHT), ("WIDTH", WIDTH), ("SQUARE", SQUARE)):
        monkeypatch.setattr(clevr_with_masks, name, value)


# The writer, by the specifications alone


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def checksum(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def message(field: int, content: bytes) -> bytes:
    return varint(8 * field + 2) + varint(len(content)) + content


def feature(value, *, how: str = "published") -> bytes:
    """Bytes as strings of one byte each, or as one string; floats packed or one by one."""
    if value.dtype == np.uint8:
        parts = [value.tobytes()] if how == "other" else [bytes([byte]) for byte in value.ravel().tolist()]
        return message(1, b"".join(message(1, part) for part in parts))
    if how == "other":
        return message(2, b"".join(varint(8 + 5) + struct.pack("<f", number) for number in value.ravel().tolist()))
    return message(2, message(1, value.astype("<f4").tobytes()))


def entry(name: str, kind: int, content: bytes) -> bytes:
    """A feature of any content."""
    return message(1, message(1, message(1, name.encode()) + message(2, message(kind, content))))


def example(features: dict[str, np.ndarray], **how) -> bytes:
    entries = (message(1, message(1, name.encode()) + message(2, feature(v, **how))) for name, v in features.items())
    return message(1, b"".join(entries))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def scene(seed: int, objects: int) -> dict[str, np.ndarray]:
    """Features of an example as the published ones: the background first, then `objects`, then nothing."""
    rng = np.random.default_rng(seed)
    entities = rng.integers(0, objects + 1, (HEIGHT, WIDTH))
    one_hot = (entities == np.arange(K)[:, None, None]).astype(np.uint8) * 255
    there = np.arange(K) <= objects
    codes = {name: (rng.integers(1, count + 1, K) * there * (np.arange(K) > 0)) for name, count in CODES.items()}
    floats = {name: (rng.uniform(-3, 3, K) * there).astype(np.float32) for name in (*PLACE, "rotation")}
    pixels = {"pixel_coords": rng.uniform(0, 9, (K, 3)).astype(np.float32), "visibility": there.astype(np.float32)}
    image = {"image": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), "mask": one_hot[..., None]}
    return image | floats | pixels | {name: code.astype(np.uint8) for name, code in codes.items()}


SCENES = [scene(seed, objects) for seed, objects in enumerate((3, 7, 6, 10, 0))]


def write(path, scenes=SCENES, *, packed=True, **how):
    content = b"".join(record(example(each, **how)) for each in scenes)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def run(path, out, *options) -> int:
    command = ["import", "--clevr-with-masks", str(path), "--out", str(out), "--workers", "0", "--force"]
    return main([*command, "--image-size", "10", *map(str, options)])


def content(path) -> list[dict]:
    verify(path)
    return list(SetFile(path, instances=True))


def test_checksums_are_crc32c():
    assert tfrecord.crc32c(b"123456789") == crc32c(b"123456789") == 0xE3069283
    rng = np.random.default_rng(0)
    for size in (*range(10), 63, 64, 65, 127, 128, 1000, 4097, 9999):
        data = rng.bytes(size)
        assert tfrecord.crc32c(data) == crc32c(data)


@pytest.mark.parametrize("how", ["published", "other", "unpacked"])
def test_records_become_images_sets_and_masks(how, tmp_path, capsys):
    path = write(tmp_path / "a.tfrecords", packed=how != "unpacked", how=how)
    assert run(path, tmp_path / "a.h5") == 0
    assert "5 images of 10x10 with masks, 26 objects" in capsys.readouterr().out
    data = SetFile(tmp_path / "a.h5")
    for each, found in zip(SCENES, content(tmp_path / "a.h5"), strict=True):
        np.testing.assert_array_equal(found["image"].permute(1, 2, 0), each["image"][SQUARE])
        np.testing.assert_array_equal(found["instances"], each["mask"][..., 0].argmax(0)[SQUARE])
        objects = data.schema.decode(found["elements"].numpy())
        assert len(objects) == each["visibility"].sum() - 1
        for entity, obj in enumerate(objects, start=1):
            np.testing.assert_allclose(obj["coords"], [each[name][entity] for name in PLACE], atol=1e-5)
            assert all(obj[name] == str(each[name][entity]) for name in CODES)


def test_clevr6_and_ranges(tmp_path, capsys):
    path = write(tmp_path / "a.tfrecords")
    for options, numbers in (
        (("--max-objects", 6), [0, 2, 4]),
        (("--records", 1, 4), [1, 2, 3]),
        (("--records", 2, 5, "--max-objects", 9), [2, 4]),
    ):
        assert run(path, tmp_path / "b.h5", *options) == 0
        data = SetFile(tmp_path / "b.h5")
        assert data.image_index.tolist() == numbers
        assert data.schema.max_objects == (options[-1] if "--max-objects" in options else 10)
    assert run(path, tmp_path / "c.h5", "--records", 5, 6) == 2
    assert "expected records 5 to 5, got 0 records" in capsys.readouterr().err


def test_names_of_the_codes_make_it_clevr(tmp_path):
    """With the names that a user gives, the file has the elements of a CLEVR folder."""
    names = {field.name: dict(enumerate(field.classes, start=1)) for field in CLEVR.categorical}
    lines = [
        f"  {field}: {{classes: {{{', '.join(f'{k}: {v}' for k, v in each.items())}}}}}"
        for field, each in names.items()
    ]
    (tmp_path / "names.yaml").write_text("\n".join(["name: clevr", "fields:", *lines]))
    assert run(write(tmp_path / "a.tfrecords"), tmp_path / "a.h5", "--schema", tmp_path / "names.yaml") == 0
    data = SetFile(tmp_path / "a.h5", schema=CLEVR)
    for each, found in zip(SCENES, data, strict=True):
        for entity, obj in enumerate(CLEVR.decode(found["elements"].numpy()), start=1):
            assert all(obj[field] == names[field][each[field][entity]] for field in names)


def stack(scenes, name):
    return np.stack([each[name] for each in scenes])


def write_copy(path, kind, scenes=SCENES):
    """As HHousen/object-discovery-pytorch, addtt/object-centric-library or pemami4911/EfficientMORL write them."""
    with h5py.File(path, "w") as file:
        for name in scenes[0]:
            value = stack(scenes, name)
            if kind == "labels":
                value = value.argmax(1) if name == "mask" else value[..., None] if value.ndim == 2 else value
            if kind != "group" or name in ("image", "mask"):
                place = {"image": "train/imgs", "mask": "train/masks"}[name] if kind == "group" else name
                file.create_dataset(place, data=value, compression="gzip")
    return path


@pytest.mark.parametrize("kind", ["arrays", "labels", "group"])
def test_copies_give_what_the_published_file_gives(kind, tmp_path):
    path = write_copy(tmp_path / "copy.h5", kind)
    assert run(write(tmp_path / "a.tfrecords"), tmp_path / "a.h5") == 0
    assert run(path, tmp_path / "b.h5", *(["--group", "train"] if kind == "group" else [])) == 0
    data = SetFile(tmp_path / "b.h5")
    for each, one, other in zip(SCENES, content(tmp_path / "a.h5"), content(tmp_path / "b.h5"), strict=True):
        assert torch.equal(one["image"], other["image"])
        if kind != "group":
            assert torch.equal(one["elements"], other["elements"])
            assert torch.equal(one["instances"], other["instances"])
            continue
        entities = each["mask"][..., 0].argmax(0)[SQUARE]  # no attributes: centres of the visible pixels
        numbers = [number for number in np.unique(entities) if number]
        np.testing.assert_array_equal(other["instances"], np.searchsorted([0, *numbers], entities))
        expected = [np.argwhere(entities == number).mean(0)[::-1] + 0.5 for number in numbers]
        found = [obj["coords"] for obj in data.schema.decode(other["elements"].numpy())]
        np.testing.assert_allclose(np.reshape(found, (-1, 2)), np.reshape(expected, (-1, 2)), atol=1e-4)


def without(name):
    return {key: value for key, value in SCENES[2].items() if key != name}


def damaged(number: int, at: int) -> bytes:
    """The file, not packed, with a changed byte of a record."""
    parts = [bytearray(record(example(each))) for each in SCENES]
    parts[number][at] ^= 4
    return b"".join(parts)


WHOLE = b"".join(record(example(each)) for each in SCENES)
START = sum(len(record(example(each))) for each in SCENES[:2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WHOLE[: START + 5], "record 2: the file ends within it"),
        (WHOLE[: START + 500], "record 2: the file ends within it"),
        (WHOLE[:-2], "record 4: the file ends within it"),
        (gzip.compress(WHOLE)[:-3000], r"record \d: the file is cut short or damaged"),
        (gzip.compress(WHOLE)[:-6], r"record \d: the file is cut short or damaged"),
        (damaged(2, 0), "record 2: the checksum of its length is wrong"),
        (damaged(2, 9), "record 2: the checksum of its length is wrong"),
        (damaged(2, 2000), "record 2: expected checksum [0-9a-f]{8}, got another"),
        (damaged(2, -1), "record 2: expected checksum [0-9a-f]{8}, got another"),
        (record(b"\x0a\xff\xff"), "record 0: expected a tf.train.Example"),
        (record(b"none"), "record 0: expected a tf.train.Example|record 0: expected a feature 'visibility'"),
        *(
            (
                record(example(SCENES[0]) + entry(name, kind, b"\x0a\x09\x00")),
                f"record 0, feature '{name}': it ends with",
            )
            for name, kind in (("image", 1), ("x", 2), ("visibility", 2))
        ),
        (struct.pack("<Q", 2**40) + checksum(struct.pack("<Q", 2**40)), "record 0: expected at most"),
        (b"hello, this is no such file", "record 0: the checksum of its length is wrong"),
        (b"", "expected records 0 to the last, got 0 records"),
    ],
)
def test_damaged_files_are_rejected(content, words, tmp_path, capsys):
    (tmp_path / "a.tfrecords").write_bytes(content)
    assert run(tmp_path / "a.tfrecords", tmp_path / "a.h5") == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(words, sentence), sentence
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("features", "words"),
    [
        *((without(name), f"record 1: expected a feature '{name}', got ") for name in ("image", "mask", "x", "shape")),
        (SCENES[2] | {"image": np.zeros(9, np.uint8)}, "record 1, feature 'image': expected 720 values, got 9"),
        (SCENES[2] | {"visibility": np.zeros(9, np.float32)}, "feature 'visibility': expected 11 values, got 9"),
        (SCENES[2] | {"x": np.zeros(11, np.uint8)}, "record 1, feature 'x': expected floats, got a list of another"),
        (SCENES[2] | {"color": np.full(11, 9, np.uint8)}, "record 1: expected color from 1 to 8, got 9"),
        (SCENES[2] | {"x": np.full(11, np.nan, np.float32)}, "record 1: .*coords"),
        (
            SCENES[2] | {"visibility": (np.arange(K) < 4).astype(np.float32)},
            "record 1: the mask has pixels of entity 4, which is no object there",
        ),
    ],
)
def test_records_with_a_fault_are_rejected(features, words, tmp_path, capsys):
    path = write(tmp_path / "a.tfrecords", [SCENES[0], features])
    assert run(path, tmp_path / "a.h5") == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": np.zeros((2, 8, 8, 3), np.uint8)}, "expected an array mask or masks, got image"),
        ({"image": np.zeros((2, 8, 8, 1), np.uint8), "mask": np.zeros((2, 8, 8))}, r"expected images uint8"),
        ({"image": np.zeros((2, 8, 8, 3), np.uint8), "mask": np.zeros((2, 8, 9))}, r"expected masks of 8x8 pixels"),
        ({"image": np.zeros((2, 8, 8, 3), np.uint8), "mask": np.zeros((3, 8, 8))}, "as many masks and attributes"),
        (
            {"image": np.zeros((2, 8, 8, 3), np.uint8), "mask": h5py.ExternalLink("/etc/passwd", "/mask")},
            "in this file",
        ),
        ({"image": np.zeros((2, 8, 9, 3), np.uint8), "mask": np.zeros((2, 8, 9))}, "or squares, got 9x8"),
        ({"imgs": np.zeros((2, 8, 8, 3), np.uint8), "masks": np.full((2, 8, 8), 300)}, "expected entities 0 to 255"),
        ({"train/imgs": np.zeros((2, 8, 8, 3), np.uint8)}, "got train; pass --group"),
    ],
)
def test_copies_with_a_fault_are_rejected(arrays, words, tmp_path, capsys):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, value in arrays.items():
            file[name] = value
    assert run(tmp_path / "a.h5", tmp_path / "b.h5") == 2
    assert re.search(words, capsys.readouterr().err)


def test_options_of_other_sources_are_errors(tmp_path, capsys):
    path = write(tmp_path / "a.tfrecords")
    for options, words in (
        (["--csv", tmp_path / "a.csv"], "expected one of --csv, --coco, --npz, --clevr-with-masks, got --csv and"),
        (["--xy", "centre"], "--xy: expected --csv with it, got --clevr-with-masks"),
        (["--units", "given"], "--units: expected --csv or --coco or --npz with it"),
        (["--group", "train"], "expected an HDF5 file for the group 'train'"),
        (["--max-objects", 0], "at least 1 object"),
        (["--records", 3, 3], "FIRST < END"),
    ):
        assert run(path, tmp_path / "a.h5", *options) == 2
        assert words in capsys.readouterr().err
