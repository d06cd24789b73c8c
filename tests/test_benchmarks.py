"""Benchmarks: every topic has rows; the page keeps text written by hand; files are complete or unchanged."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__, decoder, growth, memory, minutes_to_ap, report, trunk, voting
from benchmarks.report import Report, filled
from benchmarks.samples import hidden_objects
from benchmarks.timing import Row, flops, products_alone
from benchmarks.topics import EXTRAS, TOPICS, measure
from benchmarks.train_step import LOSS
from setpred.checkpoint.untrusted import read_yaml
from setpred.commands.compare.results import add_result
from setpred.decoders import IDSPN, GreedyVotes
from setpred.errors import InputError
from setpred.inner import GradientDescent, VotingEnergy, compiled
from setpred.rendering.camera import NOMINAL_CAMERA, Camera
from setpred.schema import CLEVR

ROOT = Path(__file__).resolve().parents[1]
GROWTH = {"base": {"batch": 8, "set_size": 10, "set_dim": 19, "iterations": 5}, "threads": 1}
GROWTH |= {"curves": {axis: [(8, 1.0), (16, 2.0), (32, 4.0)] for axis in growth.AXES}}


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled descent is run by PyTorch as it is: compiling takes longer than all of these tests."""
    monkeypatch.setattr(compiled, "_compiled", lambda replayed: compiled._step)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_gives_rows(topic):
    rows = measure(topic, quick=True)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys) > 0
    for row in rows:
        assert row.key.endswith(("_cpu", "_gpu"))
        assert all(math.isfinite(value) and value > 0 for value in (row.plain_ms, row.ours_ms, row.ratio))
        assert math.isfinite(row.spread)
        assert row.spread >= 0
        assert row.floor_ms is None or 0 < row.floor_ms < math.inf
    promised = {"decoder": {f"decoder_{kind}_cpu" for kind in decoder.KINDS}, "train_step": {"train_step_cpu"}}
    promised["voting"] = {"decoder_voting_quickstart_cpu", "train_step_quickstart_cpu"}
    promised["voting"] |= {"decoder_slots_per_voting_quickstart_cpu", "train_step_slots_per_quickstart_cpu"}
    promised["inference"] = {"predict_cpu", "predict_slots_per_voting_cpu"}
    assert promised.get(topic, set()) <= set(keys)


def test_the_layers_of_a_trunk_are_the_whole_model_and_give_its_step():
    whole, split = (trunk.stepping("quickstart", voting.QUICK, half=False) for _ in range(2))
    weights, pieces = dict(split.module.named_parameters()), trunk.layers(split)
    first, given = list(pieces)[1], []
    layer = pieces[first]
    pieces[first] = lambda images: given.append(images.requires_grad) or layer(images)
    parts = split.parts(pieces)
    assert given == [False]  # a training step has no gradient of its images
    assert len(pieces) == 7  # two stages and two blocks between images, votes and decoder
    assert [name for name, times in parts.items() if len(times) == 1] == ["images to floats", LOSS, "optimizer"]
    whole.step()
    for name, expected in whole.module.named_parameters():
        torch.testing.assert_close(weights[name], expected, msg=name)


@pytest.mark.parametrize("name", list(trunk.TRUNKS))
def test_the_trunk_that_others_are_compared_with_is_the_configured_one(name):
    encoder = read_yaml(trunk.CONFIGS / f"{name}.yaml")["model"]["encoder"]["init_args"]
    configured = encoder["tokens"]["init_args"]["trunk"]["init_args"]
    assert trunk.TRUNKS[name][0] == (configured["widths"], configured["blocks"])


def test_the_trunks_are_measured_with_their_tables():
    found = trunk.measure(quick=True)["quickstart"]
    assert [len(found[part]) for part in ("trunk", "execution", "parts")] == [10, 4, 9]
    assert all(taken > 0 for part in ("trunk", "execution") for taken in found[part].values())
    assert "24-48, 2 blocks, 16x16 tokens" in trunk.markdown({"quickstart": found})


def test_plain_dspn_is_the_unrolled_descent():
    sizes = decoder.Sizes(batch=2, width=8, set_size=4, set_dim=3)
    found = {}
    for way in ("unrolled", "unrolled_plain"):
        find = memory.descent_of(way, sizes)
        torch.manual_seed(1)
        found[way] = find(2, 4)
    torch.testing.assert_close(found["unrolled"], found["unrolled_plain"], rtol=1e-4, atol=1e-5)


def test_plain_voting_is_the_librarys():
    torch.manual_seed(0)
    weights, sizes = [4.0, 4.0, 4.0], {"set_size": 4, "set_dim": CLEVR.set_dim}
    energy = VotingEnergy(precise=3, weights=weights, set_dim=CLEVR.set_dim)
    parts = IDSPN(energy, GradientDescent(iterations=6), start=GreedyVotes(**sizes, weights=weights), **sizes).double()
    votes, rest = torch.randn(2, 16, 19 + 3 + 1, dtype=torch.float64).split([19, 4], dim=-1)
    features = torch.cat([votes, rest.sigmoid()], dim=-1).requires_grad_()
    ways = voting.voting_ways(parts, features)
    (plain, slope), (ours, ours_slope) = ways["plain"](), ways["ours"]()
    torch.testing.assert_close(plain, ours)
    torch.testing.assert_close(slope, ours_slope)
    assert slope.abs().max() > 1e-3
    assert flops(products_alone(ways["ours"])) == flops(ways["ours"]) > 0
    with torch.no_grad():
        torch.testing.assert_close(voting.plain_sets(parts, features), ours)


def test_minutes_are_those_of_the_first_score_at_the_bar(tmp_path, capsys):
    scores = [(60, 0.5), (120, ""), (180, 0.79), (240, 0.8), (300, 0.7), (360, 0.9)]
    points = [{"seconds": seconds, minutes_to_ap.SCORE: score} for seconds, score in scores]
    table = tmp_path / "run" / "metrics.csv"
    table.parent.mkdir()
    table.write_text("\n".join([",".join(points[0]), *(",".join(map(str, p.values())) for p in points)]))
    (of_table,) = map(minutes_to_ap.reached, minutes_to_ap.runs_of(table))
    assert (of_table["minutes"], of_table["best"], of_table["length"]) == (4.0, 0.9, 6.0)
    run = {"digest": "a", "seed": 3, "budget": "9steps", "options": [], "name": "quickstart", "threads": 2}
    run |= {"processor": "Some", "torch": "2", "points": [points[0] | {minutes_to_ap.SCORE: None}, *points[2:3]]}
    add_result(tmp_path / "results.jsonl", run)
    (of_results,) = map(minutes_to_ap.reached, minutes_to_ap.runs_of(tmp_path / "results.jsonl"))
    assert (of_results["minutes"], of_results["best"]) == (None, 0.79)
    assert "| never |" in " ".join(minutes_to_ap.markdown([of_results]).split())
    assert minutes_to_ap.main([str(tmp_path / "none.csv")]) == 2
    assert "train first" in capsys.readouterr().err


def test_growth_is_measured_and_drawn(tmp_path):
    found = growth.measure(quick=True)
    assert set(found["curves"]) == set(growth.AXES)
    for curve in found["curves"].values():
        assert all(math.isfinite(ms) and ms > 0 for _, ms in curve)
    growth.draw(tmp_path / "growth.png", found)
    assert (tmp_path / "growth.png").stat().st_size > 5000
    assert growth.slope([(8, 7.0), (16, 1.0), (32, 4.0), (64, 16.0)]) == pytest.approx(2.0)


# --- the page -------------------------------------------------------------------------------------------------------


def row(key, ratio=2.0, **rest):
    return Row(f"what | {key} is", key, 20.0, 10.0, ratio, 0.1, **rest)


def written(folder, *, afresh=True, gpu=None, **ratios):
    """A report of these rows, by topic and ratio, as it was written."""
    made = Report(folder, afresh=afresh)
    if gpu is not None:
        made.add_gpu(gpu)
    for topic, ratio in ratios.items():
        made.add(topic, [row(f"{topic}_cpu", ratio)])
    made.write()
    return made


def test_a_report_is_written_extended_and_read_again(tmp_path):
    first = Report(tmp_path, afresh=True)
    first.add("train_step", [row("train_step_cpu")])
    first.add("decoder", [row("decoder_fspool_cpu", 3.0), row("decoder_pairwise_cpu")])
    first.add("growth", GROWTH)
    first.write()
    page = tmp_path / "benchmarks.md"
    page.write_text(page.read_text() + "\nwritten by hand\n")
    written(tmp_path, afresh=False, decoder=4.0)
    content = json.loads((tmp_path / "benchmarks.json").read_text())
    assert {"machine", "versions", "ratios", "rows", "growth"} <= set(content)
    assert content["ratios"] == {"decoder_cpu": 4.0, "train_step_cpu": 2.0}
    assert [line["topic"] for line in content["rows"]] == ["decoder", "train_step"]
    assert {"avx2", "avx512", "bfloat16", "amx", "encoder_trains_in"} <= set(content["machine"])
    assert {"python", "torch", "numpy", "scipy"} == set(content["versions"])
    text = page.read_text()
    assert "written by hand" in text
    assert "(images/growth.png)" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.json", "benchmarks.md", "images"]


def test_rows_of_a_gpu_come_from_another_machine_and_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    there, here = tmp_path / "there", tmp_path / "here"
    other = Report(there, afresh=True)
    other.content["machine"] |= {"gpu": "A Large One", "cores": 77}
    other.add("decoder", [row("decoder_cpu", 9.0), row("decoder_gpu", 7.0)])
    other.write()
    written(here, gpu=there / "benchmarks.json", decoder=3.0)
    for afresh in (False, True):
        assert written(here, afresh=afresh, decoder=4.0).content["ratios"] == {"decoder_cpu": 4.0, "decoder_gpu": 7.0}
        text = (here / "benchmarks.md").read_text()
        assert "Rows of a GPU: " in text
        assert "A Large One" in text
    without = written(tmp_path / "without")
    with pytest.raises(InputError, match="got none"):
        without.add_gpu(tmp_path / "without" / "benchmarks.json")
    without.content["machine"]["threads"] = 99
    without.write()
    with pytest.raises(InputError, match="99 threads"):
        Report(tmp_path / "without", afresh=False)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_quick_figures_and_writes_the_others(monkeypatch, tmp_path, capsys):
    """A topic that fails loses none of the others; a page without marks is one sentence."""

    def found(topic, quick):
        if topic == "matching":
            raise SystemExit("failed")
        return GROWTH if topic == "growth" else [row(f"{topic}_cpu", 2.0 if quick else 3.0)]

    docs, out = tmp_path / "docs", tmp_path / "out"
    monkeypatch.setattr(__main__, "measure_alone", found)
    monkeypatch.setattr(__main__, "DOCS", docs)
    assert __main__.main(["--quick", "--only", "data", "growth"]) == 0
    assert "what \\| data_cpu is" in capsys.readouterr().out
    assert __main__.main(["--quick", "--only", "data", "--out", str(out)]) == 0
    assert (out / "benchmarks.md").exists()
    assert not docs.exists()
    assert __main__.main(["--only", "data", "matching", "inference"]) == 1
    assert "failed: matching" in capsys.readouterr().err
    assert json.loads((docs / "benchmarks.json").read_text())["ratios"] == {"data_cpu": 3.0, "inference_cpu": 3.0}
    (docs / "benchmarks.md").write_text("no marks")
    assert __main__.main(["--only", "data"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: expected <!-- machine -->")


def test_the_page_has_its_marks_and_every_topic_its_command():
    page = (__main__.DOCS / report.PAGE).read_text()
    filled(page, dict.fromkeys(report.PARTS, ""))
    for topic in (*TOPICS, *EXTRAS):
        assert f"python -m benchmarks.{topic}" in import_module(f"benchmarks.{topic}").__doc__


def test_hidden_objects_are_those_right_of_the_edge_in_their_image():
    """Seen from the other side of the scene, left and right change places."""
    right = NOMINAL_CAMERA.axes()[0]
    sets = np.zeros((2, 3, CLEVR.set_dim), dtype=np.float32)
    for row, place in enumerate((right, -right, 2 * right)):
        sets[:, row, :3] = place / 3
    sets[:, :2, -1] = 1  # the third is absent
    x, y, z = NOMINAL_CAMERA.location
    cameras = [NOMINAL_CAMERA, Camera((-x, -y, z))]
    counts = hidden_objects(torch.from_numpy(sets), cameras, 0.5)
    assert counts.tolist() == [1, 1]
    only_right = torch.from_numpy(sets[:, :1])
    assert hidden_objects(only_right, cameras, 0.5).tolist() == [1, 0]
    assert hidden_objects(only_right.expand(4, -1, -1, -1), cameras, 0.99).tolist() == [[0, 0]] * 4
