"""Importing annotated images: known answers, the same data in other clothes, and one clear error per mistake."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tiny import untrained_checkpoint

from setpred.checkpoint.load import read_checkpoint, training_loss
from setpred.commands.data import main
from setpred.commands.linking import SPARE, default_configuration
from setpred.commands.train import QUICKSTART, build, check_fit
from setpred.data.annotations import possible_classes, read_coco, read_csv
from setpred.data.dataset import SetFile
from setpred.data.images import pixel_size, read_image
from setpred.data.importing import import_images
from setpred.data.overrides import Overrides
from setpred.errors import InputError
from setpred.metrics import attribute_report, pairwise_distance
from setpred.schema import UNCALIBRATED, ElementSchema, continuous

HEADER = "image,x,y,radius,label"
SURE = float(UNCALIBRATED.confidence(1.0))
ROWS = ["a.png,3,4,1.5,disc", "a.png,10,6,2,square", "b.png,0,11,1,disc"]
TEXT = "\n".join([HEADER, *ROWS])


@pytest.fixture
def images(tmp_path):
    """Three images of 16x12 pixels; c.png has no objects."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (16, 12), "navy").save(folder / f"{name}.png")
    return folder


def table(tmp_path, text, name="points.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def imported(source, images, tmp_path, **options):
    out = tmp_path / "out.h5"
    import_images(source, images, out, force=True, **options)
    return SetFile(out)


def objects(data):
    return [data.schema.decode(element) for element in data.__getitems__(range(len(data)))["elements"]]


def test_columns_of_few_whole_numbers_may_be_classes(tmp_path):
    rows = [f"a.png,{n % 3},{n},{n % 3},{n % 3 / 2},{n}" for n in range(30)]
    path = table(tmp_path, "\n".join(["image,x,y,digit,half,number", *rows]))
    assert possible_classes(read_csv(path)) == {"digit": 3}
    assert not possible_classes(read_csv(path, categorical=["digit"]))


def test_a_table_becomes_elements_in_its_own_units(images, tmp_path):
    data = imported(read_csv(table(tmp_path, TEXT)), images, tmp_path)
    assert [len(found) for found in objects(data)] == [2, 1, 0]  # the image without a row is kept, and is empty
    first = {found["label"]: found for found in objects(data)[0]}
    assert first["disc"]["coords"] == pytest.approx([3, 4], abs=1e-5)
    assert first["square"]["radius"] == pytest.approx([2], abs=1e-6)
    assert data.schema.max_objects == 2
    assert data.schema.field("label").classes == ("disc", "square")
    assert data.schema.thresholds[1] == pytest.approx(8 / 3, rel=1e-3)  # a third of half the longer side
    encoded = data.schema.encode([{"coords": (16, 0), "radius": 1, "label": "disc"}])[0]
    assert encoded[:2].tolist() == [1.0, -1.0]  # the longer side is 16


@pytest.fixture
def expected(images, tmp_path):
    """The objects of `TEXT`."""
    return objects(imported(read_csv(table(tmp_path, TEXT)), images, tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "\r\n".join([HEADER, *ROWS]).encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.encode("utf-16"),
        TEXT.replace(",", ";").encode(),
        TEXT.replace(",", "\t").encode(),
        "\n".join([HEADER.upper(), "", *ROWS, "c.png,,,,"]).encode(),
        b"label,radius,y,x,filename\ndisc,1.5,4,3,a\nsquare,2,6,10,a\ndisc,1,11,0,b\n",
    ],
)
def test_the_same_table_in_other_clothes_is_the_same_data(images, tmp_path, expected, text):
    assert objects(imported(read_csv(table(tmp_path, text)), images, tmp_path)) == expected


def test_one_file_per_image_is_the_same_data(images, tmp_path, expected):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in "abc":
        rows = [row.partition(",")[2] for row in ROWS if row.startswith(name)]
        (folder / f"{name}.csv").write_text("\n".join(["x,y,radius,label", *rows]))
    assert objects(imported(read_csv(folder), images, tmp_path)) == expected


def test_boxes_of_every_source_are_the_same_data(images, tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}, {"id": 9, "file_name": "c.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [2, 1, 4, 6]},
            {"id": 2, "image_id": 8, "category_id": 1, "bbox": [0, 0, 10, 4]},
            {"id": 3, "image_id": 8, "category_id": 1, "bbox": [0, 0, 16, 12], "iscrowd": 1},
        ],
    }
    found = [objects(imported(read_coco(table(tmp_path, json.dumps(coco), "coco.json")), images, tmp_path))]
    tables = [
        ("image,xmin,ymin,xmax,ymax,category\na.png,2,1,6,7,dog\nb.png,0,0,10,4,cat", None),
        ("image,x,y,width,height,category\na.png,2,1,4,6,dog\nb.png,0,0,10,4,cat", "corner"),
        ("image,h,w,x,y,category\na.png,6,4,4,4,dog\nb.png,4,10,5,2,cat", "centre"),
    ]
    found += [objects(imported(read_csv(table(tmp_path, text)), images, tmp_path, xy=xy)) for text, xy in tables]
    assert found[0][0][0] | {"confidence": SURE} == {
        "coords": [4.0, 4.0], "extent": [4.0, 6.0], "category": "dog", "confidence": SURE
    }  # fmt: skip
    assert all(each == found[0] for each in found)


def test_positions_follow_their_pixels(images, tmp_path):
    """A bright dot is where the stored position says, whatever the shape and kind of the image."""
    for path in images.iterdir():
        path.unlink()
    rows, x, y = ["image,x,y"], 37, 11
    grey = np.zeros((24, 60), np.uint16)
    grey[y - 2 : y + 3, x - 2 : x + 3] = 60000
    Image.fromarray(grey).save(images / "sixteen.png")
    eight = Image.fromarray((grey // 257).astype(np.uint8))
    eight.save(images / "grey.png")
    eight.convert("P").save(images / "palette.png")
    eight.convert("RGBA").save(images / "alpha.png")
    turned = eight.transpose(Image.Transpose.ROTATE_90)  # stored turned, with a note that turns it back
    exif = turned.getexif()
    exif[274] = 6
    turned.save(images / "turned.png", exif=exif)
    turned.save(images / "turned.tif", exif=exif)
    tall = Image.new("L", (60, 120))
    tall.paste(eight, (0, 0))
    tall.save(images / "tall.png")
    assert all(pixel_size(path) == read_image(path).size for path in images.iterdir())
    rows += [f"{path.name},{x},{y}" for path in sorted(images.iterdir())]
    data = imported(read_csv(table(tmp_path, "\n".join(rows))), images, tmp_path, image_size=64)
    batch = data.__getitems__(range(len(data)))
    assert len(data) == 7
    for image, elements in zip(batch["image"], batch["elements"], strict=True):
        assert (image[0] == image[2]).all()
        bright = (image.float().mean(0) > 100).nonzero().float()
        centre = bright.mean(0).flip(0) + 0.5
        expected = (elements[0, :2] + 1) / 2 * 64 + 64 / 120 / 2
        assert (centre - expected).abs().max() < 1


def test_relative_and_given_units(images, tmp_path):
    text = "image,x,y\na,0.5,0.5\nb,1,0"
    with pytest.raises(InputError, match="pass --units relative"):
        imported(read_csv(table(tmp_path, text)), images, tmp_path)
    data = imported(read_csv(table(tmp_path, text)), images, tmp_path, units="relative")
    assert objects(data)[0][0]["coords"] == pytest.approx([8, 6])
    for given, first in ((text, [0.5, 0.5]), ("image,x,y\na,3,3", [3, 3])):  # never taken for pixels
        data = imported(read_csv(table(tmp_path, given)), images, tmp_path, units="given")
        assert objects(data)[0][0]["coords"] == pytest.approx(first)
        assert data.schema.side is None
    with pytest.raises(InputError, match="pass --units given"):
        imported(read_csv(table(tmp_path, "image,x,y\na,3,4")), images, tmp_path, schema=data.schema)
    data = imported(read_csv(table(tmp_path, "image,x,y,z\na,0.5,0.5,300\nb,1,0,-100")), images, tmp_path)
    assert objects(data)[1][0]["coords"] == pytest.approx([1, 0, -100], abs=1e-4)


def test_a_schema_of_another_file_is_kept_and_classes_convert(images, tmp_path):
    text = TEXT
    first = imported(read_csv(table(tmp_path, text)), images, tmp_path)
    fewer = "\n".join([HEADER, ROWS[1]])
    second = imported(read_csv(table(tmp_path, fewer)), images, tmp_path)
    converted = first.schema.converted(second.__getitems__([0])["elements"].numpy(), second.schema)
    found = first.schema.decode(converted[0])[0]
    assert found["label"] == "square"
    assert found["coords"] == pytest.approx([10, 6], abs=1e-5)
    assert found["radius"] == pytest.approx([2], abs=1e-5)
    with pytest.raises(InputError, match=r"label: expected one of square, got disc"):
        second.schema.converted(first.__getitems__([0])["elements"].numpy()[:, :1], first.schema)
    given = imported(read_csv(table(tmp_path, fewer)), images, tmp_path, schema=first.schema)
    assert given.schema == first.schema
    with pytest.raises(InputError, match=r"line 3: unknown label 'star'; expected one of disc, square"):
        imported(
            read_csv(table(tmp_path, "\n".join([HEADER, ROWS[0], "b,1,1,1,star"]))), images, tmp_path,
            schema=first.schema,
        )  # fmt: skip


MISTAKES = {
    "no image column": ("x,y\n1,2", "line 1: expected one column of images"),
    "two image columns": ("image,file,x\na,a,1", "line 1: expected one column of images, .* got image, file"),
    "another delimiter": ("image:x:y\na:1:2", "line 1: expected one column of images"),
    "a column twice": ("image,x,x\na,1,2", "line 1: expected a different name for every column"),
    "nothing": ("", "line 1: expected one column of images, .* got an empty file"),
    "no objects": ("image,x,y\n", "expected at least one object, got none"),
    "a short row": ("image,x,y\na,1,2\nb,3", "line 3: expected 3 values as in line 1, got 2"),
    "a word for a number": ("image,x,y\na,1,2\nb,one,3", "line 3, column 'x': expected a number as in .*, got 'one'"),
    "an empty cell": ("image,x,y\na,1,2\nb,,3", "line 3, column 'x': expected a number .* got nothing"),
    "NaN": ("image,x,y\na,1,2\nb,nan,3", "line 3, column 'x': expected a finite number, got nan"),
    "infinity": ("image,x,y,r\na,1,2,inf", "line 2, column 'r': expected a finite number, got inf"),
    "a mixed column": ("image,x,y,r\na,1,2,3\na,1,3,big", "line 3, column 'r': .* pass --categorical r"),
    "no class": ("image,x,y,label\na,1,2,disc\nb,2,2,", "line 3, column 'label': expected a class, got nothing"),
    "a repeated row": ("image,x,y\na,1,2\nb,1,2\na,1,2", "line 4: repeats line 2"),
    "no such image": ("image,x,y\na,1,2\nz.png,1,2", "line 3: expected an image in .*, got 'z.png'"),
    "outside": ("image,x,y\na,1,2\nb,900,2", "line 3: expected a position in the image of 16x12 pixels, got 900, 2"),
    "a negative box": ("image,xmin,ymin,xmax,ymax\na,5,5,3,9", "line 2: expected a box with width and height above 0"),
    "an ambiguous box": ("image,x,y,w,h\na,5,5,3,9", "pass --xy centre or --xy corner"),
    "bytes": (b"image,x,y\n\x00\x01\xff", "expected text in UTF-8"),
    "two names": ("image,x,y\nx/a.png,3,4\ny/a.png,5,6", "one name of the image .*a.png, got x/a.png and y/a.png"),
    "a taken name": ("image,x,y,presence\na,3,4,1", "cannot be named 'presence'"),
    "one axis": ("image,x\na,3", "expected columns x and y, got x alone"),
    "three sides": ("image,xmin,ymin,xmax\na,1,2,3", "got no ymax"),
    "decimal commas": ("image;x;y\na;3,5;4", "write decimals with a point"),
    "decimal commas alone": ("image;x;y;r\na;3;4;1,5\nb;3;4;2,5", "line 2, column 'r': .* write decimals with a point"),
    "NaN as a class": ("image,x,y,label\na,1,2,disc\nb,2,2,NaN", "line 3, column 'label': expected a class, got NaN"),
    "an open quote": ('image,x,y,label\na,1,2,"disc\nb,2,2,disc', "expected CSV, got: unexpected end of data"),
    "two open quotes": ('image,x,y,label\na,1,2,"disc\nb,2,2,"disc', "expected CSV, got: .* expected after"),
    "words of a text": (
        "image,x,y,note\n" + "".join(f"a,{n % 16},{n % 12},w{n}\n" for n in range(300)),
        "line 2, column 'note': expected classes, got 300 different words in 300 rows; remove the column",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_table_is_one_clear_error(images, tmp_path, mistake):
    text, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message) as found:
        imported(read_csv(table(tmp_path, text)), images, tmp_path)
    assert "points.csv" in str(found.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "points.csv"]  # no partial file


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("image,x,y", {"categorical": ["x"]}, "expected numbers of a position in column 'x', not classes"),
        ("image,x,y", {"xy": "corner"}, "--xy: expected columns x, y, width and height"),
        ("image,xmin,ymin,xmax,ymax", {"xy": "centre"}, "--xy: expected columns x, y, width and height"),
        ("image,x,y,z", {"units": "relative"}, "kept as given; leave out --units relative"),
    ],
)
def test_options_without_effect_on_a_table_are_errors(images, tmp_path, header, options, message):
    text = f"{header}\na,{','.join(map(str, range(1, len(header.split(',')))))}"
    chosen = {"categorical": options.pop("categorical", ())}
    with pytest.raises(InputError, match=message):
        imported(read_csv(table(tmp_path, text), **chosen), images, tmp_path, **options)


def test_a_schema_says_which_columns_are_classes(images, tmp_path, capsys):
    path = table(tmp_path, "image,x,y,digit\na,3,4,7\nb,3,4,9")
    command = ["import", "--csv", str(path), "--images", str(images), "--workers", "0"]
    assert main([*command, "--categorical", "digit", "--out", str(tmp_path / "train.h5")]) == 0
    path.write_text("image,x,y,digit,size\na,3,4,9,1")
    assert main([*command, "--schema", str(tmp_path / "train.h5"), "--out", str(tmp_path / "val.h5")]) == 0
    assert "left out 1 column that the schema lacks: size" in capsys.readouterr().out
    assert [found["digit"] for found in objects(SetFile(tmp_path / "val.h5"))[0]] == ["9"]


def test_sets_that_are_too_large_are_errors(images, tmp_path, monkeypatch):
    source = read_csv(table(tmp_path, TEXT))
    monkeypatch.setattr("setpred.data.importing.MOST_BYTES", 1)
    with pytest.raises(InputError, match="3 images of up to 2 objects of 6 numbers take 144 bytes"):
        imported(source, images, tmp_path)
    monkeypatch.setattr("setpred.data.importing.LARGEST_SIZE", 1)
    with pytest.raises(InputError, match="sets of at most 1 objects, got 2"):
        imported(source, images, tmp_path)


def test_columns_of_the_size_of_images_are_left_out(images, tmp_path):
    said, text = [], "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,16,12,cat,1,2,5,6\nb.png,16,{},dog,1,2,5,6"
    data = imported(read_csv(table(tmp_path, text.format(12))), images, tmp_path, say=said.append)
    assert [field.name for field in data.schema.fields] == ["coords", "extent", "class"]
    assert said == ["left out the columns width and height, which are the size of each image"]
    data = imported(read_csv(table(tmp_path, text.format(13))), images, tmp_path, say=said.append)
    assert [field.name for field in data.schema.fields] == ["coords", "extent", "width", "height", "class"]


def test_one_table_per_image_says_what_it_lacks(images, tmp_path):
    folder, said = tmp_path / "tables", []
    folder.mkdir()
    (folder / "a.csv").write_text("x,y\n3,4")
    (folder / "._a.csv").write_bytes(b"\0")  # as macOS writes beside every file
    assert len(imported(read_csv(folder), images, tmp_path, say=said.append)) == 1
    assert len(said) == 1
    assert said[0].startswith("left out 2 images without annotations, such as ")  # a long path is shortened
    assert said[0].endswith("/b.png'")
    for text, message in (("", "b.csv, line 1: expected names of columns"), ("image,x,y\nb,3,4", "got 'image'")):
        (folder / "b.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_csv(folder)


def test_attributes_may_be_optional(images, tmp_path):
    document = keypoint_document()
    for annotation, attributes in zip(document["annotations"], ({"depth": 3}, {"depth": None}, {}), strict=True):
        annotation["attributes"] = attributes
    path = table(tmp_path, json.dumps(document), "coco.json")
    with pytest.raises(InputError, match="annotation 1: expected a number, or a name, for 'depth' in every"):
        read_coco(path)
    overrides = Overrides.of({"fields": {"depth": {"optional": True}}}, "s.yaml")
    data = imported(read_coco(path, optional=["depth"]), images, tmp_path, overrides=overrides)
    assert [found["depth"] for each in objects(data) for found in each] == [[3], None, None]


def keypoint_document():
    parts = {"keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}
    one = {"image_id": 1, "category_id": 1, "bbox": [2, 1, 4, 6]}
    return {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "cat"} | parts, {"id": 2, "name": "box"}],
        "annotations": [
            one | {"keypoints": [3, 2, 2, 5, 6, 1]},
            one | {"image_id": 2, "keypoints": [4, 3, 2, 0, 0, 0]},
            one | {"image_id": 2, "category_id": 2, "bbox": [0, 0, 9, 9]},
        ],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "expected COCO JSON with images and annotations"),
        (lambda c: c["annotations"][0].update(image_id=5), "annotation 0: expected the id of an image"),
        (lambda c: c["annotations"][0].update(category_id=5), "annotation 0: expected the id of a category"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotation 0: expected bbox as four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 2]), "annotation 0: expected a box with width"),
        (lambda c: c["annotations"].append(dict(c["annotations"][0])), "annotation 3: repeats annotation 0"),
        (lambda c: c["images"].append(dict(c["images"][0])), "expected ids that differ"),
        (lambda c: c["images"].append(c["images"][0] | {"id": 9}), "names of files that differ, got 'a.png' twice"),
        (
            lambda c: c["images"][0].update(width=32, height=24),
            "image 'a.png': expected 32x24 pixels, as stated there, got 16x12",
        ),
        (lambda c: c["images"][0].update(file_name="z.png"), "expected an image in .*, got 'z.png'"),
        (lambda c: c.update(categories=5), "expected a list of categories"),
        (lambda c: c["annotations"][0].update(keypoints=[1, 2, 2]), "annotation 0: expected keypoints as 6 numbers"),
        (
            lambda c: c["annotations"][0].update(keypoints=[1, 2, 3, 0, 0, 0]),
            "'nose': expected a visibility of 0, 1",
        ),
        (lambda c: c["annotations"][0].update(keypoints=[1, "2", 2, 0, 0, 0]), "expected keypoints as 6 numbers"),
        (lambda c: c["annotations"][0].update(keypoints=[90, 2, 2, 0, 0, 0]), "expected a position in the image"),
        (lambda c: c["annotations"][2].update(keypoints=[1, 2, 2]), "expected keypoints with names in the category"),
        (lambda c: c["categories"][0].update(keypoints=["a", "a"]), "'cat': expected names of keypoints that differ"),
        (lambda c: c["categories"][0].update(keypoints=["coords", "a"]), "cannot be named 'coords'"),
        (lambda c: c["categories"][0].update(skeleton=[[0, 1]]), "'cat': expected a skeleton of pairs from 1 to 2"),
        (lambda c: c["categories"][0].update(keypoints="nose"), "'cat': expected keypoints as a list of names"),
        *(
            (lambda c, wrong=wrong: c["annotations"][0].update(wrong), "annotation 0: expected")
            for wrong in (
                {"image_id": [1]},
                {"category_id": {}},
                {"bbox": [1, 1, 10**400, 3]},
                {"bbox": [float("nan"), 1, 2, 3]},
                {"attributes": {"wet": [1]}},
                {"attributes": {"weight": 10**400}},
                {"attributes": {"weight": float("nan")}},
            )
        ),
    ],
)
def test_a_mistake_in_coco_is_one_clear_error(images, tmp_path, change, message):
    content = keypoint_document()
    change(content)
    with pytest.raises(InputError, match=message):
        imported(read_coco(table(tmp_path, json.dumps(content), "coco.json")), images, tmp_path)


@pytest.mark.parametrize("names", ["cx,cy", "x_center,y_center"])
def test_centres_by_name(images, tmp_path, names):
    data = imported(read_csv(table(tmp_path, f"image,{names},width,height\na,4,6,2,3")), images, tmp_path)
    assert objects(data)[0][0] == {"coords": [4, 6], "extent": [2, 3], "confidence": SURE}
    data = imported(read_csv(table(tmp_path, f"image,{names}\na,4,6")), images, tmp_path)
    assert objects(data)[0][0] == {"coords": [4, 6], "confidence": SURE}


@pytest.mark.parametrize("count", [1, 3])
def test_the_default_training_ends_with_a_validation(images, tmp_path, count):
    rows = [f"{name},3,4" for name in "abc"[:count]]
    imported(read_csv(table(tmp_path, "\n".join(["image,x,y", *rows]))), images, tmp_path)
    file = str(tmp_path / "out.h5")
    trainer = default_configuration(QUICKSTART, {"init_args": {"train": file, "val": file}})["trainer"]
    assert trainer["max_epochs"] % trainer["check_val_every_n_epoch"] == 0


@pytest.mark.parametrize(("apart", "weight"), [(2, 64.0), (0.1, 26000.0), (12, 8.0), (None, 8.0)])
def test_the_default_model_fits_to_how_far_apart_objects_are(tmp_path, apart, weight):
    """Elements compete over half the distance of neighbours, here in halves of 16 pixels; at most over 1 / √8."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (16, 12)).save(folder / "a.png")
    rows = ["a.png,3,4", *([] if apart is None else [f"a.png,{3 + apart},4"])]
    imported(read_csv(table(tmp_path, "\n".join(["image,x,y", *rows]))), folder, tmp_path)
    file = str(tmp_path / "out.h5")
    parts = default_configuration(QUICKSTART, {"init_args": {"train": file, "val": file}})["model"]
    assert parts["decoder"]["init_args"]["objective"]["init_args"]["weights"] == [weight] * 2
    assert parts["decoder"]["init_args"]["start"]["init_args"]["weights"] == [weight] * 2
    assert parts["encoder"]["init_args"]["anchored"]
    assert "gated" not in parts["encoder"]["init_args"]  # it is the quickstart's
    assert parts["loss"]["init_args"]["only_present"] == ["coords"]


def test_images_have_a_size(images, tmp_path):
    with pytest.raises(InputError, match="image size from 8 to 4096, got 0"):
        imported(read_csv(table(tmp_path, "image,x,y\na,3,4")), images, tmp_path, image_size=0)


def test_a_run_without_a_validation_yet_is_no_riddle(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"not validated yet, but .*last.ckpt is there"):
        read_checkpoint(tmp_path / "best.ckpt")


def test_a_subclass_with_other_arguments_trains_on_the_schema_of_its_files(images, tmp_path, monkeypatch):
    """Its sizes are known only once it is built: another schema than the model's is an error, not other units."""
    imported(read_csv(table(tmp_path, TEXT)), images, tmp_path)
    (tmp_path / "own_module.py").write_text(
        "from setpred.data.datamodule import SetDataModule\n\n\nclass Mine(SetDataModule):\n"
        f"    def __init__(self):\n        super().__init__(*2 * ({str(tmp_path / 'out.h5')!r},), batch_size=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--allow=own_module.Mine", "--data=own_module.Mine", "--trainer.accelerator=cpu"]
    options += ["--model.encoder.init_args.tokens.init_args.trunk.init_args.image_size=64"]
    cli = build(["--config", str(QUICKSTART), *options])
    cli.datamodule.setup("fit")
    with pytest.raises(InputError, match="schema 'clevr', the data of 'points': fields"):
        check_fit(cli)


def test_absent_objects_stay_zero_and_units_of_images_must_agree():
    field = {side: continuous("coords", 2, scale=side / 2, offset=side / 2) for side in (16, 32)}
    small, large = (ElementSchema("a", [coords], max_objects=3) for coords in field.values())
    two = ElementSchema("b", [field[16]], max_objects=2)
    elements = two.encode([{"coords": (3, 4)}])[None]
    assert small.converted(elements, two)[0, 1:].tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(InputError, match="longer side is 32 pixels, got 16"):
        large.converted(elements, two)
    with pytest.raises(InputError, match="at most 1 objects, got one of 2"):
        two.with_room(1).converted(two.encode(2 * [{"coords": (3, 4)}])[None], two)


def test_distances_are_of_positions_alone():
    schema = ElementSchema("a", [continuous("coords", 2, scale=8, offset=8), continuous("radius", 1)], max_objects=1)
    predicted, real = (
        torch.from_numpy(schema.encode([{"coords": coords, "radius": radius}]))[None]
        for coords, radius in (((3, 4), 9), ((6, 8), 1))
    )
    assert pairwise_distance(predicted, real, schema=schema).item() == pytest.approx(5)
    report = attribute_report(predicted, real, torch.zeros(1, 1, dtype=torch.long), schema=schema)
    assert report["distance"]["mean"] == pytest.approx(5)
    assert report["axis_errors"]["radius"][0]["mean"] == pytest.approx(8)


@pytest.fixture
def trained(images, tmp_path):
    """The checkpoint of a default model for two files, of which the second has the larger sets."""
    many = "\n".join([HEADER, *ROWS, "a.png,8,9,1,disc"])
    for name, text in (("train.h5", TEXT), ("val.h5", many)):
        import_images(read_csv(table(tmp_path, text)), images, tmp_path / name)
    files = [f"--data={tmp_path / 'train.h5'}", f"--val={tmp_path / 'val.h5'}"]
    cli = build([*files, f"--runs={tmp_path}", "--trainer.accelerator=cpu", "--trainer.logger=false"])
    return cli, untrained_checkpoint(cli, tmp_path / "a.ckpt")


def test_a_written_configuration_keeps_class_names_that_look_like_numbers(images, tmp_path):
    rows = "\n".join(["image,x,y,code", "a,3,4,01", "a,9,9,1e3", "b,1,2,no"])
    file, written = tmp_path / "codes.h5", tmp_path / "written.yaml"
    import_images(read_csv(table(tmp_path, rows), categorical=["code"]), images, file)
    cli = build([f"--data={file}", f"--val={file}", f"--runs={tmp_path}", "--trainer.logger=false"])
    written.write_text(cli.parser.dump(cli.config, skip_none=False))
    again = build([f"--config={written}", "--trainer.logger=false"])
    assert again.model.schema == cli.model.schema
    assert again.model.schema.field("code").classes == ("01", "1e3", "no")


def test_the_schema_of_the_data_reaches_every_part(trained):
    cli, path = trained
    schema = cli.model.schema
    # room for the sets of both files, and elements to spare
    assert (schema.max_objects, cli.model.model.decoder.set_size) == (3, 3 + SPARE)
    assert cli.model.metric.schema == schema  # whose thresholds it takes
    weights = torch.ones(schema.set_dim)
    weights[schema.slice("coords")] = 2.0
    assert torch.equal(cli.model.loss.element_weights(weights), weights)
    assert torch.equal(training_loss(read_checkpoint(path), []).element_weights(weights), weights)


def test_data_on_the_command_line_override_those_of_a_configuration(trained, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(QUICKSTART.read_text().replace("image_size: 64,", "image_size: 128,"))  # data of other sizes
    files = ["--data", str(tmp_path / "train.h5"), "--val", str(tmp_path / "val.h5")]
    options = ["--model.encoder.init_args.precise=2", "--model.decoder.init_args.objective.init_args.precise=2"]
    for arguments in ([*files, "--config", str(config)], [f"--config={config}", *files]):
        cli = build([*arguments, *options, "--data.init_args.batch_size=2", "--trainer.logger=false"])
        assert (cli.datamodule.val_path, cli.datamodule.batch_size) == (files[3], 2)
        assert (cli.model.model.decoder.set_size, cli.model.model.encoder.image_size) == (3, 64)
        assert cli.folder.name == "mine"


def test_sizes_follow_the_data_that_options_change():
    for size in (6, 9):
        cli = build(["--config", str(QUICKSTART), f"--data.init_args.set_size={size}", "--trainer.logger=false"])
        assert cli.model.model.decoder.set_size == size


NUMBERED = "n,image,x,y,radius,label\n0,a.png,3,4,1.5,disc\n1,a.png,10,6,2,square\n2,b.png,0,11,1,disc\n3,c.png,,,,"


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "id", "index"])
def test_running_numbers_are_left_out_and_reported(images, tmp_path, capsys, expected, name):
    for text in (NUMBERED, NUMBERED.replace("\n2,b", "\n0,b").replace("\n3,c", "\n0,c")):  # of all rows, of each image
        path = table(tmp_path, text.replace("n,", f"{name},", 1))
        assert objects(imported(read_csv(path), images, tmp_path)) == expected
    options = ["--images", str(images), "--out", str(tmp_path / "cells.h5"), "--workers", "0", "--force"]
    assert main(["import", "--csv", str(path), *options]) == 0
    column = name.lower() or "unnamed: 0"
    assert f"left out the column {column!r}" in capsys.readouterr().out
    path.write_text(path.read_text().replace("\n0,c.png,,,,", ""))
    assert main(["import", "--csv", str(path), *options, "--categorical", column]) == 0
    assert SetFile(tmp_path / "cells.h5").schema.field(column).classes == ("0", "1")


def test_a_number_that_repeats_within_an_image_is_a_field(images, tmp_path):
    text = NUMBERED.replace("n,", "id,", 1).replace("\n1,a", "\n0,a").replace("\n3,c.png,,,,", "")
    fields = imported(read_csv(table(tmp_path, text)), images, tmp_path).schema.fields
    assert [field.name for field in fields] == ["coords", "id", "radius", "label"]


def test_an_import_decodes_each_image_once(images, tmp_path, monkeypatch):
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image) or load(image))
    imported(read_csv(table(tmp_path, TEXT)), images, tmp_path)
    assert len({id(image) for image in decoded}) == 3


def test_a_damaged_image_is_named_and_leaves_no_file(images, tmp_path):
    whole = (images / "b.png").read_bytes()
    for content, words in (
        (whole[:45], "cut short or damaged"),  # within the header, and within the pixels
        (whole[:-30], "cut short or damaged"),
        (b"text", "not an image"),
    ):
        (images / "b.png").write_bytes(content)
        with pytest.raises(InputError, match=rf"b\.png.* {words}|b\.png is {words}"):
            imported(read_csv(table(tmp_path, TEXT)), images, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "points.csv"]  # no shards either
