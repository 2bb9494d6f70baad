"""The measurements run and add up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from benchmarks import data, throughput
from ipr_jax import flops
from ipr_jax.config import PRESETS


def test_rates_of_data_and_network(monkeypatch, capsys):
    monkeypatch.setitem(data.NETWORKS, "mini-sudoku", TINY)
    with jax.numpy_dtype_promotion("standard"):
        data.main(data.Args(smoke=True))
    out, err = capsys.readouterr()
    assert "mini-sudoku" in err
    result = json.loads(out)
    assert {"versions", "device", "commit", "num_workers"} <= result.keys()
    assert list(result["tasks"]) == ["mini-sudoku"]
    row = result["tasks"]["mini-sudoku"]
    batches, network = row["batches_per_second"], row["network"]
    assert list(batches) == ["loop", "thread", "processes"]
    assert all(number > 0 for number in (*batches.values(), *network.values()))
    assert network["timed_images"] == 64
    images = 64 * max(batches["thread"], batches["processes"])
    limits = row["network_waits_above"]
    assert limits["images_per_second"] == pytest.approx(images)
    assert limits["tflop_per_second"] == pytest.approx(images * network["gflop_per_image"] / 1e3)


def test_every_task_has_batches_and_a_network_for_them():
    for task in data.Args().tasks:
        batch = data.batches_of(task, None)(0, np.arange(2))
        network = data.NETWORKS[task]
        assert batch.image.shape[1:] == network.image_shape
        assert batch.editable.shape[1:] == network.grid
    with pytest.raises(ValueError, match="the task mnist-sudoku needs"):
        data.batches_of("mnist-sudoku", None)


def test_throughput_of_a_loop_and_its_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "mini-sudoku", TINY)
    monkeypatch.setattr(throughput, "product_rate", lambda precision, repeats: 1e9)
    options = {"preset": ("mini-sudoku",), "precision": ("float32", "bfloat16"), "batch": (2, 4)}
    args = throughput.Args(**options, evaluations=2, repeats=2, out=tmp_path / "out.json")
    throughput.main(args)
    assert "mini-sudoku" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "device", "commit"} <= result.keys()
    rows = result["rows"]
    order = [("float32", 2), ("float32", 4), ("bfloat16", 2), ("bfloat16", 4)]
    assert [(row["precision"], row["batch"]) for row in rows] == order
    model = jax.eval_shape(lambda: throughput.new_model(TINY, jnp.float32))
    z, t = jnp.zeros((1, 32, 32, 1)), jnp.zeros((1, 4, 4))
    number = flops.count(lambda model: model(z, t), model)
    for row in rows:
        each = row["ms_per_evaluation"]["loop"] / 1e3
        assert row["gflop_per_sample"] == pytest.approx(number / 1e9, rel=0.1)
        rate = row["gflop_per_sample"] * 1e9 * row["batch"] / each
        assert row["flop_per_second"] == pytest.approx(rate)
        assert row["share_of_product"] == pytest.approx(rate / 1e9)
        done = row["refined_samples_per_second"] * throughput.paper_evaluations("mini-sudoku")
        assert done == pytest.approx(row["batch"] / each)
        ratio = row["loop_over_bare"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert row["compile_seconds"] > 0
        assert row["memory_bytes"] > 0
    with pytest.raises(FileExistsError, match="is not overwritten"):
        throughput.main(args)


def test_evaluations_of_the_paper():
    """As docs/reproduce.md has them."""
    found = [round(throughput.paper_evaluations(name)) for name in throughput.EDITABLE]
    assert found == [740, 3969, 3915, 2267]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": ("x",)}, "unknown preset 'x'; known: mini-sudoku, even-pixels, counting-p"),
        ({"batch": (0,)}, "batch must be a whole number of at least 1, got 0"),
        ({"devices": 999, "batch": (999,)}, "devices must be at most 1, got 999"),
        ({"devices": 2}, "batch must be a multiple of devices=2, got 1"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_measurements_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        throughput.Args(**options)
