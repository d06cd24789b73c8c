"""Damaged and hostile files of five kinds: refused with a sentence, or read as what they are; nothing else.

The law for every file, whatever its bytes:

- it is refused by an `InputError` (train.py: a sentence and status 2), or accepted. No other exception, no crash, no
  hang, and no more memory than `reading.MEMORY`;
- where the format has a checksum (prepared files by `verify`, checkpoints, releases) and bytes were damaged, what is
  accepted is the original's content. `SetFile` does not compare the checksum of the images, which costs reading them
  all; it notices damage of the structure and of sets that are none, and `python -m setpred data verify` the rest;
- what is accepted else (JSON, pictures and configurations have no checksum of ours, files made to deceive have a right
  one) is well-formed: finite numbers, the right shapes, sets that are sets.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import h5py
import mutations as m
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reading import Reader
from tiny import CONFIG, untrained

from setpred import InputError
from setpred.checkpoint import weights
from setpred.checkpoint.load import KEY, load_checkpoint
from setpred.checkpoint.release import export
from setpred.data.scenes import render_file
from setpred.decoders.starts import GaussianStart, LearnedStart, RandomStart

FEW, MANY = 45, 500  # of each kind
MEMORY = re.compile(r"(cannot|can.t|not enough|unable to|bad.)\W*alloc|out of memory|MemoryError", re.IGNORECASE)
OBJECT = {"color": "red", "shape": "cube", "material": "metal", "size": "large", "rotation": 30.0}


def scenes(images: int = 3) -> dict:
    """Annotations in CLEVR's form."""
    objects = [
        OBJECT | {"3d_coords": [number - 1.0, 0.5 * number, 0.7], "pixel_coords": [100 + 50 * number, 150, 10.0]}
        for number in range(3)
    ]
    relations = {"left": [[1], [2], []], "right": [[], [0], [0, 1]]}
    records = [
        {"image_filename": f"CLEVR_val_{n:06}.png", "image_index": n, "split": "val", "objects": objects[: n + 1]}
        for n in range(images)
    ]
    return {"info": {"split": "val"}, "scenes": [record | {"relationships": relations} for record in records]}


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A folder with a whole file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("images/val", "scenes"):
        (folder / "clevr" / name).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(pixels + number).save(folder / "clevr" / "images" / "val" / f"CLEVR_val_{number:06}.png")
    (folder / "clevr" / "scenes" / "CLEVR_val_scenes.json").write_text(json.dumps(scenes()))
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        Image.fromarray(pixels).save(folder / f"picture.{kind}")
    shutil.copy(folder / "picture.png", folder / "seen.png")
    render_file(folder / "data.h5", images=6, image_size=16, objects=(1, 3))
    config = yaml.safe_load(CONFIG)
    data = {"train": str(folder / "data.h5"), "val": str(folder / "data.h5"), "image_size": 16, "batch_size": 2}
    config["data"] = {"class_path": "setpred.data.datamodule.SetDataModule", "init_args": data | {"set_size": 4}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(untrained(folder), folder / "model.ckpt")
    export(folder / "model.ckpt", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


# --- files ----------------------------------------------------------------------------------------------------------


def damaged_scenes(draw, whole: Path, folder: Path) -> tuple[Path, bool]:
    path = folder / "scenes" / "CLEVR_val_scenes.json"
    path.parent.mkdir(exist_ok=True)
    if not (folder / "images").exists():
        (folder / "images").symlink_to(whole / "clevr" / "images")
    original = whole / "clevr" / "scenes" / path.name
    if draw(st.booleans()):
        path.write_bytes(m.mutate_bytes(original.read_bytes(), draw(m.byte_mutations)))
    else:
        path.write_bytes(m.as_json(m.mutate_tree(scenes(), draw(m.tree_mutations))))
    return path, False


ATTRIBUTES = ("format", "version", "schema", "source", "images", "objects", "image_size", "producer", "sha256")
DATASETS = ("images", "elements", "camera", "index")


def rebuild(path: Path, original: Path, kind: int, place: int, value: int) -> None:
    """One change of a prepared file by h5py, as somebody would make it who knows the format."""
    nasty = m.NASTY[value % len(m.NASTY)]
    name, attribute = DATASETS[place % 4], ATTRIBUTES[place % 9]
    with h5py.File(original) as file:  # another change may have made it one that HDF5 cannot read without a crash
        data = file[name][()]
    with h5py.File(path, "r+") as file:
        if kind == 0:
            file.attrs[attribute] = json.dumps(nasty) if isinstance(nasty, list | dict) or nasty is None else nasty
        elif kind == 1:
            del file.attrs[attribute]
        elif kind == 2:
            text = file.attrs[("schema", "source")[place % 2]]
            tree = m.mutate_tree(json.loads(text), [(m.CHANGES[value % len(m.CHANGES)], place, value)])
            file.attrs[("schema", "source")[place % 2]] = m.as_json(tree).decode(errors="replace")
        elif kind == 3:
            file.attrs[attribute] = np.resize(data.ravel()[:4], (value % 5, 2))
        elif kind == 4:
            del file[name]
        elif kind == 5:
            del file[name]
            kinds = ("<f8", "<f4", "<i4", "|u1", ">f4", "|S8", "<c8", "|b1", "<i8")
            file[name] = np.zeros(data.shape, kinds[value % len(kinds)])
        elif kind == 6:
            shape = [(0, *data.shape[1:]), (*data.shape, 1), (10**9, *data.shape[1:]), (), (1,)][value % 5]
            del file[name]
            file.create_dataset(name, shape, data.dtype, chunks=(1, *shape[1:]) if shape and shape[0] else None)
        elif kind == 7:
            del file[name]
            compression = ("gzip", "lzf", "szip")[value % 2]
            file.create_dataset(name, data=data, compression=compression, chunks=(1, *data.shape[1:]))
        elif kind == 8:
            del file[name]
            links = (h5py.SoftLink("/images"), h5py.SoftLink(f"/{name}"), h5py.ExternalLink(path.name, name))
            file[name] = (*links, h5py.ExternalLink("/etc/passwd", name))[value % 4]
        elif kind == 9:
            del file[name]
            file.create_dataset(name, data.shape, data.dtype, external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])
        elif kind == 10:
            del file[name]
            layout = h5py.VirtualLayout(data.shape, data.dtype)
            layout[...] = h5py.VirtualSource(path.name, DATASETS[value % 4], data.shape)
            file.create_virtual_dataset(name, layout)
        elif kind == 11:
            del file[name]
            file.create_group(name)
        elif kind == 12 and data.size:
            found = data.copy()
            with np.errstate(all="ignore"):
                bad = (np.nan, np.inf, -1, 2, 0.5, 1e30, 0, 2**40)[value % 8]
                found.flat[place % data.size] = np.float64(bad).astype(data.dtype)
            file[name][...] = found
        elif kind == 13:
            file.attrs["images"], file.attrs["image_size"] = (value % 9, 10**6, -1, 2**62)[value % 4], place % 40
        else:
            file.move(name, f"{name}2")


def damaged_hdf5(draw, whole: Path, folder: Path) -> tuple[Path, bool]:
    path = folder / "damaged.h5"
    content = (whole / "data.h5").read_bytes()
    if draw(st.booleans()):
        path.write_bytes(m.mutate_bytes(content, draw(m.byte_mutations)))
        return path, True
    path.write_bytes(content)
    for kind, place, value in draw(m.container_mutations):
        try:
            rebuild(path, whole / "data.h5", kind % 15, place, value)
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, OverflowError):
            break  # h5py does not write such a file
    return path, True


def damaged_image(draw, whole: Path, folder: Path) -> tuple[Path, bool]:
    path = folder / "damaged.png"
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["png", "png", "png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
        path.write_bytes(m.mutate_bytes((whole / f"picture.{kind}").read_bytes(), draw(m.byte_mutations)))
    else:
        content = (whole / "picture.png").read_bytes()
        path.write_bytes(m.applied(m.mutate_png, content, draw(m.container_mutations)))
    return path, False


def damaged_config(draw, whole: Path, folder: Path) -> tuple[Path, bool]:
    path = folder / "config.yaml"
    content = (whole / "config.yaml").read_bytes()
    if draw(st.integers(0, 2)) == 0:
        path.write_bytes(m.mutate_bytes(content, draw(m.byte_mutations)))
    else:
        tree = m.mutate_tree(yaml.safe_load(content), draw(m.tree_mutations))
        path.write_bytes(m.as_text(yaml.safe_dump(tree, sort_keys=False)).encode(errors="surrogatepass"))
    return path, False


def changed(draw, content: dict) -> dict:
    """What a checkpoint holds with anything of it changed, or what its model is made of alone."""
    if draw(st.booleans()):
        return m.mutate_tree(content, draw(m.tree_mutations))
    model = m.mutate_tree(content[KEY]["model"], draw(m.tree_mutations))
    return content | {KEY: content[KEY] | {"model": model}}


def damaged_checkpoint(draw, whole: Path, folder: Path) -> tuple[Path, bool]:
    if not (folder / "seen.png").exists():
        shutil.copy(whole / "seen.png", folder)
    way = draw(st.sampled_from(["bytes", "content", "container"]))
    path = folder / draw(st.sampled_from(["damaged.ckpt", "damaged.safetensors"]))
    original = (whole / f"model{path.suffix}").read_bytes()
    if way == "bytes":
        path.write_bytes(m.mutate_bytes(original, draw(m.byte_mutations)))
        return path, True
    if way == "container":
        mutate, chosen = m.mutate_zip, m.container_mutations
        if path.suffix == weights.SUFFIX:
            mutate, chosen = m.mutate_safetensors, m.tree_mutations
        path.write_bytes(m.applied(mutate, original, draw(chosen)))
        return path, False
    try:
        if path.suffix == weights.SUFFIX:
            tensors, record = weights.unpack(whole / "model.safetensors")
            path.write_bytes(weights.pack(tensors, changed(draw, record)))
        else:
            content = torch.load(whole / "model.ckpt", weights_only=True)
            torch.save(changed(draw, dict(content)), path)
    except (TypeError, ValueError, RecursionError, AttributeError, UnicodeEncodeError):
        path.write_bytes(original[: len(original) // 3])  # such a file cannot be written
    return path, False


DAMAGED = {
    "scenes": ("clevr/scenes/CLEVR_val_scenes.json", damaged_scenes),
    "hdf5": ("data.h5", damaged_hdf5),
    "image": ("picture.png", damaged_image),
    "config": ("config.yaml", damaged_config),
    "checkpoint": ("model.ckpt", damaged_checkpoint),
}


def originals(reader: Reader, kind: str, whole: Path) -> dict[str, dict]:
    """What whole files say, by their suffix."""
    paths = [whole / DAMAGED[kind][0], *([whole / "model.safetensors"] if kind == "checkpoint" else [])]
    found = {path.suffix: reader(kind, path) for path in paths}
    assert all("content" in said for said in found.values()), found
    return found


def judge(said: dict, original: dict, *, checksum: bool) -> str:
    """Under which count a file comes; raises where the law is broken."""
    assert "fault" not in said, said["fault"]
    if "refused" in said:
        sentence = said["refused"].strip()
        assert len(sentence) > 20, sentence
        assert len(sentence) < 5000, sentence[:5000]
        assert "Traceback" not in sentence
        # a configuration may ask for a model of any size that the machine holds; a file with data has its own
        memory = None if said["kind"] == "config" else MEMORY.search(sentence)
        assert memory is None, f"took much memory: {sentence}"
        return "refused"
    same = said["content"] == original["content"]
    if checksum and said.get("verified", True):
        assert same, "damage that went unnoticed"
    if not said.get("verified", True):
        return "noticed by verify"
    return "read as the original" if same else "read as another whole file"


def fuzz(kind: str, count: int, reader: Reader, whole: Path, folder: Path) -> Counter:
    found: Counter = Counter()
    expected = originals(reader, kind, whole)

    @settings(
        max_examples=count,
        derandomize=True,  # the same files each time; a failing one is shrunk and printed
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data):
        path, checksum = DAMAGED[kind][1](data.draw, whole, folder)
        found[judge(reader(kind, path) | {"kind": kind}, expected[path.suffix], checksum=checksum)] += 1

    each()
    return found


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_or_whole(kind, reader, whole, tmp_path):
    found = fuzz(kind, FEW if kind != "config" else FEW // 4, reader, whole, tmp_path)
    assert found["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGED)
def test_many_damaged_files_are_refused_or_whole(kind, reader, whole, tmp_path, capsys):
    found = fuzz(kind, MANY, reader, whole, tmp_path)
    with capsys.disabled():
        print(f"\n{kind}: {sum(found.values())} files, " + ", ".join(f"{n} {name}" for name, n in found.items()))
    assert found.total() >= MANY


# --- found so, and mended -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [RandomStart, LearnedStart, GaussianStart])
@pytest.mark.parametrize("size", [(0, 19), (-4, 19), (4, 0)])
def test_sets_of_no_elements_are_refused_where_they_are_asked_for(start, size):
    """A checkpoint with set_size -4 fitted its weights, and the first prediction failed without a sentence."""
    with pytest.raises(InputError, match="expected sets of at least 1 element"):
        start(*size)


def test_a_checkpoint_of_sets_of_no_elements_is_refused(whole, tmp_path):
    tensors, record = weights.unpack(whole / "model.safetensors")
    record[KEY]["model"]["decoder"]["init_args"]["set_size"] = -4
    path = tmp_path / "negative.safetensors"
    path.write_bytes(weights.pack(tensors, record))
    with pytest.raises(InputError, match="at least 1 element"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("latent_dim: 16", "latent_dim: -16"),  # torch's own error went through
        ("batch_size: 2", f"batch_size: {'9' * 4000}"),  # what was said had the value in it, many times
        ("set_size: 4", f"set_size: {list(range(1900))}"),
    ],
)
def test_configurations_that_were_not_refused_with_a_sentence(old, new, whole, tmp_path, reader):
    path = tmp_path / "config.yaml"
    text = (whole / "config.yaml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert judge(reader("config", path) | {"kind": "config"}, {"content": ""}, checksum=False) == "refused"
