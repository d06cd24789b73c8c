"""Instance masks: those of rendered scenes are right, every way to read them gives the same, and faults are errors."""

import pickle
import re
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from setpred import CLEVR, InputError
from setpred.commands.data import main
from setpred.data.datamodule import RenderedScenes, SetDataModule
from setpred.data.dataset import SetFile, open_data
from setpred.data.hdf5 import Header, Record, describe, open_set_file, verify
from setpred.data.hdf5_writer import write_set_file
from setpred.data.scenes import built_in_scenes, render_file, render_folder
from setpred.data.streamed import StreamedScenes
from setpred.rendering.renderer import annotate
from setpred.rendering.scenes import Scene

WHICH = {"seed": 3, "objects": (0, 6)}
FILE = WHICH | {"images": 9, "image_size": 32}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rendered") / "a.h5"
    render_file(path, **FILE, masks=True)
    return path


def stored(path: Path) -> np.ndarray:
    """The masks as any other program reads them."""
    with open_set_file(path) as file:
        assert file["instances"].compression == "gzip"
        assert file["instances"].chunks == (1, *file["instances"].shape[1:])
        return file["instances"][:]


def test_the_mask_of_a_row_is_that_of_its_object(rendered):
    """Where an object is seen it is seen alone, too, and some object is seen where any alone is."""
    data = SetFile(rendered)
    for number, (scene, mask) in enumerate(zip(built_in_scenes(range(9), **WHICH), stored(rendered), strict=True)):
        expected = [obj["coords"] for obj in CLEVR.decode(data[number]["elements"].numpy())]
        assert np.allclose([obj.coords for obj in scene.objects], expected, atol=1e-5) or not expected
        alone = [Scene((obj,), scene.camera, scene.lamps) for obj in scene.objects]
        seen = annotate(alone, width=32, height=32).instances.numpy() == 0 if alone else np.zeros((1, 32, 32), bool)
        np.testing.assert_array_equal(seen.any(0), mask > 0)
        for row, each in enumerate(seen, start=1):
            assert each[mask == row].all()
    assert 2 < len(np.unique(stored(rendered))) <= 7


def test_masks_change_nothing_else(rendered, tmp_path):
    render_file(tmp_path / "b.h5", **FILE)
    for one, other in zip(SetFile(rendered), SetFile(tmp_path / "b.h5"), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    with open_set_file(tmp_path / "b.h5") as file:
        assert sorted(file) == ["camera", "elements", "images", "index"]
        assert file.attrs["version"] == 1
    # the checksum of files without masks, as before there were masks
    records = [Record(np.full((8, 8, 3), n, np.uint8), CLEVR.encode([]), np.zeros(3), n) for n in range(3)]
    header = Header(3, 8, CLEVR, {"kind": "test"})
    digest = write_set_file(tmp_path / "c.h5", header, records, list, producer="p", description="")
    assert digest == "ef17c28829ef210d6e249c6073bd2ba02768b53aeeffaadce5bd99e569e90d70"


def test_every_way_to_read_masks_gives_the_same(rendered):
    expected = torch.from_numpy(stored(rendered))
    ways = [SetFile(rendered, instances=True, in_memory=kept) for kept in (True, False)]
    ways.append(pickle.loads(pickle.dumps(ways[0])))
    ways.append(open_data(rendered, image_size=32, instances=True))
    for data in ways:
        for rows in ([4, 0, 8, 4], range(9)):
            batch = data.__getitems__(rows)
            assert batch["instances"].dtype == torch.uint8
            assert torch.equal(batch["instances"], expected[list(rows)])
            assert torch.equal(batch["instances"].flatten(1).amax(1) <= batch["mask"].sum(1), torch.ones(len(rows)) > 0)
        assert torch.equal(data[3]["instances"], expected[3])
    ways[0].load(torch.device("cpu"))
    assert ways[0]._bytes == 9 * 32 * 32 * 4


def test_info_describes_masks(rendered, capsys):
    masks = stored(rendered)
    areas = np.concatenate([np.bincount(mask.ravel())[1:] for mask in masks])
    areas, text = areas[areas > 0], describe(rendered)
    assert "9 images of 32x32 with masks" in text
    assert "kind rendered, objects 0 to 6, seed 3" in text
    assert f"masks     background {(masks == 0).mean():.1%}; pixels of an object {areas.min()} to {areas.max()}" in text
    assert f"median {np.median(areas):g}" in text
    assert main(["verify", str(rendered)]) == 0
    assert "with masks, content as written" in capsys.readouterr().out


def test_validation_batches_have_masks_where_asked(rendered, tmp_path):
    """In files of other names than those without masks."""
    scenes = {"val_images": 3, "image_size": 16, "objects": (1, 2), "batch_size": 2, "folder": str(tmp_path)}
    plain = RenderedScenes(train_images=4, **scenes)
    both = RenderedScenes(train_images=4, **scenes, masks=True)
    for data in (both, StreamedScenes(scenes_per_epoch=4, **scenes, masks=True)):
        if data is both:
            assert data.train_path == plain.train_path
            for file in data.files:
                rules = {"objects": (1, 2), "seed": file.header.source["seed"]}
                images = file.header.images
                render_file(file.path, images=images, image_size=16, masks=file.header.instances, **rules)
        assert data.val_path == plain.val_path.removesuffix(".h5") + "-masks.h5"
        data.prepare_data()
        data.setup("fit")
        assert all(batch["instances"].shape[1:] == (16, 16) for batch in data.val_dataloader())
        assert all("instances" not in batch for batch in data.train_dataloader())
    own = SetDataModule(str(rendered), str(rendered), masks=True)
    own.setup("fit")
    assert torch.equal(own.val_data.__getitems__(range(9))["instances"], torch.from_numpy(stored(rendered)))
    assert "instances" not in own.train_data[0]


def test_a_file_without_masks_says_how_to_get_them(rendered, tmp_path):
    render_file(tmp_path / "a.h5", images=1, image_size=8)
    with pytest.raises(InputError, match=r"expected masks of the objects in .*a\.h5, got 1 image of 8x8; .*--masks"):
        SetFile(tmp_path / "a.h5", instances=True)
    with pytest.raises(InputError, match=r"expected a prepared file with masks, got the folder .*--masks"):
        open_data(tmp_path, image_size=8, instances=True)


def test_masks_of_other_objects_are_not_written(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = 1
    record = Record(np.zeros((8, 8, 3), np.uint8), CLEVR.encode([]), np.zeros(3), 0, mask)
    header = Header(1, 8, CLEVR, {}, instances=True)
    with pytest.raises(InputError, match="the mask of image 0 has object 1, but the set has only 0"):
        write_set_file(tmp_path / "a.h5", header, [record], list, producer="p", description="")
    assert not (tmp_path / "a.h5").exists()


def chunk(content: bytes, *, skipped: int = 0):
    return lambda file: file["instances"].id.write_direct_chunk((2, 0, 0), content, skipped)


def again(**options):
    """Write the masks of a file in another way."""

    def change(file):
        masks = file["instances"][:]
        del file["instances"]
        file.create_dataset("instances", **{"data": masks, "chunks": (1, 8, 8), "compression": "gzip"} | options)

    return change


def labelled(file):
    file["instances"][2, 3, 4] = 2


STORAGE, SIZE = "not compressed by gzip in one chunk per image", "the mask of image 2 does not have 64 pixels"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (again(compression=None), STORAGE),
        (again(compression="lzf"), STORAGE),
        (again(shuffle=True), STORAGE),
        (again(fletcher32=True), STORAGE),
        (again(chunks=(3, 8, 8)), STORAGE),
        (again(chunks=(1, 4, 8)), STORAGE),
        (again(data=np.zeros((3, 8, 9), np.uint8)), r"expected instances \[3, 8, 8\] \|u1, got \[3, 8, 9\]"),
        (again(data=np.zeros((3, 8, 8), np.int16)), "expected instances"),
        (lambda file: file.pop("instances"), "instances"),
        (chunk(zlib.compress(bytes(100_000))), SIZE),  # 115 bytes
        (chunk(zlib.compress(bytes(10**8))), SIZE),
        (chunk(zlib.compress(bytes(63))), SIZE),
        (chunk(zlib.compress(bytes(64))[:-2]), SIZE),
        (chunk(bytes(65), skipped=1), SIZE),
        (chunk(b"none"), "the mask of image 2 is damaged"),
        (labelled, "the mask of image 2 has object 2, but the set has only 1"),
        (again(data=None, shape=(3, 8, 8), dtype="u1"), "the mask of image 0 does not have 64 pixels"),
    ],
)
def test_files_with_a_fault_in_the_masks_are_rejected(change, words, tmp_path):
    cube = {"coords": (1, 2, 0), "material": "metal", "color": "red", "shape": "cube", "size": "large"}
    elements = CLEVR.encode([cube])
    mask = np.random.default_rng(0).integers(0, 2, (3, 8, 8), dtype=np.uint8)
    mask[1] = np.arange(64).reshape(8, 8) % 7 % 2
    records = [Record(np.zeros((8, 8, 3), np.uint8), elements, np.zeros(3), n, mask[n]) for n in range(3)]
    path = tmp_path / "a.h5"
    write_set_file(path, Header(3, 8, CLEVR, {}, instances=True), records, list, producer="p", description="")
    np.testing.assert_array_equal(SetFile(path, instances=True).__getitems__(range(3))["instances"], mask)
    with h5py.File(path, "r+") as file:
        change(file)
    for use in (verify, describe, lambda path: SetFile(path, instances=True).__getitems__(range(3))):
        with pytest.raises(InputError, match=words):
            use(path)


def test_a_changed_mask_is_noticed_by_verify(rendered, tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(rendered.read_bytes())
    number = int(stored(rendered).max((1, 2)).argmax())
    with h5py.File(path, "r+") as file:
        file["instances"][number, 31, 31] = 1 - file["instances"][number, 31, 31]
    SetFile(path, instances=True).__getitems__(range(9))
    with pytest.raises(InputError, match="SHA-256 differs"):
        verify(path)


# --- folders in the layout of CLEVR ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clevr(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clevr")
    render_folder(root, split="val", images=4, seed=3, objects=(1, 6), width=48, height=32, masks=True)
    return root


def test_a_folder_keeps_masks_through_prepare(clevr, tmp_path):
    scenes = built_in_scenes(range(4), seed=3, objects=(1, 6))
    expected = annotate(scenes, width=48, height=32).instances.numpy() + 1
    for number in range(4):
        with Image.open(clevr / "masks" / "val" / f"CLEVR_val_{number:06d}.png") as image:
            assert image.mode == "P"
            assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            np.testing.assert_array_equal(np.asarray(image), expected[number])
    command = ["prepare", str(clevr), "--image-size", "16", "--workers", "0", "--out"]
    assert main([*command, str(tmp_path / "a.h5"), "--masks"]) == 0
    # the nearest of 48x32 pixels to the centres of 16x16
    np.testing.assert_array_equal(stored(tmp_path / "a.h5"), expected[:, 1::2, 1::3])
    assert main([*command, str(tmp_path / "b.h5")]) == 0
    for one, other in zip(SetFile(tmp_path / "a.h5"), SetFile(tmp_path / "b.h5"), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_masks_of_earlier_pictures_are_removed(clevr, tmp_path):
    shutil.copytree(clevr, tmp_path, dirs_exist_ok=True)
    options = {"split": "val", "images": 1, "width": 24, "height": 16}
    with pytest.raises(InputError, match="exists already"):
        render_folder(tmp_path, **options)
    render_folder(tmp_path, **options, force=True)
    assert not (tmp_path / "masks" / "val").exists()
    (tmp_path / "masks" / "train").mkdir()
    with pytest.raises(InputError, match="masks/train exists already"):
        render_folder(tmp_path, **options | {"split": "train"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: shutil.rmtree(path.parent), r"cannot read the folder .*masks/val .*leave out --masks"),
        (lambda path: path.unlink(), r"1 of 4 masks are missing .* the first is CLEVR_val_000002\.png; .*--masks"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), r"CLEVR_val_000002\.png is cut short or damaged"),
        (lambda path: Image.new("P", (32, 48)).save(path), "expected a mask of 48x32 pixels, as its image, got 32x48"),
        (lambda path: Image.new("L", (48, 32), 7).save(path), r"expected objects 1 to \d of its scene .*, got 7"),
        (lambda path: Image.new("RGB", (48, 32)).save(path), "expected a mask of indexed colours or grey of 8 bits"),
        (lambda path: Image.new("I;16", (48, 32)).save(path), "expected a mask of indexed colours or grey of 8 bits"),
    ],
)
def test_folders_with_a_fault_in_the_masks_are_rejected(change, words, clevr, tmp_path, capsys):
    root = tmp_path / "clevr"
    shutil.copytree(clevr, root)
    change(root / "masks" / "val" / "CLEVR_val_000002.png")
    command = ["prepare", str(root), "--image-size", "16", "--workers", "0", "--out", str(tmp_path / "a.h5")]
    assert main([*command, "--masks"]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "a.h5").exists()
    assert main(command) == 0
