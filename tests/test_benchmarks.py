"""The measurements run and add up."""

import json

import jax
import numpy as np
import pytest
from conftest import TINY

from benchmarks import data


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
