"""What damaged checkpoints do; test_shards.py runs this file in a process of its own."""

import os
import shutil

import pytest
from small_run import bits, compile_once, done, stopped_after, train, trained

from ipr_jax.interrupts import PreemptionError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, done(folder)


@pytest.fixture
def half(tmp_path):
    """A run of which one file is written, and two checkpoints of the next are there."""
    stopped_after(9, tmp_path / "run")
    assert len(checkpoints(tmp_path / "run")) == 2
    return tmp_path / "run"


def checkpoints(folder):
    """The older one and the newer one."""
    return sorted((folder / "state-0").iterdir(), key=lambda step: int(step.name))


def damage(path, how):
    """Cut a file in half, or flip a bit of it there."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    if how == "flipped":
        data[at] ^= 16
    path.write_bytes(data if how == "flipped" else data[:at])


def by_size(step):
    """The files of a checkpoint; the images are in the largest."""
    return sorted((path for path in step.rglob("*") if path.is_file()), key=os.path.getsize)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, half, how):
    newest = checkpoints(half)[-1]
    damage(by_size(newest)[-1], how)
    with pytest.warns(UserWarning, match=f"state-0/{newest.name} is damaged and left out"):
        said = done(half)
    assert bits(half) == bits(finished[0])
    assert [status.done for status in said[:3]] == [24, 28, 32]


@pytest.mark.filterwarnings("ignore:.*is damaged and left out")
@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_whatever_is_damaged_results_are_the_same(finished, half, how, tmp_path):
    names = [path.relative_to(half) for path in by_size(checkpoints(half)[-1])]
    assert len(names) > 5
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(half, folder)
        if how == "removed":
            (folder / name).unlink()
        else:
            damage(folder / name, how)
        done(folder)
        assert bits(folder) == bits(finished[0])


def test_checkpoints_of_what_is_done_may_be_damaged(finished, half):
    """They are there if it was killed just before it removed them."""
    shutil.copytree(half / "state-0", half.parent / "state-0")
    stopped_after(3, half)
    assert (half / "samples" / "00001.json").exists()
    shutil.rmtree(half / "state-0")
    shutil.copytree(half.parent / "state-0", half / "state-0")
    for step in checkpoints(half):
        damage(by_size(step)[-1], "truncated")
    done(half)
    assert bits(half) == bits(finished[0])


def test_without_a_whole_checkpoint_it_says_what_to_do(finished, half):
    for step in checkpoints(half):
        damage(by_size(step)[-1], "truncated")
    warned = pytest.warns(UserWarning, match="is damaged and left out")
    with warned, pytest.raises(ValueError, match=r"no checkpoint in .*state-0 is whole; remove it"):
        done(half)
    for path in sorted((half / "state-0").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    done(half)
    assert bits(half) == bits(finished[0])


def test_training_told_to_end_saves_and_goes_on_from_the_last_that_is_whole(tmp_path, monkeypatch):
    compile_once(monkeypatch)
    list(train(tmp_path / "whole"))
    folder = tmp_path / "run"
    steps, told = train(folder, preempted=lambda step: step == 5), []
    with pytest.raises(PreemptionError):
        told.extend(line["step"] for line in steps)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "5"]
    damage(by_size(folder / "checkpoints" / "5")[-1], "flipped")
    with pytest.warns(UserWarning, match="checkpoints/5 is damaged and left out"):
        told.extend(line["step"] for line in train(folder))
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trained(folder) == trained(tmp_path / "whole")
