"""CLEVR's JSON records: reading a real one and writing it again gives every number."""

import json

import numpy as np
import pytest

from setpred import InputError
from setpred.rendering.camera import NOMINAL_CAMERA
from setpred.rendering.records import camera_record, read_cameras, relationships, scene_of, scene_record
from setpred.rendering.sampling import SceneRules
from setpred.rendering.scenes import NOMINAL_LAMPS, Scene


@pytest.fixture(scope="module")
def real(clevr_blender):
    """Every real record with its line about the camera."""
    records = json.loads((clevr_blender / "scenes" / "CLEVR_val_scenes.json").read_text())["scenes"]
    lines = [json.loads(line) for line in (clevr_blender / "cameras.jsonl").read_text().splitlines()]
    return list(zip(records, lines, strict=True))


def test_real_records_survive_reading_and_writing(real, clevr_blender):
    cameras = read_cameras(clevr_blender / "cameras.jsonl")
    for record, line in real:
        index = record["image_index"]
        again = scene_record(scene_of(record, *cameras[index]), index=index, split="val")
        assert list(again) == list(record)
        for ours, theirs in zip(again["objects"], record["objects"], strict=True):
            assert list(ours) == list(theirs)
            assert ours["pixel_coords"][:2] == theirs["pixel_coords"][:2]
            assert abs(ours["pixel_coords"][2] - theirs["pixel_coords"][2]) < 1e-5
            assert ours | {"pixel_coords": 0} == theirs | {"pixel_coords": 0}
        assert again | {"objects": 0} == record | {"objects": 0}
        written = camera_record(scene_of(record, *cameras[index]), index=index, split="val")
        assert written | {"camera_matrix": 0} == line | {"camera_matrix": 0, "split": "val"}
        np.testing.assert_allclose(written["camera_matrix"], line["camera_matrix"], atol=1e-6)


@pytest.mark.parametrize("objects", [0, 1, 5])
def test_a_scene_survives_its_record(objects, tmp_path):
    scene = SceneRules(objects=(objects, objects)).sample(np.random.default_rng(objects))
    record = json.loads(json.dumps(scene_record(scene, index=7, split="train")))
    line = json.dumps(camera_record(scene, index=7, split="train"))
    (tmp_path / "cameras.jsonl").write_text(line + "\n")
    assert record["image_filename"] == "CLEVR_train_000007.png"
    assert scene_of(record, *read_cameras(tmp_path / "cameras.jsonl")[7]) == scene


def test_the_camera_is_found_from_the_objects_in_pixels_of_any_size():
    scene = SceneRules(objects=(5, 5)).sample(np.random.default_rng(0))
    for size in ({}, {"width": 960, "height": 640}):
        found = scene_of(scene_record(scene, index=0, split="val", **size), **size)
        np.testing.assert_allclose(found.camera.location, scene.camera.location, atol=1e-2)
        assert found.lamps == NOMINAL_LAMPS


def test_relationships_are_opposite_and_exclude_near_objects():
    coords = np.array([scene_object.coords for scene_object in SceneRules().sample(np.random.default_rng(3)).objects])
    found = relationships(coords)
    for one, other in (("left", "right"), ("behind", "front")):
        pairs = {(i, j) for i, row in enumerate(found[one]) for j in row}
        assert pairs == {(j, i) for i, row in enumerate(found[other]) for j in row}
        assert len(pairs) == len(coords) * (len(coords) - 1) / 2  # all, since objects keep a margin of 0.4
    right = NOMINAL_CAMERA.axes()[0]
    assert relationships(np.stack([0 * right, 0.19 * right]))["right"] == [[], []]
    assert relationships(np.stack([0 * right, 0.21 * right]))["right"] == [[1], []]
    assert relationships(np.empty((0, 3))) == {"behind": [], "front": [], "left": [], "right": []}


def test_a_faulty_record_is_named():
    scene = SceneRules(objects=(3, 3)).sample(np.random.default_rng(0))
    record = scene_record(scene, index=0, split="val")
    broken = json.loads(json.dumps(record))
    del broken["objects"][1]["rotation"]
    with pytest.raises(InputError, match=r"CLEVR_val_000000.png: expected a scene in CLEVR.s format, got .*rotation"):
        scene_of(broken)
    with pytest.raises(InputError, match="expected a scene"):
        scene_of(record | {"objects": [record["objects"][0] | {"3d_coords": [1, 2]}]})
    with pytest.raises(InputError, match="its 1 objects do not determine the camera"):
        scene_of(record | {"objects": record["objects"][:1]})
    with pytest.raises(InputError, match="a non-finite number"):
        scene_of(record | {"objects": [record["objects"][0] | {"rotation": float("nan")}]}, NOMINAL_CAMERA)
    assert scene_of(record | {"objects": []}, NOMINAL_CAMERA) == Scene(())


def test_splits_share_a_file_of_cameras(tmp_path):
    path = tmp_path / "cameras.jsonl"
    single = SceneRules(objects=(1, 1))
    scenes = {split: single.sample(np.random.default_rng(k)) for k, split in enumerate(("train", "val"))}
    path.write_text("".join(json.dumps(camera_record(s, index=0, split=split)) + "\n" for split, s in scenes.items()))
    for split, scene in scenes.items():
        assert read_cameras(path, split=split) == {0: (scene.camera, scene.lamps)}
    line = camera_record(scene, index=0, split="val")
    parts = ([1.0, 2.0], [1.0, 2.0, float("nan")], 5, None)
    second = [b"{}", b"\xff\xfe", *(json.dumps(line | {"camera": part}).encode() for part in parts)]
    for fault in second:
        path.write_bytes(json.dumps(line).encode() + b"\n" + fault + b"\n")
        with pytest.raises(InputError, match=r"line 2: expected camera and lights"):
            read_cameras(path)
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        read_cameras(tmp_path / "nowhere")
