"""What predictions become for other tools: positions, classes and confidences stay what was decoded."""

import csv
import importlib
import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from setpred.commands.predict import choose_format
from setpred.data.annotations import CocoIds, read_coco, read_csv
from setpred.data.dataset import SetFile
from setpred.data.exporting import FORMATS, csv_columns, to_coco, to_csv, to_fiftyone, to_json, to_supervision
from setpred.data.importing import import_images
from setpred.errors import InputError
from setpred.schema import CLEVR, ElementSchema, categorical, continuous

SIDE = 40
PLACE = continuous("coords", 2, scale=SIDE / 2, offset=SIDE / 2)
EXTENT = continuous("extent", 2, scale=SIDE / 2)
ANGLE = continuous("angle", 1, scale=90.0)
LABELS = categorical("label", 'a "b"', "<c>,d", "é")
SIZES = categorical("size", "big", "small")
SCHEMAS = {
    "points": [PLACE, LABELS],
    "plain points": [PLACE],
    "boxes": [PLACE, EXTENT, SIZES, LABELS, continuous("weight", 1, scale=3.0)],
    "turned": [PLACE, EXTENT, ANGLE, LABELS],
    "keypoints": [PLACE, EXTENT, LABELS, continuous("nose", 2, optional=True, scale=SIDE / 2, offset=SIDE / 2)],
}
SCHEMAS = {name: ElementSchema(name, fields, max_objects=4) for name, fields in SCHEMAS.items()}
every_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)


@pytest.fixture
def found(tmp_path):
    """`found(schema)` predicts sets of 0 to 3 objects for four images, which are in the folder `images`."""
    paths = [str(tmp_path / "images" / name) for name in ("a,1.png", "b.png", "c.png", "d.png")]
    for path in paths:
        Path(path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (SIDE, 30)).save(path)

    def predicted(schema):
        generator, sets = np.random.default_rng(0), []
        for count in range(4):
            elements = generator.uniform(0.1, 0.5, (count, schema.set_dim)).astype(np.float32)
            elements[:, -1] = generator.uniform(0.5, 1.0, count)
            if schema.keypoints:
                elements[::2, schema.slice("nose").stop - 1] = 1.0  # every other one is there
            sets.append(schema.decode(elements))
        return list(zip(paths, sets, strict=True))

    return predicted


def imported(table, tmp_path, **options):
    import_images(table, tmp_path / "images", tmp_path / "again.h5", image_size=8, **options)
    data = SetFile(tmp_path / "again.h5")
    return data, [data.schema.decode(elements) for elements in data.__getitems__(range(len(data)))["elements"]]


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "keypoints"])
def test_a_table_of_predictions_is_imported_again(found, tmp_path, name):
    schema = SCHEMAS[name]
    expected = found(schema)
    (tmp_path / "p.csv").write_text("".join(to_csv(expected, schema)))
    table = read_csv(tmp_path / "p.csv")
    assert table.left_out == ["confidence"]
    data, sets = imported(table, tmp_path)
    assert [data.name(number) for number in range(4)] == [Path(path).name for path, _ in expected]
    assert {field.name for field in data.schema.fields} == {field.name for field in schema.fields}
    assert data.schema.side == SIDE
    for objects, (_, real) in zip(sets, expected, strict=True):
        for obj, same in zip(objects, real, strict=True):
            for field in schema.fields:
                value = same[field.name]
                assert obj[field.name] == (value if field.categorical else pytest.approx(value, rel=1e-5))


def test_the_table_holds_every_number_and_the_confidence():
    row = {"coords": [1, 2, 3], "material": "metal", "color": "red", "shape": "cube", "size": "large"}
    elements = CLEVR.encode([row])
    (obj,) = CLEVR.decode(elements)
    text = "".join(to_csv([("x.png", [obj | {"confidence": 0.75}]), ("y.png", [])], CLEVR))
    first, empty = csv.DictReader(io.StringIO(text))
    assert first == {"image": "x.png", "x": "1.0", "y": "2.0", "z": "3.0", "material": "metal", "color": "red"} | {
        "shape": "cube", "size": "large", "confidence": "0.75",
    }  # fmt: skip
    assert set(empty.values()) == {"y.png", ""}
    both = ElementSchema("both", [continuous("coords", 2), continuous("x", 1)], max_objects=1)
    with pytest.raises(InputError, match="got x twice"):
        csv_columns(both)


@pytest.mark.parametrize("name", ["boxes", "turned", "keypoints"])
def test_coco_boxes_are_the_decoded_ones(found, tmp_path, name):
    schema = SCHEMAS[name]
    expected = found(schema)
    paths = [path for path, _ in expected]
    document = json.loads("".join(to_coco(expected, schema, paths)))
    assert document["images"][0] == {"id": 1, "file_name": "a,1.png", "width": SIDE, "height": 30}
    names = {category["id"]: category["name"] for category in document["categories"]}
    of_image = {number: [a for a in document["annotations"] if a["image_id"] == number] for number in range(1, 5)}
    for annotations, (_, objects) in zip(of_image.values(), expected, strict=True):
        for annotation, obj in zip(annotations, objects, strict=True):
            (x, y), (w, h) = obj["coords"], obj["extent"]
            assert names[annotation["category_id"]] == obj["label"]
            assert annotation["score"] == obj["confidence"]
            assert annotation["area"] == pytest.approx(w * h)
            box = (x - w / 2, y - h / 2, w, h)
            if name == "turned":
                turn = np.radians(obj["angle"][0])
                width, height = (
                    w * abs(np.cos(turn)) + h * abs(np.sin(turn)), w * abs(np.sin(turn)) + h * abs(np.cos(turn)),
                )  # fmt: skip
                box = (x - width / 2, y - height / 2, width, height)
                corners = np.reshape(annotation["segmentation"], (4, 2))
                side = corners[1] - corners[0]  # along the width
                assert np.degrees(np.arctan2(side[1], side[0])) == pytest.approx(obj["angle"][0], rel=1e-4)
                assert np.linalg.norm(side) == pytest.approx(w, rel=1e-4)
            assert annotation["bbox"] == pytest.approx(box, rel=1e-4, abs=1e-4)
    (tmp_path / "p.json").write_text(json.dumps(document))
    if name != "turned":
        _, sets = imported(read_coco(tmp_path / "p.json"), tmp_path)
        for objects, (_, real) in zip(sets, expected, strict=True):
            np.testing.assert_allclose(places(objects), places(real), rtol=1e-5)
            assert [o["category"] for o in objects] == [o["label"] for o in real]
            for obj, same in zip(objects, real, strict=True) if name == "keypoints" else ():
                assert obj["nose"] == (same["nose"] and pytest.approx(same["nose"], rel=1e-5))


def test_results_have_the_ids_of_the_annotations(found, tmp_path):
    schema, expected = SCHEMAS["boxes"], found(SCHEMAS["boxes"])
    paths = [path for path, _ in expected]
    truth = {
        "images": [{"id": 10 + n, "file_name": f"val/{Path(path).name}"} for n, path in enumerate(paths)],
        "categories": [{"id": 7 * n, "name": name} for n, name in enumerate(reversed(LABELS.classes))],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    ids = CocoIds.read(tmp_path / "truth.json")
    results = json.loads("".join(to_coco(expected, schema, paths, ids)))
    assert [r["image_id"] for r in results] == [11, 12, 12, 13, 13, 13]
    assert [r["category_id"] for r in results] == [
        ids.categories[o["label"]] for _, objects in expected for o in objects
    ]
    assert all(set(r) == {"image_id", "category_id", "bbox", "score"} for r in results)
    assert json.loads("".join(to_coco([(paths[0], [])], schema, paths, ids))) == []
    for change, match in (
        ({"images": truth["images"][1:]}, "got none of a,1.png"),
        ({"categories": truth["categories"][1:]}, "got none named 'é'"),
        ({"categories": [*truth["categories"], {"id": 99, "name": "é"}]}, "got several for 'é'"),
    ):
        (tmp_path / "truth.json").write_text(json.dumps(truth | change))
        with pytest.raises(InputError, match=match):
            choose_format("coco", Path("p.json"), schema, paths, tmp_path / "truth.json")


def test_formats_follow_the_name_and_do_not_hide_what_they_lack(found):
    points, boxes = SCHEMAS["points"], SCHEMAS["boxes"]
    expected = found(boxes)
    paths = [path for path, _ in expected]
    written = {name: "".join(choose_format(name, Path("p.x"), boxes, paths, None)(expected)) for name in FORMATS}
    assert len(set(written.values())) == len(FORMATS)
    for name, text in written.items():
        assert "".join(choose_format(None, Path(f"p.{name.upper()}"), boxes, paths, None)(expected)) == text
    assert choose_format(None, Path("p.txt"), boxes, paths, None) is to_json
    with pytest.raises(InputError, match=r"expected boxes in pixels.*got the fields coords, label; choose json"):
        choose_format("coco", Path("p.json"), points, paths, None)
    with pytest.raises(InputError, match=r"--coco-ids: expected --format coco, got csv"):
        choose_format("csv", Path("p.csv"), boxes, paths, Path("truth.json"))


class Label(SimpleNamespace):
    """A label that keeps its arguments, as FiftyOne's do."""


@pytest.fixture(params=["fake", "installed"])
def tool(request, monkeypatch):
    """`tool(name)` is the module, or one with the classes that its documentation names."""

    def module(name):
        if request.param == "installed":
            return pytest.importorskip(name)
        made = SimpleNamespace(**{kind: partial(Label, kind=kind) for kind in (
            "Detections", "Detection", "Polylines", "Polyline", "Keypoints", "Keypoint",
        )})  # fmt: skip
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return module


@every_schema
def test_detections_of_supervision_are_the_decoded_objects(found, tool, schema):
    tool("supervision")
    for _, objects in found(schema):
        made = to_supervision(objects, schema)
        assert made.xyxy.shape == (len(objects), 4)
        np.testing.assert_allclose((made.xyxy[:, :2] + made.xyxy[:, 2:]) / 2, places(objects), rtol=1e-5)
        np.testing.assert_allclose(made.confidence, [obj["confidence"] for obj in objects], rtol=1e-6)
        if schema.label:
            names = [LABELS.classes[number] for number in made.class_id]
            assert names == made.data["class_name"].tolist() == [obj["label"] for obj in objects]
        if schema is SCHEMAS["boxes"]:
            np.testing.assert_allclose(made.xyxy[:, 2:] - made.xyxy[:, :2], places(objects, "extent"), rtol=1e-4)
            assert made.data["size"].tolist() == [obj["size"] for obj in objects]
        if schema.angle:
            assert made.data["xyxyxyxy"].shape == (len(objects), 4, 2)


@every_schema
def test_labels_of_fiftyone_are_the_decoded_objects(found, tool, schema):
    tool("fiftyone")
    size = np.array([SIDE, 30])
    kind = "polylines" if schema.angle else "detections" if schema.has_boxes else "keypoints"
    for _, objects in found(schema):
        labels = getattr(to_fiftyone(objects, schema, tuple(size)), kind)
        for label, obj in zip(labels, objects, strict=True):
            assert label.label == obj.get("label", "object")
            if kind == "detections":
                box = np.array(label.bounding_box).reshape(2, 2) * size
                np.testing.assert_allclose(box[0] + box[1] / 2, obj["coords"], rtol=1e-5)
                np.testing.assert_allclose(box[1], obj["extent"], rtol=1e-5)
                assert schema is not SCHEMAS["boxes"] or label.weight == obj["weight"][0]
                assert bool(obj.get("nose")) == hasattr(label, "nose")
            else:
                points = label.points[0] if kind == "polylines" else label.points
                np.testing.assert_allclose(np.mean(points, axis=0) * size, obj["coords"], rtol=1e-5)


def places(objects, name="coords"):
    return np.array([obj[name] for obj in objects]).reshape(-1, 2)


@pytest.mark.parametrize("convert", [to_supervision, partial(to_fiftyone, size=(4, 4))])
def test_a_tool_that_cannot_help_is_one_error(convert, monkeypatch):
    module = "supervision" if convert is to_supervision else "fiftyone"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {module}"):
        convert([], SCHEMAS["points"])
    monkeypatch.setitem(sys.modules, module, importlib.import_module("types"))
    with pytest.raises(InputError, match="expected objects with 'coords' in pixels"):
        convert([], CLEVR)


def test_an_angle_in_radians_turns_as_one_in_degrees():
    box = {"coords": [3.0, 4.0], "extent": [6.0, 2.0]}
    radians = ElementSchema("r", [PLACE, EXTENT, continuous("theta", 1, scale=1.5)], max_objects=1)
    corners = radians.corners(box | {"theta": [np.pi / 2]})
    np.testing.assert_allclose(corners, SCHEMAS["turned"].corners(box | {"angle": [90.0]}))
    np.testing.assert_allclose(corners, [(4, 1), (4, 7), (2, 7), (2, 1)])  # clockwise on an image
    assert (SCHEMAS["boxes"].corners({"coords": [3, 4], "extent": [-6, 2]})[:, 0] == 3).all()
