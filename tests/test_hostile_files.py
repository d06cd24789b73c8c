"""Files of strangers: none runs code, none takes more memory than it has bytes, and each is refused in a sentence."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from setpred import CLEVR, InputError
from setpred.checkpoint import load as checkpoints
from setpred.checkpoint import untrusted as torch_files
from setpred.checkpoint import weights
from setpred.checkpoint.load import KEY, VERSION, build, load_checkpoint, read_checkpoint
from setpred.checkpoint.weights import pack
from setpred.data import hdf5 as cache
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import Header, Record, open_set_file, read_header, verify
from setpred.data.hdf5_writer import create_arrays, write_set_file
from setpred.data.images import decoded, find_images, load_image
from setpred.model import SetPredictor
from setpred.schema import continuous

MODEST = 200e6  # bytes that a refusal may take
MODEL = {
    "encoder": {
        "class_path": "setpred.encoders.SmallCNN",
        "init_args": {"image_size": 16, "latent_dim": 8, "width": 2},
    },
    "decoder": {
        "class_path": "setpred.decoders.IDSPN",
        "init_args": {
            "set_size": 4,
            "objective": {
                "class_path": "setpred.inner.LatentMatching",
                "init_args": {
                    "set_encoder": {
                        "class_path": "setpred.aggregators.SetEncoder",
                        "init_args": {
                            "hidden_dim": 8,
                            "aggregator": {
                                "class_path": "setpred.aggregators.FSPool",
                                "init_args": {"in_dim": 8, "set_size": 4},
                            },
                        },
                    }
                },
            },
            "descent": {"class_path": "setpred.inner.GradientDescent", "init_args": {"iterations": 3}},
        },
    },
}
DESCENT = ("decoder", "init_args", "descent", "init_args")
ENCODING = ("decoder", "init_args", "objective", "init_args", "set_encoder", "init_args")


@contextmanager
def refused(words: str, canary: Path | None = None) -> Iterator[None]:
    """The block raises `InputError` with these words, in modest memory, and no payload has run."""
    watched = os.access("/proc/self/clear_refs", os.W_OK)
    if watched:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = memory("VmRSS") if watched else 0
    with pytest.raises(InputError, match=words) as caught:
        yield
    assert not watched or memory("VmHWM") - before < MODEST
    assert len(str(caught.value)) < 1000
    assert canary is None or not canary.exists()


def memory(which: str) -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * float(next(line for line in status.splitlines() if line.startswith(which)).split()[1])


# Checkpoints: what is in the archive


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Calls:
    """Makes the unpickler call a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A checkpoint that is in order."""
    classes = checkpoints.allowed_classes()
    model = SetPredictor(build(MODEL["encoder"], classes), build(MODEL["decoder"], classes))
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "epoch": 0,
        "global_step": 5,
        KEY: {
            "version": VERSION,
            "schema": CLEVR.to_dict(),
            "model": MODEL,
            "data": {"path": "x.h5", "split": "val", "image_size": 16},
            "settings": {},
            "seed": 0,
        },
    }


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def repacked(path: Path, content: Any, change: Callable[[zipfile.ZipFile, dict[str, bytes]], Any]) -> Path:
    """The file of `content` with the entries that `change` leaves to be written."""
    whole = io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        change(archive, entries)
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_what_is_in_order_is_read(content, tmp_path):
    for path in (
        saved(tmp_path / "a.ckpt", content),
        repacked(tmp_path / "b.ckpt", content, lambda archive, entries: None),
        saved(tmp_path / "d.ckpt", content | {"tied": [content["state_dict"]] * 3}),
    ):
        loaded = load_checkpoint(path)
        assert (loaded.step, loaded.image_size, loaded.schema) == (5, 16, CLEVR)
    record = {name: value for name, value in content.items() if name not in ("state_dict", "optimizer_states")}
    (tmp_path / "c.safetensors").write_bytes(pack(content["state_dict"], record))
    assert load_checkpoint(tmp_path / "c.safetensors").step == 5


@pytest.mark.parametrize("where", ["top", "state_dict", KEY, "list", "key"])
def test_payloads_are_not_run(where, content, tmp_path):
    canary = tmp_path / "canary"
    payload = Payload(f"touch {canary}")
    hostile = {
        "top": payload,
        "state_dict": content | {"state_dict": {"model.a": payload}},
        KEY: content | {KEY: content[KEY] | {"settings": payload}},
        "list": content | {"loops": [[payload]]},
        "key": content | {payload: 1},
    }[where]
    path = saved(tmp_path / "a.ckpt", hostile)
    with refused("could run code", canary):
        load_checkpoint(path)
    with refused("is not a whole torch file", canary):
        load_checkpoint(saved(tmp_path / "b.ckpt", hostile, _use_new_zipfile_serialization=False))
    (tmp_path / "c.ckpt").write_bytes(pickle.dumps(hostile))
    with refused("is not a whole torch file", canary):
        load_checkpoint(tmp_path / "c.ckpt")
    whole = pickle.dumps(hostile, protocol=4)  # names its functions by another instruction
    with refused("could run code", canary):
        load_checkpoint(
            repacked(tmp_path / "d.ckpt", content, lambda a, entries: entries.update(named(whole, entries)))
        )
    with refused("expected one data.pkl", canary):
        load_checkpoint(repacked(tmp_path / "e.ckpt", content, lambda a, entries: entries.update({"a/b.pkl": whole})))


def named(data: bytes, entries: dict[str, bytes]) -> dict[str, bytes]:
    return {next(name for name in entries if name.endswith("data.pkl")): data}


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: nn.Parameter(torch.zeros(3)),
        lambda: Calls(bytearray, 10**12),
        lambda: Calls(torch.Tensor, 10**12),
        lambda: {1, 2},
        lambda: torch.float32,
        lambda: torch.FloatStorage,
        lambda: OrderedDict,
    ],
)
def test_only_plain_tensors_and_types_are_read(made, content, tmp_path):
    path = saved(tmp_path / "a.ckpt", content | {"state_dict": content["state_dict"] | {"model.a": made()}})
    with refused("holds more than tensors and plain types"):
        read_checkpoint(path)


def compressed(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    archive.writestr("archive/data/99", bytes(10**6), compress_type=zipfile.ZIP_DEFLATED)


def overlapping(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    archive.writestr("archive/data/98", bytes(100))
    archive.writestr("archive/data/99", bytes(100))
    archive.infolist()[1].header_offset = 0


def beyond(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    name = next(name for name in entries if name.endswith("version"))
    archive.writestr(name, entries.pop(name))
    archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 10**9


def twice(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    archive.writestr("archive/data/99", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        archive.writestr("archive/data/99", b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (compressed, "data/99' inside is compressed"),
        (overlapping, "data/99' inside lies upon another"),
        (beyond, "inside lies upon another|damaged"),
        (twice, "each once"),
        (
            lambda a, entries: entries.update({f"archive/data/x{n}": b"" for n in range(99)}),
            "expected at most 99, each",
        ),
    ],
    ids=["compressed", "overlapping", "beyond", "twice", "many"],
)
def test_archives_that_torch_does_not_write_are_refused(change, words, content, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MOST_ENTRIES", 99)
    path = repacked(tmp_path / "a.ckpt", content, change)
    with refused(words):
        read_checkpoint(path)


class Shadowed:
    """Becomes an `OrderedDict` whose method `items` is none."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"items": "not a method"}


def endless() -> list:
    inside: list = []
    inside.append(inside)
    return inside


def nested(levels: int, width: int = 1) -> list:
    inside: list = []
    for _ in range(levels):
        inside = [inside] * width
    return inside


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: torch.zeros(1).expand(10**12), r"takes more memory than the file has"),
        (lambda: torch.zeros(1).expand(1000, 1000), r"a \[1000, 1000\] takes more memory than the file has"),
        (lambda: torch.zeros(100).unfold(0, 50, 1), r"takes more memory than the file has"),
        (lambda: [whole[n:] for whole in [torch.zeros(100)] for n in range(50)], "takes more memory than the file has"),
        (lambda: nested(200), "nested deeper than 64 levels"),
        (lambda: endless(), "nested deeper than 64 levels"),
        (lambda: nested(40, 40), "has more than 200000 values"),
        (lambda: Shadowed(), "attributes"),
        (lambda: 10**100, "a is a number of more than 64 bits"),
    ],
)
def test_values_that_grow_are_refused(made, words, content, tmp_path):
    path = saved(tmp_path / "a.ckpt", content | {"a": made()})
    with refused(words):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "steps",
    [
        b"\x80\x02](" + b"}" * 100_001 + b"e.",  # a byte each, sixty in memory
        b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s.",  # a key whose hash takes the whole stack
    ],
    ids=["dictionaries", "tuples"],
)
def test_long_pickles_are_refused_before_they_are_run(steps, content, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MOST_STEPS", 100_000)
    path = repacked(tmp_path / "a.ckpt", content, lambda archive, entries: entries.update(named(steps, entries)))
    with refused("builds more values than any checkpoint of ours"):
        read_checkpoint(path)


def test_storages_are_no_larger_than_what_is_stored():
    """torch compares them too, in newer versions; reading on would be reading others' memory."""
    with refused(r"a \[100\] takes more memory than the file has"):
        torch_files._check_values({"a": torch.zeros(100)}, 100, "x.ckpt")
    torch_files._check_values({"a": torch.zeros(100)}, 400, "x.ckpt")


# Checkpoints: what the record asks for


def with_change(content: dict[str, Any], keys: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    inside = changed
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    return changed


FIELD = {"name": "a", "size": 1, "classes": [], "scale": 1.0}
MODEL_AT = (KEY, "model")
EVIL = {"class_path": "os.system", "init_args": {"command": "touch canary"}}
STRIDED = {"class_path": "setpred.encoders.SlotTrunk", "init_args": {"width": 1, "strides": [1] * 500}}
GRID = {"class_path": "torch.nn.BatchNorm1d", "init_args": {"num_features": 2**16}}
RECORDS = [
    # sizes, refused before anything of them is made
    ((*MODEL_AT, *ENCODING, "hidden_dim"), 10**9, r"hidden_dim = 1000000000, expected at most 65536"),
    ((*MODEL_AT, "decoder", "init_args", "set_size"), 10**9, r"set_size = 1000000000, expected"),
    ((*MODEL_AT, *DESCENT, "iterations"), 10**12, r"iterations = 1000000000000, expected"),
    ((*MODEL_AT, *DESCENT, "layers"), 10**6, r"layers = 1000000, expected at most 1000"),
    ((*MODEL_AT, *ENCODING, "hidden_dim"), 2**16, r"do not fit the model"),
    ((*MODEL_AT, "encoder", "init_args", "hidden_dim"), 2**16, r"do not fit the model"),
    ((*MODEL_AT, "encoder", "init_args"), {"image_size": 16, "latent_dim": 2**16, "width": 2**14}, "do not fit"),
    ((*MODEL_AT, "encoder"), STRIDED, "more than 300 layers and tensors"),
    # class paths
    ((*MODEL_AT, "encoder"), EVIL, "'os.system', which is not on the list"),
    ((*MODEL_AT, "decoder", "init_args", "objective"), EVIL, "'os.system', which is not on the list"),
    ((*MODEL_AT, *DESCENT, "iterations"), [[EVIL]], "'os.system', which is not on the list"),
    ((*MODEL_AT, *DESCENT, "iterations"), {"a": {"b": EVIL}}, "'os.system', which is not on the list"),
    ((*MODEL_AT, "encoder", "class_path"), ["os.system"], "which is not on the list"),
    ((*MODEL_AT, "encoder", "class_path"), "setpred.encoders." + "x" * 10**6, "which is not on the list"),
    ((*MODEL_AT, "encoder", "class_path"), "setpred.checkpoint.load.save_whole", "which is not on the list"),
    # arguments
    ((*MODEL_AT, *ENCODING, "aggregator"), "FSPool", "cannot be built: aggregator: expected"),
    ((*MODEL_AT, "decoder", "init_args", "descent"), 3, "cannot be built: descent: expected"),
    ((*MODEL_AT, "decoder", "init_args", "descent"), MODEL["encoder"], "cannot be built: descent: expected"),
    ((*MODEL_AT, *DESCENT, "iterations"), "many", "cannot be built: iterations: expected .*int.*, got 'many'"),
    ((*MODEL_AT, *DESCENT, "iterations"), True, "cannot be built: iterations: expected .*int.*, got True"),
    ((*MODEL_AT, *DESCENT, "projection"), "os.system", "cannot be built: projection: expected"),
    ((*MODEL_AT, *DESCENT, "unheard"), 1, "cannot be built"),
    ((*MODEL_AT, "encoder", "init_args"), [16], "expected arguments by name"),
    ((*MODEL_AT, "encoder", "init_args", "latent_dim"), -1, "cannot be built"),
    ((*MODEL_AT, "encoder"), "SmallCNN", "its encoder is 'SmallCNN', which is none"),
    ((*MODEL_AT, "encoder"), None, "its encoder is None, which is none"),
    ((*MODEL_AT, "decoder"), MODEL["encoder"], "its decoder is .*, which is none"),
    ((*MODEL_AT, "encoder"), STRIDED | {"class_path": "torch.nn.ReLU", "init_args": {}}, "do not fit"),
    ((*MODEL_AT, "encoder"), MODEL["decoder"], "its encoder is .*, which is none"),
    ((*MODEL_AT, "encoder"), {"class_path": "setpred.losses.HungarianLoss"}, "its encoder is .*, which is none"),
    # the rest of the record
    ((KEY, "data", "image_size"), 32, "its image_size is 32, but SmallCNN has 16"),
    ((KEY, "schema", "fields"), [FIELD | {"size": 3}], "its set_dim is 4, but IDSPN has"),
    ((KEY, "version"), "x" * 10**6, "has checkpoint format"),
    ((KEY, "seed"), "1", "its record is damaged"),
    ((KEY, "seed"), True, "its record is damaged"),
    ((KEY, "data"), [1], "its record is damaged"),
    ((KEY, "data", "image_size"), 10**9, "its record is damaged .*from 1 to 4096"),
    ((KEY, "data", "path"), {"a": 1}, "its record is damaged .*expected a name"),
    ((KEY, "schema"), "clevr", "not a schema record"),
    ((KEY, "schema", "max_objects"), 10**9, "not a schema record.*up to 65536"),
    ((KEY, "schema", "max_objects"), 1.5, "not a schema record"),
    ((KEY, "schema", "fields", 0, "scale"), float("nan"), "scale > 0"),
    ((KEY, "schema", "fields", 0, "size"), 10**9, "not a schema record"),
    ((KEY, "schema", "fields", 1, "classes"), [1, 2], "not a schema record"),
    (("epoch",), -1, "its record is damaged"),
    (("global_step",), 0.5, "its record is damaged"),
    # the weights
    (("state_dict",), [1], "expected weights by name"),
    (("state_dict", "model.encoder.head.bias"), "zero", "head.bias: expected floats of .*, got str"),
    (("state_dict", "model.encoder.head.bias"), torch.zeros(8, dtype=torch.int64), "got torch.int64 of"),
    (("state_dict", "model.encoder.head.bias"), torch.zeros(9), r"expected floats of \[8\], got floats of \[9\]"),
    (("state_dict", "model." + "x" * 10**6), torch.zeros(9), r"is unknown"),
    (
        ("state_dict", "model.encoder.head.bias"),
        torch.full((8,), torch.nan),
        r"head\.bias has numbers that are not fin",
    ),
    (
        ("state_dict", "model.encoder.trunk.0.1.running_var"),
        torch.full((2,), torch.inf),
        "running_var has numbers that",
    ),
    (
        ("optimizer_states", 0, "state", 0, "exp_avg"),
        torch.tensor([torch.nan]),
        r"optimizer_states.*exp_avg has numbers",
    ),
]


@pytest.mark.parametrize(("keys", "value", "words"), RECORDS)
def test_records_that_cannot_be_meant_are_refused(keys, value, words, content, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MOST_PARTS", 300)
    path = saved(tmp_path / "a.ckpt", with_change(content, keys, value))
    with refused(words, tmp_path / "canary"):
        load_checkpoint(path)


def test_numbers_beside_the_weights_are_bounded(content, tmp_path, monkeypatch):
    start = {"class_path": "setpred.decoders.GreedyVotes", "init_args": {"weights": [2.0]}}  # one for each number
    path = saved(tmp_path / "a.ckpt", with_change(content, (KEY, "model", "decoder", "init_args", "start"), start))
    monkeypatch.setattr(checkpoints, "MOST_BESIDE", CLEVR.set_dim)
    load_checkpoint(path)
    monkeypatch.setattr(checkpoints, "MOST_BESIDE", CLEVR.set_dim - 1)
    with refused(f"more than {CLEVR.set_dim - 1} numbers beside its weights"):
        load_checkpoint(path)


def test_weights_that_are_not_finite_can_be_read_on_purpose(content, tmp_path):
    broken = with_change(content, ("state_dict", "model.encoder.head.bias"), torch.full((8,), torch.nan))
    path = saved(tmp_path / "a.ckpt", broken)
    with refused("use an earlier checkpoint"):  # what a resume reads
        read_checkpoint(path)
    assert read_checkpoint(path, finite=False)["state_dict"]["model.encoder.head.bias"].isnan().all()


class Own(nn.Module):
    """Cannot be built without memory, and its checkpoint is read all the same."""

    def __init__(self, token_dim: int = 4) -> None:
        super().__init__()
        self.in_dim = self.token_dim = token_dim
        assert torch.zeros(1).item() == 0


def test_parts_of_ones_own_need_not_be_outlined(content, tmp_path):
    own = {"class_path": f"{__name__}.Own", "init_args": {}}
    path = saved(tmp_path / "a.ckpt", with_change(content, (*MODEL_AT, "encoder"), own))
    with refused("not on the list of allowed classes"):
        load_checkpoint(path)
    with refused("gives tokens of 4 numbers"):  # so it was built
        load_checkpoint(path, allow=[f"{__name__}.Own"])


# Releases


def release(path: Path, content: dict[str, Any], text: str | None = None) -> Path:
    record = {name: content[name] for name in ("epoch", "global_step", KEY)}
    text = json.dumps(record) if text is None else text
    tensors = {name: weights.halved(value) for name, value in content["state_dict"].items()}
    metadata = {"format": "pt", weights.RECORD: text, weights.DIGEST: weights._digest(text, tensors)}
    path.write_bytes(weights.save(tensors, metadata))
    return path


def with_header(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"epoch": NaN}', "not finite"),
        ('{"epoch": 1e999}', "'1e999' is not finite"),
        ('{"epoch": -Infinity}', "not finite"),
        ('{"epoch": 1' + "0" * 5000 + "}", "of 5001 digits"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested deeper than 64"),
        ("[" * 100_000, "not valid JSON"),
        ('{"epoch": 1, "epoch": 2}', "a key comes twice"),
        ('{"setpred": {"version": 99}}', "checkpoint format 99"),
        ('{"a": "' + "x" * 3_000_000 + '"}', "its header has 3.* bytes, expected at most 2000000"),
    ],
)
def test_records_of_releases_are_plain_and_small(text, words, content, tmp_path):
    path = release(tmp_path / "a.safetensors", content, text)
    with refused(words):
        load_checkpoint(path)


def test_a_release_asks_for_no_more_than_a_checkpoint(content, tmp_path):
    for keys, value, words in RECORDS[:5]:
        path = release(tmp_path / "a.safetensors", with_change(content, keys, value))
        with refused(words):
            load_checkpoint(path)


TENSOR = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        (with_header(b"{" + TENSOR + b", " + TENSOR + b"}") + bytes(4), "a key comes twice"),
        (with_header(b"{}", size=10**8), "its header has 100000000 bytes"),
        (with_header(b"{}", size=2**63), "its header has"),
        (with_header(b"{" + TENSOR.replace(b"[1]", b"[1000000000000]") + b"}") + bytes(4), "is damaged"),
        (with_header(b'{"__metadata__": {"setpred": "{}", "setpred": "{}"}}'), "a key comes twice"),
        (with_header(b'{"a": ' * 1000 + b"1" + b"}" * 1000), "not valid JSON|nested deeper"),
        (b"", "damaged"),
    ],
)
def test_headers_of_releases_are_small_and_have_each_name_once(whole, words, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(whole)
    with refused(words):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_what_is_no_file_is_no_checkpoint(ending, tmp_path):
    pipe, device = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device, tmp_path, f"a\0.{ending}"):
        with refused("no checkpoint at"):
            load_checkpoint(path)


# Prepared files


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> bytes:
    """A prepared file of three images that is in order."""
    path = tmp_path_factory.mktemp("made") / "made.h5"
    elements = CLEVR.encode([CUBE | {"coords": (1, 2, 0)}])
    records = [Record(np.full((8, 8, 3), n, np.uint8), elements, np.full(3, np.nan), n) for n in range(3)]
    write_set_file(path, Header(3, 8, CLEVR, {"kind": "test"}), records, list, producer="p", description="")
    return path.read_bytes()


CUBE = {"material": "metal", "color": "red", "shape": "cube", "size": "small"}


def replaced(name: str, **options: Any) -> Callable[[h5py.File], Any]:
    """The data set made anew, as it was but for the options."""

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


def elsewhere(file: h5py.File) -> None:
    del file["images"]
    file.create_dataset("images", (3, 8, 8, 3), "u1", external=[("/etc/passwd", 0, 576)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 8, 8, 3), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "images", (3, 8, 8, 3))
    del file["images"]
    file.create_virtual_dataset("images", layout)


def claims(images: int, **attributes: Any) -> Callable[[h5py.File], Any]:
    """So many images by its attributes and data sets, of which none has a byte in the file."""

    def change(file: h5py.File) -> None:
        file.attrs["images"] = images
        file.attrs.update(attributes)
        for name, (shape, dtype) in Header(images, 8, CLEVR, {}).layout().items():
            del file[name]
            file.create_dataset(name, shape, dtype, chunks=(1, *shape[1:]))

    return change


def attribute(**changes: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.attrs.update(changes)


def number(name: str, at: Any, value: Any) -> Callable[[h5py.File], Any]:
    def change(file: h5py.File) -> None:
        file[name][at] = value

    return change


def described(**changes: Any) -> Callable[[h5py.File], Any]:
    return attribute(schema=json.dumps(CLEVR.to_dict() | changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (linked("images", h5py.ExternalLink("/etc/passwd", "/images")), "images is a link to elsewhere"),
        (linked("camera", h5py.SoftLink("/elements")), "camera is a link to elsewhere"),
        (elsewhere, "images is taken from other files"),
        (virtual, "images is taken from other files"),
        (replaced("images", compression="gzip"), "images is compressed or filtered"),
        (replaced("elements", shuffle=True, chunks=True), "elements is compressed or filtered"),
        (replaced("camera", scaleoffset=2, chunks=True), "camera is compressed or filtered"),
        (replaced("index", fletcher32=True, chunks=True), "index is compressed or filtered"),
        (replaced("index", data=["a"] * 3, dtype=h5py.string_dtype()), "expected index"),
        (replaced("index", data=None, shape=(3,), dtype=h5py.ref_dtype), "expected index"),
        (replaced("index", data=None, shape=(3,), dtype=h5py.regionref_dtype), "expected index"),
        (replaced("index", data=None, shape=(3,), dtype=h5py.vlen_dtype(np.int64)), "expected index"),
        (replaced("index", data=h5py.Empty("<i8")), "expected index|damaged"),
        (linked("index", np.dtype("<i8")), "damaged"),
        (lambda file: (file.pop("index"), file.create_group("index")), "damaged"),
        (claims(10**8), "images takes 19200000000 bytes, of which it has 0"),
        (claims(10), "images takes 1920 bytes, of which it has 0"),  # fewer than the file has
        (attribute(images=10**9), "it claims 1000000000 images"),
        (attribute(images=-1), "it claims -1 images"),
        (attribute(image_size=10**6), "it claims 3 images of side 1000000"),
        (attribute(images=[3]), "its attribute images is an array"),
        (attribute(images=np.full(1000, 3)), "its attribute images is an array"),
        (attribute(images="3"), "its attribute images is '3', expected int"),
        (attribute(images=3.0), "its attribute images is .*3.0.*, expected int"),
        (attribute(version=[1, 2]), "its attribute version is an array"),
        (attribute(format=1), "its attribute format is 1|its attribute format is .*1"),
        (attribute(source="[1]"), "its source is"),
        (attribute(source='{"a": NaN}'), "its source is not valid JSON"),
        (attribute(source="[" * 50_000), "its source is not valid JSON"),
        (attribute(source='{"a": "' + "x" * 3_000_000 + '"}'), "its attribute source has 3.* characters"),
        (attribute(schema=b"\xff\xfe"), "its schema is not valid JSON"),
        (described(max_objects=10**9), "not a schema record"),
        (described(max_objects="10"), "not a schema record"),
        (described(fields=[FIELD | {"size": 10**9}]), "not a schema record"),
        (described(fields=[FIELD | {"name": f"f{n}"} for n in range(70_000)]), "schema has 4188938 characters"),
        (described(fields=[FIELD | {"scale": 0}]), "scale > 0"),
        (described(fields=[FIELD | {"name": ["a"]}]), "not a schema record"),
        (described(fields={}), "at least one field"),
        (number("elements", (1, 0, 0), np.nan), "the set of image 1 is malformed"),
        (number("elements", (2, 0, -1), 0.5), "the set of image 2 is malformed"),
        (number("elements", (2, 5, 3), 1.0), "the set of image 2 is malformed"),
        (number("camera", (2, 0), np.inf), "the camera of image 2 is at infinity"),
        (number("index", 1, -5), "has the number -5, expected at least 0"),
        (number("index", 1, 0), "two of its images have one number"),
    ],
)
def test_prepared_files_hold_what_they_say(change, words, made, tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(made)
    assert len(SetFile(path)) == 3
    with h5py.File(path, "r+") as file:
        change(file)
    for use in (SetFile, verify):
        with refused(words):
            use(path)


def test_a_data_set_is_no_larger_than_its_file(made, tmp_path):
    """Many chunks may lie at one place of the file."""
    (tmp_path / "a.h5").write_bytes(made)
    with open_set_file(tmp_path / "a.h5") as file:

        class Small:
            id = SimpleNamespace(get_filesize=lambda: 575)
            get, __getitem__ = file.get, lambda self, name: file[name]

        with refused("images takes 576 bytes, of which it has 576, in a file of 575"):
            cache._check_stored(Small(), "images", (3, 8, 8, 3), np.dtype("u1"), "a.h5")


def test_a_file_whose_images_are_holes_is_read(tmp_path):
    """Of which the disk stores next to nothing: all zeros are images, too."""
    path = tmp_path / "a.h5"

    with h5py.File(path, "w") as file:
        create_arrays(file, Header(1000, 64, CLEVR, {}), "p")
        for name in ("elements", "camera"):
            file[name][:] = 0
        file["index"][:] = np.arange(1000)
    with open_set_file(path) as file:
        assert read_header(file, path).images == 1000
    assert SetFile(path, in_memory=False)[999]["image"].sum() == 0


# Images


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + b"".join(chunks) + chunk(b"IEND", b"")


PIXELS = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))


def test_texts_beside_the_pixels_are_bounded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8, PIXELS))
    assert load_image(path, 8).sum() == 0
    bomb = zlib.compress(bytes(3 * 10**8), 1)
    for text in (b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb):
        path.write_bytes(png(8, 8, chunk(*text), PIXELS))
        with refused("cut short or damaged"):
            load_image(path, 8)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nul", "dangling"])
def test_what_is_no_file_is_no_image(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "nul":
        path = tmp_path / "a\0.png"
    else:
        path.symlink_to(tmp_path / "nowhere")
    words = "is missing" if kind == "dangling" else "no name of a file" if kind == "nul" else "not a regular file"
    with refused(words):
        load_image(path, 8)
    (error,) = decoded([str(path)], 8)
    assert isinstance(error, InputError)
    with refused("no image or folder|has no image"):
        find_images([path])


def test_many_pixels_are_a_sentence_and_no_warning_of_pillow(tmp_path):
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000, PIXELS))
    read = "import sys; from setpred.data.clevr import load_image; load_image(sys.argv[1], 8)"
    done = subprocess.run([sys.executable, "-c", read, tmp_path / "a.png"], stderr=subprocess.PIPE, text=True)
    assert "InputError" in done.stderr.splitlines()[-1]
    assert "DecompressionBomb" not in done.stderr


# CLEVR folders

SCENE = {
    "image_filename": "a.png",
    "image_index": 0,
    "objects": [{"3d_coords": [1.0, 2.0, 0.7], "pixel_coords": [240, 160, 10.0]} | CUBE],
}


@pytest.fixture
def clevr(tmp_path) -> Path:
    for name in ("scenes", "images/val"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 32)).save(tmp_path / "images" / "val" / name)
    return tmp_path


def scenes(*changes: dict[str, Any]) -> str:
    return json.dumps({"info": {}, "scenes": [SCENE | change for change in changes]})


def coordinates(text: str) -> str:
    return scenes({}).replace("[1.0, 2.0, 0.7]", text)


SECOND = {"image_filename": "b.png", "image_index": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (scenes({}, {"image_index": 1}), "two scenes have the file name 'a.png'"),
        (scenes({}, {"image_filename": "b.png"}), "two scenes have the index 0"),
        (scenes({"image_index": True}), "expected an 'image_index' of at least 0, got True"),
        (scenes({"image_index": 1.0}), "expected an 'image_index' of at least 0"),
        (scenes({"image_index": 10**30}), "expected an 'image_index' of at least 0"),
        (scenes({}).replace('"image_index": 0', '"image_index": 1' + "0" * 5000), "not valid JSON"),
        (scenes({}).replace('"image_index": 0', '"image_index": 0, "image_index": 1'), "a key comes twice"),
        (coordinates("[1.0, 2.0, 1e999]"), "object 0: coords: expected 3 finite numbers"),
        (coordinates("[1.0, 2.0, NaN]"), "object 0: coords: expected 3 finite numbers"),
        (coordinates("[1.0, 2.0, true]"), "object 0: coords: expected 3 finite numbers"),
        (coordinates('["1", "2", "3"]'), "object 0: coords: expected 3 finite numbers"),
        (coordinates("[1.0, 2.0, 1" + "0" * 400 + "]"), "object 0: coords: expected 3 finite numbers"),
        (coordinates("[[1.0], [2.0], [3.0, 4.0]]"), "object 0: coords: expected 3 finite numbers"),
        (coordinates("[" * 60 + "1" + "]" * 60), "object 0: coords: expected 3 finite numbers"),
        (coordinates('"' + "x" * 10**6 + '"'), "object 0: coords: expected 3 finite numbers"),
        (coordinates("null"), "object 0: coords: expected 3 finite numbers"),
        (scenes({}).replace("[240, 160, 10.0]", "[true, 1, 2]"), "object 0: pixel_coords: expected 3 numbers"),
        (scenes({}).replace("[240, 160, 10.0]", '"240"'), "object 0: pixel_coords: expected 3 numbers"),
        (scenes({}).replace("[240, 160, 10.0]", "[1" + "0" * 400 + ", 1, 2]"), "a.png, object 0: "),
        (scenes({}).replace('"red"', "[" * 60 + "]" * 60), "object 0: unknown color"),
        (scenes({}).replace('"red"', '"' + "x" * 10**6 + '"'), "object 0: unknown color"),
        (scenes({"image_filename": "../a.png"}), "expected a plain file name"),
        (scenes({"image_filename": "/etc/passwd"}), "expected a plain file name"),
        (scenes({"image_filename": "a/../a.png"}), "expected a plain file name"),
        (scenes({"image_filename": "a.png\0"}), "expected a plain file name"),
        (scenes({"image_filename": "\x1b[2Ja.png"}), "expected a plain file name"),
        (scenes({"image_filename": "a\n.png"}), "expected a plain file name"),
        (scenes({"image_filename": "x" * 10**6}), "1 of 1 images are missing"),
        (scenes({"image_filename": ["a.png"]}), "expected a plain file name"),
        (scenes({"objects": [SCENE]}), "scenes have|a list 'objects' of records"),
        (scenes({"objects": [1]}), "a list 'objects' of records"),
        (scenes({"objects": [{}] * 10**6}), "more than 10000 objects"),
        (scenes({"objects": SCENE["objects"] * 5000}), "has 5000 objects, but schema"),
        ('{"info": [' + "{}, " * 10**6 + '{}], "scenes": []}', "more than 10000 objects"),
        ('{"scenes": ' + "[" * 10**6, "not valid JSON"),
        ('{"scenes": ' + '{"a": ' * 10**5, "not valid JSON"),
        (scenes({}) + "\0", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_scenes_of_strangers_are_refused(text, words, clevr):
    file = clevr / "scenes" / "CLEVR_val_scenes.json"
    file.write_text(scenes({}, SECOND))
    assert len(ClevrFolder(clevr, "val")) == 2
    file.write_text(text)
    with refused(words):
        ClevrFolder(clevr, "val")


def test_files_of_scenes_are_files_that_fit_into_memory(clevr):
    file = clevr / "scenes" / "CLEVR_val_scenes.json"
    file.touch()
    os.truncate(file, 2**40)
    with refused(r"has 1,099,511,627,776 bytes, expected at most 536,870,912"):
        ClevrFolder(clevr, "val")
    file.unlink()
    os.mkfifo(file)
    with refused("has no scenes"):
        ClevrFolder(clevr, "val")
    for split in ("../val", "a/b", "", "\0", "x\n"):
        with refused("expected a plain name"):
            ClevrFolder(clevr, split)


def test_links_lead_to_regular_files_only(clevr, tmp_path):
    """One to an image outside the folder is followed: data sets are often linked together. One to a device is not."""
    (clevr / "scenes" / "CLEVR_val_scenes.json").write_text(scenes({}, SECOND))
    images = clevr / "images" / "val"
    (images / "a.png").rename(tmp_path / "outside.png")
    (images / "a.png").symlink_to(tmp_path / "outside.png")
    (images / "b.png").unlink()
    (images / "b.png").symlink_to("/dev/zero")
    folder = ClevrFolder(clevr, "val")
    assert folder.image(0, 8).shape == (8, 8, 3)
    with refused("not a regular file"):
        folder.image(1, 8)


@pytest.mark.parametrize("value", [["1", "2", "3"], [True, False, True], "123", [10**400, 0, 0], [[1], [2, 3]], None])
def test_schemas_take_numbers_for_numbers(value):
    with refused("coords: expected 3 finite numbers"):
        CLEVR.encode([CUBE | {"coords": value}])
    with refused("scale > 0"):
        continuous("a", 1, scale=float("nan"))
