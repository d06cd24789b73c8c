"""Sets and vectors as inputs: arrays to a file and back, one clear error per mistake, and every command on them."""

import json
import zipfile

import h5py
import numpy as np
import pytest
import torch
from problems import normal
from tiny import untrained_checkpoint

from setpred.aggregators import PMA
from setpred.checkpoint import load_checkpoint
from setpred.commands import gradients
from setpred.commands.data import main as data_command
from setpred.commands.evaluate import evaluate
from setpred.commands.predict import predict_sets
from setpred.commands.predict import run as predict_command
from setpred.commands.release import main as release_command
from setpred.commands.train import build, check_fit
from setpred.data.arrays import import_arrays, input_sets, read_arrays
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import Header, describe, file_header, verify
from setpred.encoders import ElementTokens, Normalised, Pooled, WindowTokens
from setpred.encoders.elements import local_moments
from setpred.encoders.isab import ISAB
from setpred.errors import InputError
from setpred.evaluation import predict, predict_in_passes
from setpred.losses.soft_equivariance import SYMMETRIES
from setpred.model import SetPredictor, Step
from setpred.schema import CLEVR
from setpred.sets import mean_present

N, MOST, PLACES = 6, 5, 3
SIZES = np.array([5, 2, 0, 1, 3, 4])  # of the input sets
COUNTS = np.array([2, 0, 3, 1, 1, 2])  # of the objects


def arrays(seed=0):
    """Points with positions, radii and kinds of objects; what does not exist is NaN, -1 and empty text."""
    rng = np.random.default_rng(seed)
    absent, gone = np.arange(MOST) >= SIZES[:, None], np.arange(PLACES) >= COUNTS[:, None]
    inputs = rng.normal(20, 5, (N, MOST, 2)).astype(np.float32).astype(np.float64)
    coords, radius = rng.uniform(5, 35, (N, PLACES, 2)), rng.uniform(1, 2, (N, PLACES))
    inputs[absent], coords[gone], radius[gone] = np.nan, np.nan, np.nan
    kind = np.where(gone, "", rng.choice(["ring", "blob"], (N, PLACES)))
    level = np.where(gone, -1, rng.integers(9, 12, (N, PLACES)))
    return {"inputs": inputs, "coords": coords, "radius": radius, "kind": kind, "level": level}


def saved(path, content):
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        with h5py.File(path, "w") as file:
            for name, values in content.items():
                file[name] = values.astype(object) if values.dtype.kind == "U" else values
    return path


def imported(tmp_path, content, name="a.npz", **options):
    import_arrays(saved(tmp_path / name, content), tmp_path / "a.h5", force=True, **options)
    return SetFile(tmp_path / "a.h5")


def objects(data):
    return [data.schema.decode(element) for element in data.__getitems__(range(len(data)))["elements"]]


def test_arrays_come_back_exactly(tmp_path):
    content = arrays()
    data = imported(tmp_path, content)
    batch = data.__getitems__(range(N))
    assert torch.equal(batch["input_mask"].sum(1), torch.from_numpy(SIZES))
    assert np.array_equal(batch["input"].numpy(), np.nan_to_num(content["inputs"]).astype(np.float32))
    assert batch["input"].dtype == torch.float32
    for found, coords, radius, kind, level in zip(objects(data), *list(content.values())[1:], strict=True):
        assert len(found) == (kind != "").sum()
        for obj, place in zip(found, range(PLACES), strict=False):
            assert obj["coords"] == pytest.approx(coords[place].tolist(), abs=1e-5)
            assert obj["radius"] == pytest.approx([radius[place]], abs=1e-6)
            assert (obj["kind"], obj["level"]) == (kind[place], str(level[place]))
    assert [field.name for field in data.schema.fields] == ["coords", "radius", "kind", "level"]
    assert data.schema.field("level").classes == ("9", "10", "11")
    assert (data.inputs.least, data.inputs.most, data.image_size) == (0, 5, None)
    present = content["inputs"][~np.isnan(content["inputs"][..., 0])]
    assert data.inputs.offset == pytest.approx(present.mean(0).tolist())
    assert data.inputs.scale == pytest.approx(present.std(0).tolist())


def rearranged(content, **changes):
    return {name: changes.get(name, content.get(name)) for name in {**content, **changes}}


def layouts():
    """The same data as other arrays."""
    content, gone = arrays(), np.arange(PLACES) >= COUNTS[:, None]
    zeros = {name: np.nan_to_num(content[name]) for name in ("inputs", "coords", "radius")}
    mask = np.arange(MOST) < SIZES[:, None]
    order = np.array([4, 0, 3, 1, 2])
    yield "HDF5", content
    yield "masks", rearranged(content, **zeros, input_mask=mask, mask=~gone, level=np.maximum(content["level"], 0))
    yield "sizes", rearranged(content, **zeros, input_sizes=SIZES, sizes=COUNTS)
    yield "zeros where others are absent", rearranged(content, coords=zeros["coords"], radius=zeros["radius"])
    yield "gaps", rearranged(content, inputs=content["inputs"][:, order][:, np.argsort(order)])
    yield "an axis of one number", rearranged(content, radius=content["radius"][..., None])
    yield "bytes", rearranged(content, kind=np.char.encode(content["kind"]))


@pytest.mark.parametrize(("name", "content"), list(layouts()))
def test_the_same_arrays_in_other_clothes_are_the_same_data(tmp_path, name, content):
    expected = imported(tmp_path, arrays())
    batch, found = expected.__getitems__(range(N)), objects(expected)
    data = imported(tmp_path, content, "a.hdf5" if name == "HDF5" else "a.npz")
    assert objects(data) == found
    assert all(torch.equal(value, batch[name]) for name, value in data.__getitems__(range(N)).items())


def test_a_mask_may_have_gaps(tmp_path):
    content = arrays()
    shifted = {name: values[:, ::-1] for name, values in content.items()}  # what exists is last
    assert [sorted(map(str, found)) for found in objects(imported(tmp_path, shifted))] == [
        sorted(map(str, found)) for found in objects(imported(tmp_path, content))
    ]


def test_vectors_are_sets_of_one_element(tmp_path):
    content = arrays() | {"inputs": np.arange(N * 4.0).reshape(N, 4)}
    data = imported(tmp_path, content)
    assert data.__getitems__([2])["input"].tolist() == [[[8.0, 9.0, 10.0, 11.0]]]
    assert "input_mask" not in data[0]
    assert "6 vectors of 4 numbers" in describe(tmp_path / "a.h5")


@pytest.mark.parametrize("kind", ["grey", "channels first", "floats", "16 bits"])
def test_images_may_be_an_array(tmp_path, kind):
    images = np.random.default_rng(0).integers(0, 256, (N, 16, 16), dtype=np.uint8)
    given = {
        "grey": images,
        "channels first": images[:, None].repeat(3, 1),
        "floats": images / 255,
        "16 bits": images.astype(np.uint16) * 257,
    }[kind]
    boxes = np.tile([2.0, 3.0, 6.0, 9.0], (N, 1, 1))
    data = imported(tmp_path, {"images": given, "boxes": boxes, "label": np.ones((N, 1), int)}, image_size=16)
    assert torch.equal(data[3]["image"], torch.from_numpy(images[3]).expand(3, -1, -1))
    box = {"coords": [4.0, 6.0], "extent": [4.0, 6.0], "label": "1"}
    assert [{name: found[name] for name in box} for found in objects(data)[0]] == [box]
    assert data.schema.side == 16


def test_the_schema_of_another_file_is_kept_with_its_inputs(tmp_path):
    first = imported(tmp_path, arrays())
    content = {name: values[:4] for name, values in arrays(1).items()}
    second = imported(tmp_path, content, schema=first.schema, inputs=first.inputs)
    assert (second.schema, second.inputs.offset, second.inputs.scale) == (
        first.schema, first.inputs.offset, first.inputs.scale
    )  # fmt: skip
    for change, message in (
        (
            {"kind": np.where(content["kind"] == "ring", "star", content["kind"])},
            "unknown kind 'star'; expected one of",
        ),
        (
            {"size": content["radius"]},
            r"the fields coords \(2\), radius \(1\), kind \(classes\), .* as in the schema, got .*size",
        ),
        ({"inputs": np.ones((4, 3))}, "inputs of 2 numbers as in the schema's file, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            imported(tmp_path, content | change, schema=first.schema, inputs=first.inputs)


def changed(name, place, value):
    def change(content):
        content[name] = content[name].copy()
        content[name][place] = value

    return change


MISTAKES = {
    "no inputs": (lambda c: c.pop("inputs"), "one of the arrays 'inputs' and 'images', got coords"),
    "inputs twice": (lambda c: c.update(images=np.zeros((N, 8, 8), np.uint8)), "'inputs' and 'images', got both"),
    "no objects": (lambda c: [c.pop(n) for n in list(c)[1:]], "expected arrays of the objects"),
    "a flat array": (lambda c: c.update(radius=c["radius"][:, 0]), r"'radius': expected \[6, 3\] or .* float64 \[6\]"),
    "other counts": (lambda c: c.update(kind=c["kind"][:, :2]), r"'kind': expected \[6, 3\]"),
    "fewer examples": (lambda c: c.update(kind=c["kind"][:2]), r"'kind': expected \[6, 3\]"),
    "no examples": (lambda c: c.update({n: v[:0] for n, v in c.items()}), r"'inputs': expected numbers \[n, K\]"),
    "text as inputs": (lambda c: c.update(inputs=c["kind"]), "'inputs': expected numbers"),
    "NaN in an input": (changed("inputs", (0, 1, 0), np.nan), "'inputs', example 0, element 1: expected finite"),
    "infinity": (changed("inputs", (0, 1), np.inf), "'inputs', example 0, element 1: expected finite"),
    "NaN in a position": (changed("coords", (0, 1, 0), np.nan), "'coords', example 0, object 1: expected finite"),
    "a lone class": (changed("kind", (1, 2), "ring"), "'kind', example 1, object 2: expected NaN, -1"),
    "a lost class": (changed("kind", (0, 0), ""), "example 0, object 0: expected NaN, -1, no text or 0"),
    "nothing at all": (
        lambda c: c.update({n: v for n, v in arrays().items() if n == "inputs"}, sizes=np.zeros(N, int)),
        "expected at least one object, got none",
    ),
    "a wrong mask": (lambda c: c.update(mask=np.ones((N, 2), bool)), r"'mask': expected truth values \[6, 3\]"),
    "wrong sizes": (lambda c: c.update(sizes=np.full(N, 4)), r"'sizes': expected integers \[6\] from 0 to 3"),
    "two masks": (lambda c: c.update(sizes=COUNTS, mask=np.ones((N, PLACES))), "one of 'mask' and 'sizes', got both"),
    "many classes": (
        lambda c: c.update({n: np.repeat(v, 300, 0) for n, v in c.items()}, level=np.arange(5400).reshape(1800, 3),
                           sizes=np.full(1800, 1), kind=np.full((1800, 3), "a"), radius=np.ones((1800, 3)),
                           coords=np.ones((1800, 3, 2))),
        "'level': expected at most 256 classes, got 1800",
    ),
    "rounded numbers": (
        lambda c: c.update(inputs=1.7e9 + np.arange(N * 2.0).reshape(N, 2)),
        "number 0 is from 1700000000 to 1700000010, .*subtract its mean",
    ),
    "bytes": (lambda c: c.update(kind=np.full((N, PLACES), b"\xff"), sizes=COUNTS), "'kind': expected text in UTF-8"),
    "NaN as a class": (changed("kind", (0, 0), "nan"), "'kind', example 0, object 0: expected a class, got 'nan'"),
    "an object twice": (
        lambda c: c.update({n: np.concatenate([v, v[:, :1]], 1) for n, v in c.items() if n != "inputs"}),
        "'coords', example 0, object 3: .* repeats another object",
    ),
    "padding by zeros": (
        lambda c: c.update(coords=np.zeros((N, PLACES, 2)), kind=None, radius=None, level=None),
        "example 0, object 1: .* say by a 'mask'",
    ),
    "a negative extent": (
        lambda c: c.update(extent=np.full((N, PLACES, 2), -1.0), sizes=COUNTS),
        "'extent', example 0, object 0: expected a width and height above 0",
    ),
    "a taken name": (lambda c: c.update(confidence=c["radius"]), "cannot be named 'confidence'"),
    "objects": (lambda c: c.update(kind=c["kind"].astype(object)), "'kind': expected numbers or text, got pickled"),
    "a bad box": (lambda c: c.update(boxes=np.ones((N, PLACES, 4)), coords=None, sizes=COUNTS), "'boxes', example 0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_arrays_is_one_clear_error(tmp_path, mistake):
    content = arrays()
    change, message = MISTAKES[mistake]
    change(content)
    saved(tmp_path / "a.npz", {name: values for name, values in content.items() if values is not None})
    with pytest.raises(InputError, match=message):
        import_arrays(tmp_path / "a.npz", tmp_path / "a.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]  # no partial file


def test_files_that_are_no_arrays_are_rejected(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.npz", arrays())
    content = path.read_bytes()
    with pytest.raises(InputError, match=r"no file .*b\.npz"):
        read_arrays(tmp_path / "b.npz")
    for wrong in (b"", b"text", content[:200], content.replace(b"(6, 5, 2)", b"(6, 5, 9)")):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=r"a\.npz.*(expected an \.npz|damaged|cut short)"):
            read_arrays(path)
    path.write_bytes(content)
    monkeypatch.setattr("setpred.data.arrays.MOST_BYTES", 100)
    with pytest.raises(InputError, match=r"at most 100 bytes, got .*; split the file"):
        read_arrays(path)
    monkeypatch.undo()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", b"\x93NUMPY\x09\x00")
    with pytest.raises(InputError, match=r"array 'inputs': expected version 1 or 2 of \.npy"):
        read_arrays(path)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["inputs"] = h5py.ExternalLink("elsewhere.h5", "inputs")
    with pytest.raises(InputError, match="expected an array in this file, got a group or a link"):
        read_arrays(tmp_path / "a.hdf5")
    imported(tmp_path, arrays())
    with pytest.raises(InputError, match=r"a\.h5 is a prepared file already"):
        import_arrays(tmp_path / "a.h5", tmp_path / "b.h5")


def test_a_file_describes_its_sets_and_notices_damage(tmp_path, capsys):
    imported(tmp_path, arrays())
    assert data_command(["info", str(tmp_path / "a.h5")]) == 0
    text = capsys.readouterr().out
    assert "6 sets of 0 to 5 elements of 2 numbers, 9 objects" in text
    assert "objects per set" in text
    assert "camera" not in text
    assert data_command(["verify", str(tmp_path / "a.h5")]) == 0
    assert "6 sets of 0 to 5 elements of 2 numbers, content as written" in capsys.readouterr().out
    assert file_header(tmp_path / "a.h5").version == 2
    for value, message in (
        (np.inf, "input of example 0 has numbers that are not finite"),
        (7.5, "not what was written"),
    ):
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            file["inputs"][0, 0, 0] = value
        with pytest.raises(InputError, match=message):
            verify(tmp_path / "a.h5")
    for wrong in ('{"least": 0, "most": 5, "offset": [0], "scale": [0]}', "[]", '{"most": 10}'):
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            file.attrs["inputs"] = wrong
        with pytest.raises(InputError, match="damaged: its description of inputs is"):
            SetFile(tmp_path / "a.h5")


def test_files_of_images_keep_their_version_and_checksum():
    header = Header(7, 8, CLEVR, {"kind": "test"})
    content = {"version": 1, "images": 7, "image_size": 8, "schema": CLEVR.to_dict(), "source": {"kind": "test"}}
    assert header.to_json() == json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert list(header.layout()) == ["images", "elements", "camera", "index"]
    assert str(header) == "7 images of 8x8"
    assert str(Header(1, 8, CLEVR, {})) == "1 image of 8x8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--xy", "centre"], "--xy: expected --csv with it, got --npz"),
        (["--images", "a"], "--images: expected --csv or --coco with it, got --npz"),
        (["--group", "a"], "--group: expected --clevr-with-masks with it, got --npz"),
        (["--units", "relative"], "are kept as given; leave out --units relative"),
        (["--image-size", "64"], "no --image-size for inputs that are sets"),
        (["--csv", "a.csv"], "one of --csv, --coco, --npz, --clevr-with-masks, got --csv and --npz"),
    ],
)
def test_options_without_effect_are_rejected(tmp_path, capsys, options, message):
    path = saved(tmp_path / "a.npz", arrays())
    assert data_command(["import", "--npz", str(path), "--out", str(tmp_path / "a.h5"), *options]) == 2
    assert message in capsys.readouterr().err
    for option in (["--xy", "centre"], ["--categorical", "label"]):  # COCO JSON says what boxes and classes are
        assert data_command(["import", "--coco", "a.json", "--out", str(tmp_path / "a.h5"), *option]) == 2
        assert f"{option[0]}: expected --csv with it, got --coco" in capsys.readouterr().err


@pytest.fixture(params=["sets", "vectors", "long vectors"])
def trained(request, tmp_path):
    """An untrained default model for two files of sets or vectors, its checkpoint, and the arrays of the second."""
    for seed, name in enumerate(("train", "val")):
        content, rng = arrays(seed), np.random.default_rng(seed)
        if request.param != "sets":
            content["inputs"] = rng.normal(3, 2, (N, 5 if request.param == "vectors" else 100))
        import_arrays(saved(tmp_path / f"{name}.npz", content), tmp_path / f"{name}.h5")
    files = [f"--data={tmp_path / 'train.h5'}", f"--val={tmp_path / 'val.h5'}"]
    torch.manual_seed(0)
    cli = build([*files, f"--runs={tmp_path}", "--trainer.accelerator=cpu", "--trainer.logger=false"])
    cli.datamodule.setup("fit")
    check_fit(cli)
    with torch.no_grad():  # votes that differ, as trained ones
        cli.model.model.encoder.encoder.network[-1].weight *= 20
    return cli, untrained_checkpoint(cli, tmp_path / "a.ckpt")


def test_a_default_model_fits_and_takes_a_step(trained):
    cli, path = trained
    encoder = cli.model.model.encoder
    kind = WindowTokens if encoder.in_dim == 100 else ElementTokens
    assert isinstance(encoder, Normalised)
    assert isinstance(encoder.encoder.tokens, kind)
    assert encoder.offset.tolist() == pytest.approx(cli.datamodule.train_data.inputs.offset)
    batch = cli.datamodule.train_data.__getitems__(range(N))
    step = Step(cli.model.model, cli.model.loss, batch)
    predicted = step.predict()
    step.loss(predicted, batch["elements"]).mean().backward()
    assert predicted.shape == (N, PLACES, cli.model.schema.set_dim)
    assert all(parameter.grad is not None for parameter in cli.model.model.parameters())
    assert torch.equal(load_checkpoint(path).model.encoder.scale, encoder.scale)


INDUCED = {"scales": 0, "layers": 2, "induced": 3}


@pytest.mark.parametrize(
    "encoder",
    [ElementTokens(input_dim=2), ElementTokens(input_dim=2, **INDUCED), WindowTokens(input_dim=2, window=2, stride=1)],
)
def test_tokens_know_neither_order_nor_padding(encoder):
    sets, mask = normal(3, 7, 2, dtype=torch.float32), torch.arange(7) < torch.tensor([[7], [4], [0]])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    expected = encoder(sets, mask)
    torch.testing.assert_close(encoder(sets[:, order], mask[:, order]), expected[:, order])
    torch.testing.assert_close(encoder(sets.masked_fill(~mask.unsqueeze(-1), torch.nan), mask), expected)
    torch.testing.assert_close(encoder(sets[1:2, :4]), expected[1:2, :4])
    wider = torch.cat([sets, torch.full_like(sets, torch.nan)], dim=1)
    torch.testing.assert_close(encoder(wider, torch.cat([mask, mask & False], dim=1))[:, :7], expected)


def test_pooled_tokens_know_neither_order_nor_padding():
    encoder = Pooled(ElementTokens(input_dim=2, tokens=2, **INDUCED), PMA(64))
    sets, mask = normal(3, 7, 2, dtype=torch.float32), torch.arange(7) < torch.tensor([[7], [4], [0]])
    expected = encoder(sets, mask)
    assert expected[:2].abs().min() > 0
    assert torch.equal(expected[2], torch.zeros(64))
    torch.testing.assert_close(encoder(sets.flip(1), mask.flip(1)), expected)
    torch.testing.assert_close(encoder(sets[1:2, :4]), expected[1:2])
    torch.testing.assert_close(encoder(sets.masked_fill(~mask.unsqueeze(-1), torch.nan), mask), expected)


def test_isab_is_attention_through_its_points():
    """By the equation, with one head."""
    block, rows = ISAB(4, points=3, heads=1, hidden_dim=5).double(), normal(2, 6, 4)

    def mab(layer, ours, theirs):
        weights = layer.attention
        query, key, value = weights.query(ours), weights.key(theirs), weights.value(theirs)
        read = weights.out((query @ key.mT / 2).softmax(-1) @ value)
        rows = torch.nn.functional.layer_norm(ours + read, [4])
        return torch.nn.functional.layer_norm(rows + layer.network(rows), [4])

    points = mab(block.gather, block.points.expand(2, -1, -1), rows)
    torch.testing.assert_close(block(rows), mab(block.spread, rows, points))


def test_local_moments_are_those_of_weighted_points():
    sets, mask, scales = normal(2, 5, 3), torch.tensor([[True] * 5, [True, False, True, True, False]]), 3
    found = local_moments(sets, mask, scales=scales).unflatten(-1, (scales, 7))
    for example, present in enumerate(mask):
        points = sets[example, present]
        for number, scale in enumerate((2.0, 1.0, 0.5)):
            for point, moments in zip(points, found[example, present, number], strict=True):
                weight = (-(points - point).square().mean(-1) / scale**2).exp()
                mean = (weight[:, None] * points).sum(0) / weight.sum()
                spread = (weight[:, None] * (points - mean) ** 2).sum(0) / weight.sum()
                expected = torch.cat([weight.sum().log()[None], (mean - point) / scale, spread / scale**2])
                torch.testing.assert_close(moments, expected)


def test_windows_are_those_of_the_vector():
    encoder, vector = WindowTokens(input_dim=10, window=4, stride=4, layers=0), normal(1, 1, 10, dtype=torch.float32)
    windows = torch.stack([vector[0, 0, :4], vector[0, 0, 4:8], torch.cat([vector[0, 0, 8:], torch.zeros(2)])])
    torch.testing.assert_close(encoder(vector)[0], encoder.network(windows) + encoder.positions)


def test_parts_of_sets_reject_numbers_out_of_range():
    for make, message in (
        (lambda: ElementTokens(input_dim=2, tokens=0), "at least 1 token"),
        (lambda: ElementTokens(input_dim=2, induced=-1), "layers and induced of at least 0"),
        (lambda: Pooled(ElementTokens(input_dim=2), PMA(32)), "aggregator's 32 numbers, got 64 from ElementTokens"),
        (lambda: ElementTokens(input_dim=0), "input_dim, token_dim and hidden_dim of at least 1"),
        (lambda: WindowTokens(input_dim=8, window=9), "stride <= window <= 8, got 4 and 9"),
        (lambda: Normalised(ElementTokens(input_dim=2), input_offset=[0.0], input_scale=[1.0]), "its 2 numbers, got 1"),
        (lambda: Normalised(ElementTokens(input_dim=1), input_offset=[0.0], input_scale=[0.0]), "scales > 0"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_predictions_depend_on_the_set_alone(trained):
    """Not on the order of its elements, on padding, on the batch or on the other sets."""
    cli, path = trained
    data, model = cli.datamodule.val_data, load_checkpoint(path).model
    expected = predict(model, data, batch_size=N).predicted
    assert torch.equal(predict(model, data, batch_size=1).predicted, expected)
    batch = data.__getitems__(range(N))
    sets, mask = batch["input"], batch.get("input_mask")
    if mask is not None:
        sets, mask = (torch.cat([part, part], dim=1) for part in (sets, mask & True))
        mask[:, MOST:] = False
        assert torch.equal(predict_in_passes(model, sets, mask=mask), expected)
        order = torch.randperm(2 * MOST, generator=torch.Generator().manual_seed(0))
        turned = predict_in_passes(model, sets[:, order], mask=mask[:, order])
        torch.testing.assert_close(turned, expected, rtol=0, atol=1e-4)
    assert torch.equal(predict_in_passes(model, sets[2:4], mask=None if mask is None else mask[2:4]), expected[2:4])


def test_predict_equals_evaluate(trained, tmp_path):
    _, path = trained
    loaded = load_checkpoint(path)
    expected = predict(loaded.model, SetFile(tmp_path / "val.h5")).predicted
    inputs = input_sets("a", read_arrays(tmp_path / "val.npz"))
    found = list(predict_sets(loaded.model, inputs, batch_size=4))
    assert torch.equal(torch.stack([each.elements for each in found]), expected)
    for source, out in (("val.npz", "a.json"), ("val.h5", "b.jsonl")):  # a prepared file has the same inputs
        predict_command([str(path), str(tmp_path / source), "--out", str(tmp_path / out), "--threshold", "0.01"])
    first, second = json.loads((tmp_path / "a.json").read_text()), (tmp_path / "b.jsonl").read_text().splitlines()
    assert first == [json.loads(line) for line in second]
    assert [each["index"] for each in first] == list(range(N))
    for each, elements in zip(first, expected, strict=True):
        assert each["objects"] == loaded.decode(elements, threshold=0.01)
    result = evaluate([str(path), "--data", str(tmp_path / "val.h5"), "--figures", str(tmp_path / "figures")])
    assert result["images"] == N
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"predictions.png", "precision_recall.png", "confusion.png", "distance_errors.png"} <= drawn


@pytest.mark.parametrize("trained", ["sets", pytest.param("long vectors", marks=pytest.mark.slow)], indirect=True)
def test_a_release_and_a_program_predict_as_the_checkpoint(trained, tmp_path):
    _, path = trained
    loaded, release = load_checkpoint(path), tmp_path / "a.safetensors"
    assert release_command([str(path), "--out", str(release), "--export", str(tmp_path / "a.pt2")]) == 0
    again = load_checkpoint(release)
    assert again.input_size == loaded.input_size
    assert torch.equal(again.model.encoder.offset, loaded.model.encoder.offset)
    program = torch.export.load(tmp_path / "a.pt2").module()
    for size in (1,) if loaded.input_size == 1 else (3, 70):
        sets = loaded.model.encoder.offset + loaded.model.encoder.scale * normal(
            4, size, loaded.model.encoder.in_dim, dtype=torch.float32
        )
        mask = torch.arange(size) < torch.tensor([[size], [1], [size], [size]])
        with torch.no_grad():
            torch.testing.assert_close(program(sets, mask), loaded.model(sets, mask=mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize("trained", ["sets"], indirect=True)
def test_the_command_measures_symmetry_in_the_units_of_the_schema(trained, tmp_path, monkeypatch, capsys):
    """A model that predicts the mean of its set moves with it; one that predicts a fixed point does not."""
    _, path = trained
    coords, out = load_checkpoint(path).schema.field("coords"), tmp_path / "out.json"
    command = [str(path), "--data", str(tmp_path / "val.h5"), "--symmetries", *SYMMETRIES, "--json", str(out)]

    def moved(place):
        def forward(self, inputs, *, mask, iterations):
            found = inputs.new_zeros(len(inputs), PLACES, self.decoder.set_dim)
            found[:, 0, :2] = (place(inputs, mask) - coords.offset) / coords.scale
            found[:, 0, -1] = mask.any(1)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(SetPredictor, "forward", forward)
            patch.setattr(gradients, "compare_gradients", lambda *given, **options: {})
            patch.setattr(gradients, "format_report", lambda result: "")
            gradients.check(command)
        found = json.loads(out.read_text())["equivariance"]
        assert "distance of positions" in capsys.readouterr().out
        return {name: max(each["moved"]) for name, each in found.items()}, found["rotation"]["different"]

    following, different = moved(mean_present)
    assert max(following.values()) < 1e-4
    assert max(different) > 0.1
    assert min(moved(lambda inputs, mask: inputs.new_full((N, 2), 15.0))[0].values()) > 0.1
    real = gradients.check(command)  # with the inner problem
    assert set(real) >= {"equivariance", "agreement"}
    assert min(max(each["moved"]) for each in real["equivariance"].values()) > 0


@pytest.mark.parametrize("trained", ["vectors"], indirect=True)
def test_the_symmetry_of_vectors_is_not_defined(trained, tmp_path):
    with pytest.raises(InputError, match=r"--symmetries: expected .* got vectors of 5 numbers; leave it out"):
        gradients.check([str(trained[1]), "--data", str(tmp_path / "val.h5"), "--symmetries", "rotation"])


@pytest.mark.parametrize("trained", ["sets"], indirect=True)
def test_inputs_of_another_kind_are_rejected(trained, tmp_path):
    _, path = trained
    images = {"images": np.zeros((N, 8, 8), np.uint8), "coords": np.full((N, 1, 2), 3.0)}
    import_arrays(saved(tmp_path / "i.npz", images), tmp_path / "images.h5")
    wider = arrays() | {"inputs": np.random.default_rng(0).normal(size=(N, 4, 7))}
    import_arrays(saved(tmp_path / "w.npz", wider), tmp_path / "wider.h5")
    for name, message in (("images", "sets as inputs, but .* has images"), ("wider", "7 numbers, but the model takes")):
        with pytest.raises(InputError, match=message):
            evaluate([str(path), "--data", str(tmp_path / f"{name}.h5")])
        with pytest.raises(InputError, match=r"expected inputs of one kind, got \d+ numbers in .* and"):
            build([f"--data={tmp_path / 'train.h5'}", f"--val={tmp_path / name}.h5", f"--runs={tmp_path}"])
    for arguments, message in (
        (["w.npz"], "inputs of 7 numbers, but the model takes"),
        (["i.npz"], "expected an array 'inputs', got images"),
        (["w.npz", "w.npz"], "one file of arrays for a model of sets, got 2"),
    ):
        given = [str(tmp_path / name) for name in arguments]
        with pytest.raises(InputError, match=message):
            predict_command([str(path), *given, "--out", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()
