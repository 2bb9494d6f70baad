"""Damaged checkpoints of a training; test_trainer.py runs this file in a process of its own."""

import os
import shutil

import jax
import numpy as np
import pytest
from small_run import compile_once, damage, train, trained

from ipr_jax.interrupts import PreemptionError
from ipr_jax.runtime import resume, sharding


def test_training_told_to_end_saves_and_goes_on_from_the_last_that_is_whole(tmp_path, monkeypatch):
    compile_once(monkeypatch)
    list(train(tmp_path / "whole"))
    folder = tmp_path / "run"
    steps, told = train(folder, preempted=lambda step: step == 5), []
    with pytest.raises(PreemptionError):
        told.extend(line["step"] for line in steps)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "5"]
    parts = (path for path in (folder / "checkpoints" / "5").rglob("*") if path.is_file())
    damage(max(parts, key=os.path.getsize), "flipped")
    with pytest.warns(UserWarning, match="checkpoints/5 is damaged and left out"):
        told.extend(line["step"] for line in train(folder))
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trained(folder) == trained(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*is damaged and left out")
@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_whatever_is_damaged_a_whole_one_is_found(tmp_path, how):
    where = sharding.whole(sharding.data_mesh())
    states = {
        step: {"weights": jax.device_put(step + np.arange(3e5, dtype="f4"), where)}
        for step in (4, 5)
    }
    wanted = jax.eval_shape(lambda: states[5])
    wanted = jax.tree.map(lambda leaf: leaf.update(sharding=where), wanted)
    with resume.checkpoints(tmp_path / "half") as manager:
        for step, state in states.items():
            resume.save(manager, step, state)
    names = [path.relative_to(tmp_path) for path in tmp_path.rglob("5/**/*") if path.is_file()]
    assert len(names) > 5
    steps = set()
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "half", folder)
        path = folder / name.relative_to("half")
        path.unlink() if how == "removed" else damage(path, how)
        with resume.checkpoints(folder) as manager:
            step, state = resume.restore(manager, wanted)
        np.testing.assert_array_equal(state["weights"], states[step]["weights"])
        steps.add(step)
    assert 4 in steps
