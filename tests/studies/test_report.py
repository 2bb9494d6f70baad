"""The page of a run or an experiment: its data, what it lets through, how long it is."""

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import browsed, call
from PIL import Image
from small_run import EVERY, done, lines_of, run_of

from ipr_jax.methods import Annealed
from ipr_jax.studies import report, shards
from ipr_jax.tasks import get_task


def score(images):
    """Scores that come and go."""
    total = jnp.abs(images).sum(axis=(1, 2, 3))
    return {"valid": jnp.floor(8 * total) % 2 == 0, "violations": jnp.floor(total) % 5}


TASK = dataclasses.replace(get_task("mini-sudoku"), score=score)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "mini-sudoku" / "ratio.json"


class Scripts(HTMLParser):
    """The texts of all scripts of a page, as a browser cuts them out."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        if self.inside:
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.found[-1] += text


def data_of(page):
    data, _program = Scripts(page).found
    return json.loads(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of 10 samples, all in one file."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done(folder, task=TASK, samples=10, storage=shards.Storage())
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return report.of_run(folder, TASK)


def test_its_counts_are_those_of_the_metrics(folder, page):
    data, lines = data_of(page), lines_of(folder)
    assert data["iterations"] == [line["iteration"] for line in lines] == [0, 1, 2, 3]
    solved = [one["solved"] for one in data["gallery"]["samples"]]
    assert [sum(int(each[which]) for each in solved) for which in range(4)] == [
        line["valid"] for line in lines
    ]
    panels = {panel["score"]: panel for panel in data["panels"]}
    assert [panel["share"] for panel in panels.values()] == [True, False]
    for score, value in (("valid", "valid_rate"), ("violations", "violations")):
        ends = (f"{score}_low", value, f"{score}_high")
        want = [[line.get(end) for end in ends] for line in lines]
        assert panels[score]["bands"] == {"refined": want}
    assert [row[0] for row in data["table"]["rows"]] == ["first pass", "1", "2", "3"]
    assert data["title"] == "mini-sudoku: 10 samples, 3 iterations"
    assert data["settings"] == {"what": "a test"}


def test_its_images_and_marks_are_those_of_the_samples(folder, page):
    gallery, (saved,) = data_of(page)["gallery"], shards.read(folder)
    assert [one["sample"] for one in gallery["samples"]] == list(range(10))
    assert gallery["note"] == ""
    shown, changes = (
        np.zeros((10, 16, 8, 8), np.uint8),
        [one["changed"] for one in gallery["samples"]],
    )
    for which, sheet in enumerate(gallery["sheets"]):
        kind, _, text = sheet.partition(",")
        assert kind == "data:image/png;base64"
        rows = np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).reshape(-1, 8, 64, 8)
        tiles = iter(rows.swapaxes(1, 2).reshape(-1, 8, 8))
        for place in range(10):
            for cell in changes[place][which] if which else range(16):
                shown[place, cell] = next(tiles)
        images = shown.reshape(10, 4, 4, 8, 8).swapaxes(2, 3).reshape(10, 32, 32)
        np.testing.assert_array_equal(images, 255 - saved["followed"][which, ..., 0])
        solved = [one["solved"][which] == "1" for one in gallery["samples"]]
        np.testing.assert_array_equal(solved, saved["valid"][which])

    def cells(which):
        return np.flatnonzero(which.reshape(-1)).tolist()

    before = saved["followed"][0]
    for which, images in enumerate(saved["followed"]):
        conflict = np.asarray(TASK.violating(shards.to_float(images)))
        tiles = (images != before).reshape(10, 4, 8, 4, 8).any(axis=(2, 4))
        for place, one in enumerate(gallery["samples"]):
            assert one["given"] == cells(~saved["editable"][place])
            assert one["conflict"][which] == cells(conflict[place])
            assert one["changed"][which] == cells(tiles[place])
        before = images
    assert any(one["changed"][-1] for one in gallery["samples"])
    assert any(one["conflict"][-1] for one in gallery["samples"])


def test_what_is_doubted_in_the_end_is_marked(folder, page, tmp_path):
    assert all(one["doubted"] == [] for one in data_of(page)["gallery"]["samples"])
    method = Annealed(iterations=2, cycles=2, finish_steps=2, calm=0)
    done(tmp_path, task=TASK, samples=10, storage=shards.Storage(), experiment=method)
    (saved,) = shards.read(tmp_path)
    samples = data_of(report.of_run(tmp_path, TASK))["gallery"]["samples"]
    for one, doubt, editable in zip(samples, saved["doubt"], saved["editable"], strict=True):
        worst = np.where(editable, doubt, 0).reshape(-1)
        assert worst.sum() > 0.01
        assert one["doubted"] == sorted(np.argsort(worst)[-3:].tolist())


def test_it_asks_for_nothing_and_is_made_of_what_it_was_given(folder, tmp_path):
    """Whatever the names of tasks, folders and settings are."""
    evil = "</script><script>alert(1)</script><!--<script>{{data}}"
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"versions": {evil: "1"}, "out": evil})
    )
    page = report.of_run(tmp_path / "run", dataclasses.replace(TASK, name=evil), evil)
    assert len(page.encode()) < 5_000_000
    assert not re.search(r"https?:|@import|url\(", page)
    assert not re.search(r"<(link|iframe|img|script[^>]*\bsrc)\b", page)
    data = data_of(page)
    assert data["settings"] == {"versions": {evil: "1"}, "out": evil}
    assert data["title"].startswith(evil)
    assert data["start"] == evil
    assert "innerHTML" not in Scripts(page).found[1]
    assert report.of_run(tmp_path / "run", dataclasses.replace(TASK, name=evil), evil) == page


def test_what_does_not_fit_is_left_out_and_named(folder, page, monkeypatch):
    monkeypatch.setattr(report, "MOST_BYTES", len(page) - 1)
    data = data_of(report.of_run(folder, TASK))
    assert len(data["gallery"]["samples"]) == 5
    assert data["gallery"]["note"] == "The first 5 of 10 samples."
    monkeypatch.setattr(report, "MOST_BYTES", 1)
    data = data_of(report.of_run(folder, TASK))
    assert (data["iterations"], len(data["gallery"]["sheets"])) == ([0, 3], 2)
    assert data["gallery"]["note"] == "The first 1 of 10 samples, 2 of 4 moments."
    assert len(data["panels"][0]["bands"]["refined"]) == 4
    assert len(data["gallery"]["samples"][0]["solved"]) == 4


def test_of_long_runs_some_moments_are_shown(folder, monkeypatch):
    monkeypatch.setattr(report, "MOST_MOMENTS", 3)
    assert data_of(report.of_run(folder, TASK))["iterations"] == [0, 2, 3]


def test_as_many_samples_are_followed_as_fit(monkeypatch):
    def followed(samples, **changes):
        run = run_of(samples=samples, storage=shards.Storage(**changes))
        return run.state(run.shards[0]).followed.shape

    assert followed(100) == (4, 64, 32, 32, 1)
    assert followed(10) == (4, 10, 32, 32, 1)
    monkeypatch.setattr(shards, "FOLLOWED_BYTES", 4 * 20 * 32 * 32 + 1)
    assert followed(100) == (4, 20, 32, 32, 1)
    assert followed(100, dtype="float32") == (4, 8, 32, 32, 1)


def test_an_experiment_has_its_arms_side_by_side(tmp_path):
    results = json.loads(RESULTS.read_text())
    shutil.copy(RESULTS, tmp_path / "results.json")
    (tmp_path / "config.json").write_text('{"arms": {}}')
    assert call("report", tmp_path)[0] == 0
    data = data_of((tmp_path / "report.html").read_text())
    (panel,) = data["panels"]
    assert list(panel["bands"]) == ["0.10", "0.25", "0.50"]
    for label, lines in results["metrics"].items():
        rates = [value for _, value, _ in panel["bands"][label]]
        assert rates == [line["valid_rate"] for line in lines]
    assert data["table"]["head"][-1] == "points above 0.25"
    assert [row[-1] for row in data["table"]["rows"]] == [
        "-7.2 (-9.0 to -5.5)",
        "-",
        "+0.2 (-2.0 to +2.4)",
    ]
    assert data["gallery"] is None
    assert "metrics" not in data["settings"]


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished experiment"):
        report.of_experiment(tmp_path)
    (tmp_path / "results.json").write_text('{"samples": 3}')  # a stream's
    with pytest.raises(FileNotFoundError, match="no finished experiment"):
        report.of_experiment(tmp_path)
    (tmp_path / "results.json").write_text('{"arms": ')
    with pytest.raises(ValueError, match="is damaged"):
        report.of_experiment(tmp_path)
    done(tmp_path / "run", samples=2, storage=EVERY)
    with pytest.raises(ValueError, match="holds no run of the task other: no balanced in it"):
        report.of_run(
            tmp_path / "run", dataclasses.replace(TASK, name="other", rates=("balanced",))
        )


@pytest.mark.browser
def test_in_a_browser(folder, page, tmp_path):
    from playwright.sync_api import expect

    path = report.write(shutil.copytree(folder, tmp_path / "run"), page)
    with browsed(path) as tab:
        now, figures = tab.locator("#now"), tab.locator("#gallery figure")
        assert now.inner_text() == "first pass"
        assert figures.count() == 10

        def picture():
            return tab.evaluate("document.querySelector('#gallery canvas').toDataURL()")

        assert tab.evaluate("tiles[0].sheets.every(sheet => sheet === null || sheet.complete)")
        first = picture()
        tab.keyboard.press("ArrowRight")
        assert now.inner_text() == "iteration 1 of 3"
        assert picture() != first
        tab.keyboard.press("End")
        assert now.inner_text() == "iteration 3 of 3"
        tab.keyboard.press("ArrowRight")
        assert now.inner_text() == "iteration 3 of 3"
        tab.locator("#slider").fill("0")
        assert now.inner_text() == "first pass"
        assert picture() == first
        tab.keyboard.press("Space")
        expect(now).to_have_text("iteration 3 of 3")
        expect(tab.locator("#play")).to_have_text("Play")

        solved = [one["solved"] for one in data_of(page)["gallery"]["samples"]]
        kinds = {
            "all": len(solved),
            "became valid": sum(one[0] + one[-1] == "01" for one in solved),
            "never valid": sum("1" not in one for one in solved),
            "broke again": sum("10" in one for one in solved),
            "valid throughout": sum("0" not in one for one in solved),
        }
        assert all(kinds.values())
        for kind, number in kinds.items():
            tab.get_by_role("button", name=f"{kind} ({number})", exact=True).click()
            assert tab.locator("#gallery figure:visible").count() == number
        tab.get_by_role("button", name="all (10)").click()
        last = picture()
        tab.get_by_label("changed in this iteration").uncheck()
        tab.get_by_label("in conflict").uncheck()
        assert picture() != last
        for size, scheme in (((390, 844), "light"), ((1280, 900), "dark")):
            tab.emulate_media(color_scheme=scheme)
            tab.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        background = "getComputedStyle(document.body).backgroundColor"
        assert tab.evaluate(background) == "rgb(18, 22, 29)"
