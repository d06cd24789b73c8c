"""Angles that start again after a turn, optional keypoints, tolerances, and schema files."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_importing import images, imported, keypoint_document, objects, table  # noqa: F401  a fixture, too
from tiny import untrained_checkpoint

from setpred.checkpoint.untrusted import load_yaml
from setpred.commands import predict
from setpred.commands.data import main as data_command
from setpred.commands.evaluate import parser
from setpred.commands.linking import default_configuration
from setpred.commands.train import QUICKSTART, build
from setpred.data.annotations import read_coco, read_csv
from setpred.data.arrays import import_arrays
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import describe
from setpred.data.overrides import Overrides
from setpred.errors import InputError
from setpred.losses import HungarianLoss
from setpred.metrics import attribute_report, average_precision, match_by_position, pairwise_distance
from setpred.schema import ElementSchema, Field, categorical, continuous, periodic
from setpred.visualise.marks import _draw_keypoints
from setpred.visualise.style import Sheet

ROOT = Path(__file__).resolve().parents[1]
COORDS = continuous("coords", 2, scale=8, offset=8, unit="pixels")
POSE = ElementSchema(
    "pose",
    [
        COORDS,
        periodic("angle", 180, unit="degrees"),
        continuous("nose", 2, optional=True, scale=8, offset=8, unit="pixels"),
        continuous("tail", 2, optional=True, scale=8, offset=8, unit="pixels"),
    ],
    max_objects=3,
    skeleton=[("nose", "tail")],
)


def pose(x=3, y=4, angle=10, nose=(4, 4), tail=None):
    return {"coords": (x, y), "angle": angle, "nose": nose, "tail": tail}


def elements(*poses):
    return torch.from_numpy(POSE.encode(poses))[None]


# --- fields ---


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_values_survive_the_round_trip(convert):
    rows = convert(POSE.encode([pose(angle=170), pose(angle=-30, nose=None, tail=(0, 16))]))
    assert POSE.set_dim == 2 + 2 + 3 + 3 + 1
    for found, expected in zip(
        POSE.decode(rows), [pose(angle=170), pose(angle=150, nose=None, tail=(0, 16))], strict=True
    ):
        for name in ("coords", "nose", "tail"):
            assert found[name] == (None if expected[name] is None else pytest.approx(expected[name], abs=1e-5))
        assert found["angle"] == pytest.approx([expected["angle"]], abs=1e-4)
    assert rows[1][4:7].tolist() == [0, 0, 0]  # an absent keypoint is stored like an absent element


@pytest.mark.parametrize("field", [periodic("a", 360), periodic("a", 360, offset=-180), periodic("a", 2 * math.pi)])
def test_a_period_has_no_seam(field):
    """Values a period apart are one value, and the loss between 359 and 1 degrees is that between 1 and 3."""
    schema = ElementSchema("one", [field], max_objects=1)
    degree = field.period / 360

    def stored(value):
        return torch.from_numpy(schema.encode([{"a": value * degree}]))[None].double()

    torch.testing.assert_close(stored(-10), stored(350))
    values = schema.values(torch.cat([stored(v) for v in range(-720, 720, 7)]), "a")
    assert (field.offset <= values).all()
    assert (values < field.offset + field.period).all()
    loss = HungarianLoss()
    assert loss(stored(359), stored(1)).item() == pytest.approx(loss(stored(1), stored(3)).item(), rel=1e-4)
    assert loss(stored(359), stored(1)) < loss(stored(359), stored(5))
    assert pairwise_distance(stored(359), stored(1), schema=schema).item() == pytest.approx(2 * degree, rel=1e-4)


def test_a_model_learns_an_angle_across_the_seam():
    """Gradient descent on the loss takes the short way: from 350 to 10 degrees, not through 180."""
    schema = ElementSchema("one", [periodic("a", 360)], max_objects=1)
    target = torch.from_numpy(schema.encode([{"a": 10}]))[None]
    predicted = torch.from_numpy(schema.encode([{"a": 350}]))[None].requires_grad_()
    seen = []
    for _ in range(200):
        (gradient,) = torch.autograd.grad(HungarianLoss()(predicted, target).sum(), predicted)
        with torch.no_grad():
            predicted -= 0.2 * gradient
        seen.append(schema.values(predicted.detach(), "a").item())
    assert seen[-1] == pytest.approx(10, abs=0.5)
    assert all(value > 349 or value < 11 for value in seen)


def test_positions_and_angles_do_not_add():
    plain = ElementSchema("plain", [continuous("x", 1), periodic("a", 360)], max_objects=1)
    assert [field.name for field in plain.position] == ["x"]
    assert [field.name for field in POSE.position] == ["coords"]
    assert ElementSchema("turn", [periodic("a", 360)], max_objects=1).thresholds[:2] == (math.inf, 60.0)


def test_the_report_has_a_line_of_each_field_by_hand():
    target = elements(pose(angle=179, nose=(4, 4), tail=(8, 8)), pose(x=12, nose=None))
    predicted = elements(pose(angle=2, nose=(7, 8), tail=None), pose(x=12, nose=(1, 1)))
    report = attribute_report(predicted, target, match_by_position(predicted, target, schema=POSE), schema=POSE)
    assert report["unit"] == "pixels"
    errors = report["errors"]
    assert set(errors) == {"angle", "nose", "tail"}
    assert errors["angle"]["mean"] == pytest.approx(1.5, abs=1e-3)  # 3 degrees and none
    assert errors["angle"]["unit"] == "degrees"
    assert report["axis_errors"]["angle"][0]["bias"] == pytest.approx(1.5, abs=1e-3)
    nose = errors["nose"]
    assert (nose["objects"], nose["mean"]) == (1, pytest.approx(5, abs=1e-4))  # where both have one
    assert (nose["found"], nose["invented"]) == (1.0, 1.0)
    assert (errors["tail"]["objects"], errors["tail"]["found"], errors["tail"]["invented"]) == (0, 0.0, 0.0)


def test_tolerances_decide_what_is_right():
    target = elements(pose(angle=179), pose(x=12, nose=None))
    predicted = elements(pose(angle=2, nose=(7, 8)), pose(x=12, nose=None, angle=15))
    for within, score in (
        ({}, 1.0),
        ({"angle": 6}, 1.0),
        ({"angle": 4}, 0.5),  # 179 and 2 are 3 apart, 10 and 15 are 5
        ({"nose": 6}, 1.0),
        ({"nose": 4}, 0.25),  # the second is right: an object without a nose asks for none
        ({"angle": 4, "nose": 4}, 0.0),
    ):
        schema = POSE.with_tolerances(within)
        assert average_precision(predicted, target, thresholds=[1.0], schema=schema) == {1.0: score}
        assert ElementSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    lost = predicted.clone()
    lost[0, 0, 6] = 0.2  # the nose is not found
    assert average_precision(lost, target, thresholds=[1.0], schema=POSE.with_tolerances({"nose": 99})) == {1.0: 0.25}
    with pytest.raises(InputError, match=r"expected a field of numbers \(coords, angle, nose, tail\), got 'wing'"):
        POSE.with_tolerances({"wing": 1})
    assert parser().parse_args(["a.ckpt", "--within", "radius=2", "angle=10"]).within == [("radius", 2), ("angle", 10)]
    for wrong in ("radius", "radius=", "=3", "radius=0", "radius=nan"):
        with pytest.raises(InputError, match="--within: expected NAME=NUMBER"):
            parser().parse_args(["a.ckpt", "--within", wrong])


def test_schemas_convert_only_between_equal_kinds():
    other = ElementSchema("other", [*POSE.fields[::-1]], max_objects=5)
    rows = POSE.encode([pose(), pose(x=9, nose=None)])
    there = other.converted(rows[None], POSE)
    np.testing.assert_allclose(POSE.converted(there, other)[0], rows, atol=1e-6)
    degrees = ElementSchema("turn", [periodic("a", 360)], max_objects=1)
    radians = ElementSchema("turn", [periodic("a", 2 * math.pi)], max_objects=1)
    with pytest.raises(InputError, match="expected elements of the same fields"):
        degrees.converted(radians.encode([{"a": 1}])[None], radians)
    plain = ElementSchema("plain", [continuous("a", 1, scale=90, offset=90)], max_objects=1)  # of a small file
    for ours, theirs in ((degrees, plain), (plain, degrees)):
        found = ours.converted(theirs.encode([{"a": 170}])[None], theirs)
        np.testing.assert_allclose(found[0], ours.encode([{"a": 170}]), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 3, "period": 2.0}, "expected 2 stored numbers"),
        ({"size": 1, "optional": True}, "expected 2 stored numbers"),
        ({"size": 2, "period": -1.0}, "a period of at least 0"),
        ({"size": 2, "tolerance": 0.0}, "a tolerance above 0"),
        ({"size": 2, "period": 1.0, "optional": True}, "got several"),
        ({"size": 2, "period": 1.0, "classes": ("a", "b")}, "got several"),
    ],
)
def test_impossible_fields_are_rejected(arguments, message):
    with pytest.raises(InputError, match=message):
        Field("a", **arguments)
    with pytest.raises(InputError, match="expected a skeleton between fields, got 'wing'"):
        ElementSchema("a", [COORDS], max_objects=1, skeleton=[("coords", "wing")])
    with pytest.raises(InputError, match="a period above 0"):
        periodic("a", 0)


# --- imports ---


@pytest.mark.parametrize(
    ("column", "values", "period"),
    [
        ("angle", [0, 90, 359], 360),
        ("heading", [-170, 20, 175.5], 360),
        ("theta_rad", [0.1, 3.3, 6], 2 * math.pi),
        ("orientation", [-3.1, 0.4, 3.1], 2 * math.pi),
        ("yaw_degrees", [0, 200, 10], 360),
        ("angle", [0, 90, 179], 0),  # perhaps of things that look the same after half a turn
        ("angle", [0, 3, 6], 0),  # radians or degrees?
        ("angle_rad", [0, 90, 359], 0),
        ("angle", [0, 90, 400], 0),
        ("angular_speed", [0, 90, 359], 0),
    ],
)
def test_a_period_is_inferred_only_without_a_doubt(images, tmp_path, column, values, period):  # noqa: F811
    said = []
    rows = [f"{name},3,4,{value}" for name, value in zip("abc", values, strict=True)]
    source = read_csv(table(tmp_path, "\n".join([f"image,x,y,{column}", *rows])))
    data = imported(source, images, tmp_path, say=said.append)
    assert data.schema.field(column).period == pytest.approx(period)
    assert len(said) == (not period and column != "angular_speed")
    found = [each[0][column][0] for each in objects(data)]
    assert found == pytest.approx(values, abs=1e-4)
    assert ("again after" in describe(tmp_path / "out.h5")) == bool(period)


def test_keypoints_become_optional_fields(images, tmp_path):  # noqa: F811
    data = imported(read_coco(table(tmp_path, json.dumps(keypoint_document()), "coco.json")), images, tmp_path)
    schema = data.schema
    assert [field.name for field in schema.keypoints] == ["nose", "tail"]
    assert schema.skeleton == (("nose", "tail"),)
    assert schema.in_pixels == ("coords", "extent", "nose", "tail")
    assert schema.side == 16
    (full,), rest = objects(data)[:2]
    assert full["nose"] == pytest.approx([3, 2])
    assert full["tail"] == pytest.approx([5, 6])  # occluded, but its place is known
    found = {obj["category"]: obj for obj in rest}
    assert (found["cat"]["tail"], found["box"]["nose"]) == (None, None)
    assert "tail: 5.00 to 5.00, 6.00 to 6.00 pixels, of 1 objects" in describe(tmp_path / "out.h5")
    loss = default_configuration(
        QUICKSTART, {"init_args": {name: str(tmp_path / "out.h5") for name in ("train", "val")}}
    )
    assert set(loss["model"]["loss"]["init_args"]["weights"]) == {"coords", "extent", "nose", "tail"}


ROWS = "image,x,y,radius,angle,label\na,3,4,1.5,10,1\nb,8,9,2,170,2"


def from_schema_file(images, tmp_path, text, *options):  # noqa: F811
    """What `setpred data import` writes with this schema file."""
    (tmp_path / "schema.yaml").write_text(text)
    arguments = ["import", "--csv", str(table(tmp_path, ROWS)), "--images", str(images), "--workers", "0", "--force"]
    status = data_command(
        [*arguments, "--out", str(tmp_path / "s.h5"), "--schema", str(tmp_path / "schema.yaml"), *options]
    )
    return status, tmp_path / "s.h5"


def test_a_schema_file_overrides_what_is_inferred(images, tmp_path):  # noqa: F811
    text = """
        name: cells
        max_objects: 7
        fields:
          radius: {unit: µm, scale: 5, offset: 0, tolerance: 2}
          angle: {name: tilt, period: 180, unit: degrees}
          label: {name: kind, classes: {1: disc, 2: square}}
    """
    status, path = from_schema_file(images, tmp_path, text)
    assert status == 0
    data = SetFile(path)
    assert (data.schema.name, data.schema.max_objects) == ("cells", 7)
    radius, tilt = data.schema.field("radius"), data.schema.field("tilt")
    assert (radius.unit, radius.scale, radius.offset, radius.tolerance) == ("µm", 5, 0, 2)
    assert (tilt.period, tilt.unit) == (180, "degrees")
    assert data.schema.field("kind") == categorical("kind", "disc", "square")
    assert [obj["kind"] for (obj,) in objects(data)[:2]] == ["disc", "square"]
    assert objects(data)[1][0]["tilt"] == pytest.approx([170], abs=1e-4)


def test_a_schema_file_means_the_same_for_tables_and_arrays(images, tmp_path):  # noqa: F811
    """Names, classes, units, periods and fields that objects may lack; also for a second file of the same schema."""
    (tmp_path / "schema.yaml").write_text(
        """
        name: cells
        max_objects: 3
        fields:
          coords: {unit: px, tolerance: 3}
          radius: {name: size, unit: µm, scale: 5, offset: 1}
          angle: {period: 180, unit: degrees}
          depth: {optional: true}
          label: {name: kind, classes: {1: disc, 2: square}}
        """
    )
    rows = "image,x,y,radius,angle,depth,label\na,3,4,1.5,10,,1\na,5,6,3,90,0.5,2\nb,8,9,2,170,7,2"
    gone = np.nan
    content = {
        "images": np.stack([np.asarray(Image.open(file)) for file in sorted(images.iterdir())]),
        "coords": [[(3, 4), (5, 6)], [(8, 9), (0, 0)], [(0, 0), (0, 0)]],
        "radius": [[1.5, 3], [2, gone], [gone, gone]],
        "angle": [[10.0, 90], [170, gone], [gone, gone]],
        "depth": [[gone, 0.5], [7, gone], [gone, gone]],
        "label": [[1, 2], [2, -1], [-1, -1]],
    }
    np.savez(tmp_path / "a.npz", **content)
    sources = {
        "csv": ("--csv", table(tmp_path, rows), "--images", images, "--categorical", "label"),
        "npz": ("--npz", tmp_path / "a.npz"),
    }
    found = []
    for name, source in sources.items():
        out = ("--out", tmp_path / f"{name}.h5", "--schema", tmp_path / "schema.yaml", "--workers", 0)
        assert data_command(["import", *map(str, (*source, *out))]) == 0
        found.append(SetFile(tmp_path / f"{name}.h5"))
    first, second = found
    assert first.schema == second.schema
    assert [field.name for field in first.schema.fields] == ["coords", "size", "angle", "depth", "kind"]
    for name in ("image", "elements"):
        assert torch.equal(*(data.__getitems__(range(3))[name] for data in found))
    assert [[obj["depth"] for obj in of] for of in objects(second)] == [[None, [0.5]], [[7.0]], []]
    assert [obj["kind"] for of in objects(second) for obj in of] == ["disc", "square", "square"]


def test_keypoints_of_arrays_are_pixels_and_follow_another_image_size(tmp_path):
    def imported_arrays(shape, overrides=None, schema=None, **changes):
        places = {"coords": [[(3.0, 4), (5, 6)]], "nose": [[(1.0, 2), (np.nan, np.nan)]], "sizes": np.array([2])}
        content = {"images": np.zeros((1, *shape), np.uint8)} | places | changes
        np.savez(tmp_path / "k.npz", **content)
        import_arrays(tmp_path / "k.npz", tmp_path / "k.h5", overrides=overrides, schema=schema, force=True)
        return SetFile(tmp_path / "k.h5")

    overrides = Overrides.of({"fields": {"nose": {"optional": True, "name": "tip"}}}, "schema.yaml")
    data = imported_arrays((12, 16), overrides)
    assert [obj["tip"] for obj in objects(data)[0]] == [[1, 2], None]
    assert data.schema.in_pixels == ("coords", "tip")
    kept = imported_arrays((12, 16), Overrides.of({"fields": {"nose": {"optional": True}}}, "schema.yaml")).schema
    half = imported_arrays((6, 8), schema=kept)  # whose pixels are twice as large
    assert [(obj["coords"], obj["nose"]) for obj in objects(half)[0]] == [([6, 8], [2, 4]), ([10, 12], None)]
    for changes, message in (
        ({"nose": [[(1.0, np.nan), (1, 1)]]}, "array 'nose', example 0, object 0: expected finite numbers"),
        ({"nose": [[(1.0, 400), (1, 1)]]}, "array 'nose', example 0, object 0: expected a position in the image"),
        ({"coords": [[(np.nan, np.nan), (1, 1)]]}, "array 'coords', example 0, object 0: expected finite numbers"),
    ):
        with pytest.raises(InputError, match=message):
            imported_arrays((12, 16), overrides, **changes)
    for fields, message in (
        ({"nos": {}}, "expected some of the fields coords, nose, got 'nos'"),
        ({"coords": {"optional": True}}, "field 'coords': expected options name, unit, tolerance for it, got optional"),
        ({"nose": {"period": 3}}, "field 'nose': expected options .* got period"),
        ({"nose": {"optional": 1}}, "field 'nose', optional: expected true or false, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            imported_arrays((12, 16), Overrides.of({"fields": fields}, "schema.yaml"), nose=[[(1.0, 2), (3, 4)]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a schema with name, max_objects or fields"),
        ("fields: {area: {unit: px}}", "expected some of the fields coords, radius, angle, label, got 'area'"),
        ("sides: 3", "expected some of name, max_objects, fields, got 'sides'"),
        ("max_objects: many", "max_objects: expected an integer from 1"),
        ("max_objects: 0", "max_objects: expected an integer from 1"),
        ("fields: {radius: {units: px}}", "field 'radius': expected some of name, classes, .* got 'units'"),
        ("fields: {radius: {scale: 0}}", "field 'radius', scale: expected a finite number above 0, got 0"),
        ("fields: {radius: {classes: [1, 2]}}", "field 'radius': expected options name, unit, .* got classes"),
        ("fields: {coords: {scale: 3}}", "field 'coords': expected options name, unit, tolerance for it, got scale"),
        ("fields: {label: {classes: [1]}}", "line 3: unknown label '2'; expected one of 1"),
        ("fields: {label: {classes: {1: disc}}}", "field 'label': expected a new name of every class"),
        ("fields: {angle: {period: -1}}", "field 'angle', period: expected a finite number above 0"),
        ("fields: {angle: {period: 180, scale: 2}}", "field 'angle': expected a period or scale, got both"),
        ("fields: {angle: {period: 180, optional: true}}", "field 'angle': expected a period or optional, got both"),
        ("fields: {label: {optional: true}}", "field 'label': expected options name, classes for it, got optional"),
        ("fields: {angle: {name: radius}}", "field names must be unique"),
        ("fields: 3", "fields: expected options by the name of a field, got 3"),
        ("fields: {angle: 3}", "field 'angle': expected some of name, classes"),
        ("fields: [", "got: "),
    ],
)
def test_a_mistake_in_a_schema_file_is_one_clear_error(images, tmp_path, capsys, text, message):  # noqa: F811
    status, path = from_schema_file(images, tmp_path, text, "--categorical", "label")
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not path.exists()


def test_the_documented_schema_file_is_one():
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL)
    overrides = Overrides.of(load_yaml(example), "docs")
    assert overrides.renamed("label") == "kind"
    assert overrides.options("angle", "period", "unit") == {"period": 180, "unit": "degrees"}


def test_a_period_can_be_ruled_out(images, tmp_path):  # noqa: F811
    text = "image,x,y,angle\na,3,4,0\nb,3,4,359"
    overrides = Overrides.of({"fields": {"angle": {"period": None}}}, "schema.yaml")
    data = imported(read_csv(table(tmp_path, text)), images, tmp_path, overrides=overrides)
    assert data.schema.field("angle").period == 0


# --- pictures and predictions ---


def test_keypoints_are_drawn_with_the_skeleton_between_those_that_are_there():
    axes = Sheet(4, 4).panel(0, 0, 4, 4)
    both, one, none = pose(nose=(4, 5), tail=(6, 7)), pose(nose=(4, 5)), pose(nose=None)
    for obj, lines in ((both, [[(4, 5), (6, 7)]]), (one, []), (none, [])):
        axes.clear()
        _draw_keypoints(axes, obj, "red", "-", POSE)
        drawn = [[tuple(point) for point in line.get_xydata()] for line in axes.lines]
        dots = [tuple(obj[name]) for name in ("nose", "tail") if obj[name] is not None]
        assert drawn == lines + ([dots] if dots else [])


def test_predictions_are_in_pixels_of_each_image_which_is_padded(images, tmp_path, monkeypatch):  # noqa: F811
    file, seen = tmp_path / "out.h5", []
    schema = imported(read_coco(table(tmp_path, json.dumps(keypoint_document()), "coco.json")), images, tmp_path).schema
    options = [f"--runs={tmp_path}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = build([f"--data={file}", f"--val={file}", *options])
    untrained_checkpoint(cli, tmp_path / "a.ckpt")
    cat = {"coords": (8, 6), "extent": (4, 2), "nose": (3, 2), "tail": None, "category": "cat"}
    found = torch.from_numpy(schema.encode([cat]))
    monkeypatch.setattr(predict, "predict_in_passes", lambda _, images, **__: seen.append(images) or found[None])
    Image.new("RGB", (32, 24), "white").save(tmp_path / "white.png")  # twice as large as those of the training
    np.savez(tmp_path / "white.npz", images=np.full((1, 24, 32), 255, np.uint8))
    for source in ("white.png", "white.npz"):
        arguments = [str(tmp_path / "a.ckpt"), str(tmp_path / source), "--out", str(tmp_path / "out.json")]
        predict.run([*arguments, "--figures", str(tmp_path / source.replace(".", "_"))])
        ((obj,),) = (image["objects"] for image in json.loads((tmp_path / "out.json").read_text()))
        assert (obj["coords"], obj["extent"], obj["nose"]) == tuple(map(pytest.approx, ([16, 12], [8, 4], [6, 4])))
        assert obj["tail"] is None
        assert len(list((tmp_path / source.replace(".", "_")).iterdir())) == 1
        rows = seen.pop()[0].float().mean((0, 2))
        assert rows[:46].min() > 250
        assert rows[50:].max() == 0
