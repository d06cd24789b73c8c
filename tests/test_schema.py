"""Elements, schema and masks: round trips, other domains, errors."""

import numpy as np
import pytest
import torch

from setpred.errors import InputError
from setpred.schema import CLEVR, PRESENCE, ElementSchema, Field, categorical, continuous
from setpred.sets import check_set, fill_absent, presence_mask, present_first, set_sizes

CUBE = {"coords": [1.5, -3.0, 0.7], "material": "metal", "color": "brown", "shape": "cube", "size": "small"}
BALL = {"coords": [0.0, 0.3, 0.35], "material": "rubber", "color": "cyan", "shape": "sphere", "size": "large"}
BOXES = ElementSchema("boxes", [continuous("box", 4), categorical("kind", "cat", "dog")], max_objects=3)


def test_clevr_has_the_order_of_the_published_targets():
    order = ["coords", "material", "color", "shape", "size", PRESENCE]
    stops = [CLEVR.slice(name).stop for name in order]
    assert stops == [3, 5, 13, 16, 18, 19]
    assert CLEVR.set_dim == 19
    assert CLEVR.field("material").classes == ("rubber", "metal")
    assert CLEVR.field("color").classes == ("cyan", "blue", "yellow", "purple", "red", "green", "gray", "brown")
    assert CLEVR.field("shape").classes == ("sphere", "cube", "cylinder")
    assert CLEVR.field("size").classes == ("large", "small")


def test_encode_by_hand():
    row = CLEVR.encode([CUBE])[0]
    expected = [0.5, -1.0, 0.7 / 3] + [0, 1] + [0] * 7 + [1] + [0, 1, 0] + [0, 1] + [1]
    np.testing.assert_allclose(row, np.array(expected), rtol=1e-6)
    assert not CLEVR.encode([CUBE])[1:].any()


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_decode_undoes_encode(convert):
    decoded = CLEVR.decode(convert(CLEVR.encode([CUBE, BALL], set_size=4)))
    for obj, original in zip(decoded, [CUBE, BALL], strict=True):
        assert obj.pop("confidence") == 1.0
        np.testing.assert_allclose(obj.pop("coords"), original["coords"], rtol=1e-6)
        assert obj == {name: value for name, value in original.items() if name != "coords"}


def test_decode_ranks_by_confidence_and_leaves_the_unsure_out():
    elements = CLEVR.encode([CUBE, BALL])
    elements[:3, -1] = [0.6, 1.7, 0.4]
    decoded = CLEVR.decode(elements)
    assert [obj["color"] for obj in decoded] == ["cyan", "brown"]
    assert [obj["confidence"] for obj in decoded] == pytest.approx([1.0, 0.6])
    assert len(CLEVR.decode(elements, threshold=0.3)) == 3


def test_values_in_their_own_units():
    elements = torch.from_numpy(CLEVR.encode([CUBE, BALL]))
    torch.testing.assert_close(CLEVR.values(elements, "coords")[0], torch.tensor(CUBE["coords"]))
    assert CLEVR.values(elements, "color")[:2].tolist() == [7, 0]
    assert CLEVR.values(elements, PRESENCE).sum() == 2


def test_another_domain_needs_only_its_fields():
    assert (BOXES.set_dim, BOXES.encode([]).shape) == (7, (3, 7))
    one = {"box": [0, 0, 1, 1], "kind": "dog"}
    assert BOXES.decode(BOXES.encode([one]))[0]["kind"] == "dog"
    assert [f.name for f in BOXES.continuous] == ["box"]
    assert [f.name for f in BOXES.categorical] == ["kind"]


@pytest.mark.parametrize("schema", [CLEVR, BOXES])
def test_plain_records_round_trip(schema):
    again = ElementSchema.from_dict(schema.to_dict())
    assert again == schema
    assert hash(again) == hash(schema)
    assert schema.differences(again) == ""


def test_differences_are_named():
    assert "fields" in CLEVR.differences(BOXES)
    other = CLEVR.to_dict()
    other["fields"][1]["classes"] = ["metal", "rubber"]
    assert "material" in CLEVR.differences(ElementSchema.from_dict(other))
    assert ElementSchema.from_dict(other) != CLEVR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": "pink"}, "unknown color 'pink'; expected one of cyan, blue"),
        ({"coords": [1, 2]}, "coords: expected 3 finite numbers"),
        ({"coords": [1, 2, float("nan")]}, "finite"),
        ({"coords": ["a", 2, 3]}, "finite"),
        ({"shape": None}, "unknown shape"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(InputError, match=message):
        CLEVR.encode([CUBE | change])


def test_bad_sets_and_schemas():
    with pytest.raises(InputError, match="at most 10 objects in a set, got 11"):
        CLEVR.encode([CUBE] * 11)
    with pytest.raises(InputError, match="lacks 'size'"):
        CLEVR.encode([{name: value for name, value in CUBE.items() if name != "size"}])
    with pytest.raises(ValueError, match=r"expected elements \[set_size, 19\]"):
        CLEVR.decode(np.zeros((3, 7)))
    with pytest.raises(InputError, match="no field 'colour'"):
        CLEVR.slice("colour")
    with pytest.raises(InputError, match="unique"):
        ElementSchema("twice", [continuous("a", 1), continuous("a", 1)], max_objects=1)
    with pytest.raises(InputError, match="class names"):
        Field("kind", 3, classes=("a", "b"))
    good = {"name": "x", "max_objects": 2, "fields": [{"name": "a", "size": 1, "classes": [], "scale": 1.0}]}
    assert ElementSchema.from_dict(good).set_dim == 2
    untyped = [good | {"max_objects": True}, good | {"fields": [good["fields"][0] | {"size": "1"}]}]
    for record in (None, {}, good | {"fields": [{"name": "a"}]}, {"fields": 3}, *untyped):
        with pytest.raises(InputError, match="schema"):
            ElementSchema.from_dict(record)


def test_set_convention():
    check_set(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), set_dim=4)
    for elements, mask, words in (
        (torch.zeros(2, 3), None, r"elements \[batch, set_size, 4\]"),
        (torch.zeros(2, 3, 5), None, r"elements \[batch, set_size, 4\]"),
        (torch.zeros(2, 3, 4, dtype=torch.int), None, "floating point"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), "bool mask"),
        (torch.zeros(2, 3, 4), torch.ones(2, 2, dtype=torch.bool), "bool mask"),
    ):
        with pytest.raises(ValueError, match=words):
            check_set(elements, mask, set_dim=4)
    elements = torch.zeros(2, 3, 4)
    elements[0, :2, -1] = 1
    assert presence_mask(elements).tolist() == [[True, True, False], [False] * 3]


def test_masks_leave_the_present_elements():
    elements = torch.tensor([[1.0, float("nan"), 3.0], [float("nan")] * 3])[..., None]
    mask = elements[..., 0].isfinite()
    assert fill_absent(elements, mask, 7.0)[..., 0].tolist() == [[1, 7, 3], [7, 7, 7]]
    assert set_sizes(elements, mask).tolist() == [2, 0]
    front, there = present_first(elements, mask)
    assert front[..., 0].tolist() == [[1, 3, 0], [0, 0, 0]]
    assert there.tolist() == [[True, True, False], [False] * 3]
    assert set_sizes(elements).tolist() == [3, 3]
    assert present_first(elements)[0] is fill_absent(elements, None) is elements
    assert present_first(elements)[1].all()
