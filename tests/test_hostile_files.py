"""Untrusted files: none runs code or takes more memory than its bytes, and each fault is one `InputError`."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file
from tiny import untrained
from torch import nn

from setpred import CLEVR, InputError
from setpred.checkpoint import load_checkpoint, read_checkpoint
from setpred.checkpoint.load import KEY, build
from setpred.checkpoint.weights import pack
from setpred.commands.evaluate import evaluate
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import Header, Record, verify
from setpred.data.hdf5_writer import write_set_file
from setpred.data.images import MOST_PIXELS, decoded, find_images, load_image

MODEST = 200e6  # bytes that rejecting a file may take


CUBE = {"material": "metal", "color": "red", "shape": "cube", "size": "small"}
FIELD = {"name": "a", "size": 1, "classes": [], "scale": 1.0}


@contextmanager
def rejected(words: str | None = None, canary: Path | None = None) -> Iterator[None]:
    """Check that the block raises a short `InputError` with these words, in modest memory, and runs no payload."""
    watched = os.access("/proc/self/clear_refs", os.W_OK)
    if watched:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS") if watched else 0
    with pytest.raises(InputError, match=words) as caught:
        yield
    assert not watched or memory("VmHWM") - before < MODEST
    assert len(str(caught.value)) < 1000
    assert canary is None or not canary.exists()


def memory(which: str) -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * float(next(line for line in status.splitlines() if line.startswith(which)).split()[1])


# --- checkpoints: code and objects ----------------------------------------------------------------------------------


class Calls:
    """Makes the unpickler call a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict[str, Any]:
    """The content of a valid checkpoint."""
    content = torch.load(untrained(tmp_path_factory.mktemp("run")), weights_only=True)
    return content | {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}]}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def released(path: Path, content: dict[str, Any]) -> Path:
    path.write_bytes(pack(content["state_dict"], {name: content[name] for name in ("epoch", "global_step", KEY)}))
    return path


def test_valid_files_are_loaded(content, tmp_path):
    tied = saved(tmp_path / "b.ckpt", content | {"tied": [content["state_dict"]] * 3})
    for path in (saved(tmp_path / "a.ckpt", content), tied, released(tmp_path / "c.safetensors", content)):
        loaded = load_checkpoint(path)
        assert (loaded.step, loaded.image_size, loaded.schema) == (5, 16, CLEVR)
        assert loaded.model.state_dict().keys() == {name.removeprefix("model.") for name in content["state_dict"]}
    strings = {"projection": "os.system", "list": ["os.system", {"a": 7}]}
    assert build(strings, {}) == strings  # which are never imported


@pytest.mark.parametrize("where", ["top", "state_dict", KEY, "list", "key"])
def test_payloads_are_not_run(where, content, tmp_path):
    canary = tmp_path / "canary"
    payload = Calls(os.system, f"touch {canary}")
    hostile = {
        "top": payload,
        "state_dict": content | {"state_dict": {"model.a": payload}},
        KEY: content | {KEY: content[KEY] | {"settings": payload}},
        "list": content | {"loops": [[payload]]},
        "key": content | {payload: 1},
    }[where]
    with rejected("could run code", canary):
        load_checkpoint(saved(tmp_path / "a.ckpt", hostile))
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(hostile))
    for path in (saved(tmp_path / "c.ckpt", hostile, _use_new_zipfile_serialization=False), tmp_path / "b.ckpt"):
        with rejected("expected a complete file of torch.save", canary):
            load_checkpoint(path)


def nested(levels: int, width: int = 1) -> list:
    inside: list = []
    for _ in range(levels):
        inside = [inside] * width
    return inside


def endless() -> list:
    inside: list = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(3, 3).to_sparse(), "expected dense tensors"),
        (lambda: {1, 2}, "of type set"),
        (lambda: torch.float32, "of type dtype"),
        (lambda: Calls(torch.Tensor, 10**9), "larger than the file"),
        (lambda: torch.zeros(1).expand(10**12), r"a \[1000000000000\] is larger than the file"),
        (lambda: nested(200), "in 64 levels, got more"),
        (endless, "in 64 levels, got more"),
        (lambda: nested(40, 40), "at most 200,000 values"),
    ],
)
def test_only_plain_values_of_bounded_size_are_read(make, words, content, tmp_path):
    path = saved(tmp_path / "a.ckpt", content | {"a": make()})
    with rejected(words):
        read_checkpoint(path)
    saved(path, content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/99", bytes(10**8))
    with rejected("larger than the file"):
        read_checkpoint(path)


# --- checkpoints: the description of the model ----------------------------------------------------------------------


def with_change(content: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of the content with another value at a place such as "setpred/model/encoder"."""
    changed = copy.deepcopy(content)
    *keys, last = (int(key) if key.isdigit() else key for key in place.split("/"))
    inside = changed
    for key in keys:
        inside = inside[key]
    inside[last] = value
    return changed


ENCODER, DECODER = "setpred/model/encoder", "setpred/model/decoder"
DESCENT = f"{DECODER}/init_args/descent"
SET_ENCODER = f"{DECODER}/init_args/objective/init_args/set_encoder/init_args"
BIAS = "state_dict/model.encoder.head.bias"
EVIL = {"class_path": "os.system", "init_args": {"command": "touch canary"}}
MLP = {
    "class_path": "setpred.decoders.MLPDecoder",
    "init_args": {"latent_dim": 8, "set_size": 4, "set_dim": CLEVR.set_dim},
}
RECORDS = [
    # sizes, rejected before memory is taken
    (f"{SET_ENCODER}/hidden_dim", 10**9, r"hidden_dim of at most 65536, got 1000000000"),
    (f"{DESCENT}/init_args/iterations", 10**12, r"iterations of at most 65536, got 1000000000000"),
    (f"{SET_ENCODER}/hidden_dim", 2**16, r"do not fit the SetPredictor"),
    # class paths
    (ENCODER, EVIL, "'os.system', which is not on the list"),
    (f"{DESCENT}/init_args/iterations", {"a": [[EVIL]]}, "'os.system', which is not on the list"),
    (f"{ENCODER}/class_path", "setpred.checkpoint.load.save_checkpoint", "which is not on the list"),
    # arguments
    (f"{DESCENT}/init_args/unheard", 1, "cannot be built"),
    (f"{ENCODER}/init_args/latent_dim", -1, "cannot be built"),
    (f"{DECODER}/init_args/set_size", -4, "at least 1 element"),
    (DECODER, {"class_path": "torch.nn.ReLU"}, "init_args of its decoder"),
    (ENCODER, MLP, "of its encoder"),
    ("setpred/model", None, "does not say how its model is built"),
    # the rest of the record
    ("setpred/data/image_size", 32, "its image_size is 32, but SmallCNN has 16"),
    ("setpred/schema/fields", [FIELD | {"size": 3}], "its set_dim is 4, but IDSPN has"),
    ("setpred/version", 99, "checkpoint format 99"),
    ("setpred", [1], "lacks the record"),
    ("setpred/seed", True, "its record is damaged"),
    ("setpred/data/image_size", 10**9, "its record is damaged .*from 1 to 4096"),
    ("setpred/schema", "clevr", "its record is damaged.*not a schema record"),
    ("epoch", -1, "its record is damaged"),
    ("global_step", 0.5, "its record is damaged"),
    # the weights
    (BIAS, torch.zeros(16, dtype=torch.int64), "do not fit.*head.bias"),
    (BIAS, torch.zeros(9), r"do not fit.*head.bias"),
    ("state_dict/model.extra", torch.zeros(9), r"do not fit.*extra"),
    (BIAS, torch.full((16,), torch.nan), r"head\.bias has non-finite numbers"),
    ("state_dict/model.encoder.trunk.0.1.running_var", torch.full((4,), torch.inf), "running_var has non-finite"),
    ("optimizer_states/0/state/0/exp_avg", torch.tensor([torch.nan]), r"optimizer_states.*exp_avg has non-finite"),
]


@pytest.mark.parametrize(("place", "value", "words"), RECORDS)
def test_records_that_describe_no_model_are_rejected(place, value, words, content, tmp_path):
    changed = with_change(content, place, value)
    with rejected(words, tmp_path / "canary"):
        load_checkpoint(saved(tmp_path / "a.ckpt", changed))
    if not place.startswith(("optimizer", "state_dict")):
        with rejected(words, tmp_path / "canary"):
            load_checkpoint(released(tmp_path / "a.safetensors", changed))


def test_non_finite_weights_can_be_read_on_purpose(content, tmp_path):
    path = saved(tmp_path / "a.ckpt", with_change(content, BIAS, torch.full((16,), torch.nan)))
    assert read_checkpoint(path, finite=False)["state_dict"]["model.encoder.head.bias"].isnan().all()


class Own(nn.Module):
    """A part whose constructor needs memory."""

    def __init__(self, token_dim: int = 4) -> None:
        super().__init__()
        self.in_dim = self.token_dim = token_dim
        assert torch.zeros(1).item() == 0


def test_parts_of_users_may_need_memory(content, tmp_path):
    path = saved(tmp_path / "a.ckpt", with_change(content, ENCODER, {"class_path": f"{__name__}.Own"}))
    with rejected("not on the list of allowed classes"):
        load_checkpoint(path)
    with rejected("gives tokens of 4 numbers"):  # so it was built
        load_checkpoint(path, allow=[f"{__name__}.Own"])
    with rejected("gives tokens of 4 numbers"):
        evaluate([str(path), "--allow", f"{__name__}.Own"])
    with rejected("cannot import"):
        load_checkpoint(path, allow=[f"{__name__}.Nope"])


# --- releases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ('{"epoch": NaN}', "not finite"),
        ('{"epoch": 1e999}', "'1e999' is not finite"),
        ('{"epoch": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"epoch": 1, "epoch": 2}', "a key comes twice"),
        ('{"state_dict": 0, "setpred": ' + '{"a": ' * 100 + "0" + "}" * 101, "checkpoint format"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_records_of_releases_are_plain(record, words, tmp_path, monkeypatch):
    path, load = tmp_path / "a.safetensors", json.dumps
    monkeypatch.setattr(json, "dumps", lambda value, **_: record if value == "record" else load(value))
    path.write_bytes(pack({"a": torch.zeros(2)}, "record"))
    with rejected(words):
        load_checkpoint(path)


def header(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        header(b"{}", size=2**63),
        header(b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}') + bytes(4),
    ],
)
def test_damaged_headers_of_releases_are_rejected(damaged, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(damaged)
    with rejected("is not a checkpoint, or is damaged"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_foreign_files_are_rejected(content, tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, content)
    released(tmp_path / "b.ckpt", content)
    for wrong in (path, tmp_path / "b.ckpt"):  # each under the other's suffix
        with rejected("is not a checkpoint, or is damaged"):
            load_checkpoint(wrong)
    for metadata, words in ((None, "lacks the record"), ({"format": "pt"}, "lacks"), ({"setpred": "{}"}, "checksum")):
        save_file({"a": torch.zeros(2)}, path, metadata)
        with rejected(words):
            load_checkpoint(path)
    with rejected("lacks the record"):
        load_checkpoint(saved(tmp_path / "a.ckpt", {"state_dict": {}}))


# --- prepared files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> bytes:
    """A valid file of three images."""
    path = tmp_path_factory.mktemp("prepared") / "prepared.h5"
    elements = CLEVR.encode([CUBE | {"coords": (1, 2, 0)}])
    records = [Record(np.full((8, 8, 3), n, np.uint8), elements, np.full(3, np.nan), n) for n in range(3)]
    header = Header(3, 8, CLEVR, {"kind": "test"})
    write_set_file(path, header, records, list, producer="p", description="")
    return path.read_bytes()


def replaced(name: str, **options: Any) -> Callable[[h5py.File], Any]:
    """Create a data set again, with options."""

    def change(file: h5py.File) -> None:
        before = file[name][:]
        del file[name]
        file.create_dataset(name, **({"data": before} | options))

    return change


def linked(name: str, link: Any) -> Callable[[h5py.File], Any]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 8, 8, 3), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "images", (3, 8, 8, 3))
    del file["images"]
    file.create_virtual_dataset("images", layout)


def claims(images: int) -> Callable[[h5py.File], Any]:
    """Claim a number of images without storing one."""

    def change(file: h5py.File) -> None:
        file.attrs["images"] = images
        for name, (shape, dtype) in Header(images, 8, CLEVR, {}).layout().items():
            del file[name]
            file.create_dataset(name, shape, dtype, chunks=(1, *shape[1:]))

    return change


def attribute(**changes: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.attrs.update(changes)


def schema(**changes: Any) -> Callable[[h5py.File], Any]:
    return attribute(schema=json.dumps(CLEVR.to_dict() | changes))


def number(name: str, at: Any, value: Any) -> Callable[[h5py.File], Any]:
    def change(file: h5py.File) -> None:
        file[name][at] = value

    return change


def names(content: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.__setitem__("names", content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (linked("images", h5py.ExternalLink("/etc/passwd", "/images")), "images"),
        (linked("camera", h5py.SoftLink("/elements")), "camera"),
        (replaced("images", data=None, shape=(3, 8, 8, 3), dtype="u1", external=[("/etc/passwd", 0, 576)]), "images"),
        (virtual, "images"),
        (replaced("images", compression="gzip"), "images"),
        (replaced("index", data=["a"] * 3, dtype=h5py.string_dtype()), "index"),
        (replaced("index", data=h5py.Empty("<i8")), "index|damaged"),
        (lambda file: (file.pop("index"), file.create_group("index")), "index as an array in this file"),
        (claims(10**8), "images"),
        (attribute(images=10**9), "1000000000"),
        (attribute(images=np.full(1000, 3)), "images"),
        (attribute(source='{"a": NaN}'), "source"),
        (attribute(source='{"a": "' + "x" * 3_000_000 + '"}'), "source"),
        (attribute(schema=b"\xff\xfe"), "schema"),
        (schema(max_objects=10**9), "schema"),
        (schema(fields=[FIELD | {"size": 10**9}]), "schema"),
        (number("elements", (1, 0, 0), np.nan), "image 1"),
        (number("elements", (2, 0, -1), 0.5), "image 2"),
        (number("elements", (2, 5, 3), 1.0), "image 2"),
        (number("camera", (2, 0), np.inf), "image 2"),
        (number("index", 1, -5), "-5"),
        (number("index", 1, 0), "number"),
        (number("elements", (2, 0, slice(5, 13)), 1.0), "image 2"),
        (replaced("camera", data=np.zeros((3, 2))), r"expected camera \[3, 3\] <f8, got \[3, 2\] float64"),
        (names(h5py.ExternalLink("/etc/passwd", "/names")), "names as an array in this file"),
        (names(np.frombuffer(b'["a", "b"]', np.uint8)), "names of 3 images"),
        (names(np.frombuffer(b'["a", "b", 1]', np.uint8)), "names of 3 images"),
        (names(np.frombuffer(b'["a", ', np.uint8)), "names is not valid JSON"),
        (names(np.zeros(4)), "names"),
        (lambda file: file.create_group("names"), "names as an array in this file"),
        (attribute(version=99), "format version 99, this setpred reads 1"),
        (attribute(format="other"), "not one of setpred's"),
    ],
)
def test_prepared_files_with_a_fault_are_rejected(change, words, prepared, tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(prepared)
    assert len(SetFile(path)) == 3
    with h5py.File(path, "r+") as file:
        change(file)
    for use in (SetFile, verify):
        with rejected(words):
            use(path)


@pytest.mark.parametrize(
    "change",
    [
        *(number("images", (2, 0, 0, 0), 9), number("elements", (0, 0, 0), 0.3), number("camera", 1, 2.0)),
        *(number("index", 2, 9), attribute(source='{"kind": "tess"}'), attribute(sha256="0" * 64)),
        *(attribute(objects=2), schema(name="other")),
        names(np.frombuffer(b'["a", "b", "c"]', np.uint8)),
    ],
)
def test_changed_content_is_noticed_by_verify(change, prepared, tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(prepared)
    with h5py.File(path, "r+") as file:
        change(file)
    with rejected("SHA-256 differs|malformed"):
        verify(path)


def test_files_without_a_complete_data_set_are_rejected(prepared, tmp_path):
    path = tmp_path / "a.h5"
    for use in (SetFile, verify):
        with rejected(r"there is no file .*none\.h5$"):
            use(tmp_path / "none.h5")
        for kept in (0.02, 0.3, 0.9, 0.98):
            path.write_bytes(prepared[: int(kept * len(prepared))])
            with rejected("cut short or damaged"):
                use(path)
        path.write_text("hello")
        with rejected("is not an HDF5 file"):
            use(path)


# --- images ---------------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    return b"\x89PNG\r\n\x1a\n" + size + b"".join(chunks) + pixels + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(canary) (w) file closefile\n"
BOMB = zlib.compress(bytes(3 * 10**8), 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((content, r"a\.png is not an image of a format read here \(PNG, JPEG") for content in (b"", b"hello", EPS)),
        *((content, r"a\.png is cut short or damaged") for content in (png(8, 8)[:46], png(2**13, 2**13))),
        *((png(8, 8, chunk(kind, text + BOMB)), "damaged") for kind, text in (
            (b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0"),
        )),
    ],
    ids=["empty", "text", "program", "cut", "claim", "zTXt", "iTXt", "iCCP"],
)  # fmt: skip
def test_images_with_a_fault_are_rejected_and_start_no_program(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", pytest.fail)
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8))
    assert load_image(path, 8).sum() == 0
    path.write_bytes(content)
    with rejected(words):
        load_image(path, 8)


@pytest.mark.parametrize("side", [2**31 - 1, 100_000, 2**13 + 1, 10_000])
def test_images_of_too_many_pixels_are_rejected_before_they_are_decoded(side, tmp_path, monkeypatch):
    assert (side - 1) ** 2 >= MOST_PIXELS
    monkeypatch.setattr(Image.Image, "load", pytest.fail)
    (tmp_path / "a.png").write_bytes(png(side, side))
    with rejected(r"a\.png"), warnings.catch_warnings():
        warnings.simplefilter("error")  # of Pillow, which the error replaces
        load_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_git_lfs_pointer_is_named(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1038996\n")
    with pytest.raises(InputError, match=r"got a Git LFS pointer in .*; run `git lfs pull`"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nul", "dangling"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "png"])
def test_only_regular_files_are_read(kind, suffix, tmp_path):
    path = tmp_path / (f"a\0.{suffix}" if kind == "nul" else f"a.{suffix}")
    if kind in ("device", "dangling"):
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    elif kind != "nul":
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    if suffix == "png":
        for read in (lambda: load_image(path, 8), lambda: find_images([path])):
            with rejected():
                read()
        (error,) = decoded([str(path)], 8)
        assert isinstance(error, InputError)
    else:
        with rejected("no checkpoint at"):
            load_checkpoint(path)


# --- CLEVR folders --------------------------------------------------------------------------------------------------

SCENE = {
    "image_filename": "a.png",
    "image_index": 0,
    "objects": [{"3d_coords": [1.0, 2.0, 0.7], "pixel_coords": [240, 160, 10.0]} | CUBE],
}
SECOND = {"image_filename": "b.png", "image_index": 1}


@pytest.fixture
def clevr(tmp_path) -> Path:
    for name in ("scenes", "images/val"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 32)).save(tmp_path / "images" / "val" / name)
    return tmp_path


def scenes(*changes: dict[str, Any]) -> str:
    return json.dumps({"info": {}, "scenes": [SCENE | change for change in changes]})


def cube(**changes: Any) -> str:
    """Scenes of one object with these changes, where `ABSENT` removes a key."""
    changed = {name: value for name, value in (SCENE["objects"][0] | changes).items() if value is not ABSENT}
    return scenes({"objects": [changed]})


ABSENT = object()
NOT_THREE_NUMBERS = ([1, 2], ["1", "2", "3"], "123", None, [True, 1, 2], [10**400, 0, 0], [[1], [2, 3]], [1, 2, np.nan])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (scenes({}, {"image_index": 1}), "'a.png'"),
        (scenes({}, {"image_filename": "b.png"}), "index 0"),
        (scenes({"image_index": 10**30}), "image_index"),
        (scenes({"image_index": "one"}), "a.png: expected an 'image_index'"),
        (scenes({}).replace('"image_index": 0', '"image_index": 0, "image_index": 1'), "JSON"),
        (scenes({}).replace("2.0", "1e999"), "coords: expected 3 finite numbers"),
        *((cube(**{"3d_coords": value}), "a.png, object 0: coords: expected 3 finite") for value in NOT_THREE_NUMBERS),
        *((cube(pixel_coords=value), "a.png, object 0: ") for value in NOT_THREE_NUMBERS[:-1]),
        *((cube(**{name: ABSENT}), f"a.png, object 0: an object lacks '{name}'") for name in ("3d_coords", "color")),
        (cube(color="mauve"), "a.png, object 0: unknown color 'mauve'; expected one of cyan"),
        (cube(shape=None), "a.png, object 0: unknown shape None"),
        (cube(size=["large"]), "a.png, object 0: unknown size"),
        *(
            (scenes({"image_filename": name}), "expected a plain file name")
            for name in ("../a.png", "/etc/passwd", "..", 3, "a.png\0", "\x1b[2Ja.png")
        ),
        (scenes({}).replace("image_filename", "name"), "scene 0 has no 'image_filename'"),
        (scenes({"image_filename": "x" * 10**6}), "missing"),
        (scenes({"objects": {}}), "a.png: expected a list 'objects'"),
        (scenes({"objects": [{}] * 12}), "a.png has 12 objects, but schema 'clevr' holds at most 10"),
        (scenes({"objects": SCENE["objects"] * 5000}), "objects"),
        ('{"scenes": ' + "[" * 10**6, "JSON"),
        (scenes({})[:200], "of 200 bytes is not valid JSON"),
        (b'{"info": "\xff"}', "of 13 bytes is not valid JSON"),
        *((text, "expected a list 'scenes'") for text in ("[]", "{}", '{"scenes": []}', '{"scenes": 3}', "3")),
    ],
)
def test_scenes_with_a_fault_are_rejected(text, words, clevr):
    file = clevr / "scenes" / "CLEVR_val_scenes.json"
    file.write_text(scenes({}, SECOND))
    assert len(ClevrFolder(clevr, "val")) == 2
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with rejected(words):
        ClevrFolder(clevr, "val")


def test_files_of_scenes_are_regular_and_fit_into_memory(clevr):
    file = clevr / "scenes" / "CLEVR_val_scenes.json"
    file.touch()
    os.truncate(file, 2**40)
    with rejected("1,099,511,627,776"):
        ClevrFolder(clevr, "val")
    file.unlink()
    os.mkfifo(file)
    with rejected():
        ClevrFolder(clevr, "val")
    for split in ("../val", "a/b", "", "\0", "x\n"):
        with rejected("name"):
            ClevrFolder(clevr, split)


def test_links_to_images_are_followed_and_links_to_devices_are_not(clevr, tmp_path):
    (clevr / "scenes" / "CLEVR_val_scenes.json").write_text(scenes({}, SECOND))
    images = clevr / "images" / "val"
    (images / "a.png").rename(tmp_path / "outside.png")
    (images / "a.png").symlink_to(tmp_path / "outside.png")
    (images / "b.png").unlink()
    (images / "b.png").symlink_to("/dev/zero")
    folder = ClevrFolder(clevr, "val")
    assert folder.image(0, 8).shape == (8, 8, 3)
    with rejected("not a regular file"):
        folder.image(1, 8)
