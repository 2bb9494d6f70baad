"""Large runs: what is in the files, and that nothing that happens to a run changes them."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import IPR, call
from small_run import (
    EXPERIMENT,
    SETTINGS,
    TASK,
    bits,
    damage,
    done,
    fake,
    lines_of,
    run_of,
    source,
    stopped_after,
    train,
    trained,
    whole,
)

import ipr_jax
from ipr_jax.interrupts import PreemptionError
from ipr_jax.methods import Annealed, Refinement
from ipr_jax.runtime import files, snapshots
from ipr_jax.studies import evaluate, metrics, shards
from ipr_jax.studies.shards import Storage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing happened to: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, done(folder)


# --- what is written ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history():
    batch = source(np.arange(10))
    return list(evaluate.evaluate(TASK, fake, batch, EXPERIMENT, jax.random.key(7)))


def test_samples_are_those_of_one_batch(history, tmp_path):
    done(tmp_path / "run", storage=Storage(shard_size=4, dtype="float32"))
    found = whole(tmp_path / "run")
    np.testing.assert_array_equal(found["first_pass"], history[0].image)
    np.testing.assert_array_equal(found["refined"], history[-1].image)
    np.testing.assert_array_equal(found["editable"], source(np.arange(10)).editable)
    np.testing.assert_array_equal(found["nfe"], history[-1].costs.nfe)
    np.testing.assert_array_equal(found["broke_at"], [-1] * 10)
    for name in ("valid", "violations"):
        np.testing.assert_array_equal(found[name], [each.scores[name] for each in history])
    first = next(shards.read(tmp_path / "run"))
    np.testing.assert_array_equal(first["followed"], [each.image[:4] for each in history])


def test_images_are_bytes_unless_told_otherwise(finished, history):
    found = whole(finished[0])
    for name, progress in (("first_pass", history[0]), ("refined", history[-1])):
        want = np.clip(np.asarray(progress.image), -1, 1)
        assert found[name].dtype == np.uint8
        np.testing.assert_allclose(shards.to_float(found[name]), want, atol=1 / 255 + 1e-6)
    ends = np.array([-1.5, -1, 0.999, 1, 2, np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(Storage().stored(ends), [0, 0, 255, 255, 255, 0, 255, 0])


def test_metrics_are_those_of_one_batch(finished, history):
    lines = lines_of(finished[0])
    for line, progress in zip(lines, history, strict=True):
        want = metrics.line(
            metrics.tally(progress.scores, progress.finite, progress.costs), TASK.means
        )
        assert line == pytest.approx({"iteration": progress.iteration, **want}, rel=1e-12)


def test_the_manifest_lists_the_files(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "manifest.json", "metrics.jsonl", "samples")
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["samples"], manifest["dtype"]) == (10, "uint8")
    assert [shard["first"] for shard in manifest["shards"]] == [0, 4, 8]
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 2]
    for shard in manifest["shards"]:
        data = (folder / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_it_says_how_far_it_is(finished):
    _, said = finished
    assert {status.total for status in said} == {40}
    assert [status.done for status in said] == [
        *(0, 4, 8, 12, 16, 16, 20, 24, 28, 32, 32, 34, 36, 38, 40, 40)
    ]
    assert [len(status.lines) for status in said[:6]] == [0, 1, 2, 3, 4, 4]
    assert [status.lines[-1]["samples"] for status in said[4:]] == [4] * 5 + [8] * 5 + [10] * 2


def test_a_sample_that_breaks_is_named_and_not_counted(finished, tmp_path):
    """From the second iteration on, and nothing else changes."""

    def breaking(progress):
        image = np.array(progress.image)
        scores = {name: values.copy() for name, values in progress.scores.items()}
        finite = progress.finite.copy()
        if progress.iteration >= 2:
            image[1], finite[1], scores["valid"][1] = np.nan, False, False
        return progress._replace(image=image, finite=finite, scores=scores)

    def broken(*arguments, **options):
        for progress in evaluate.evaluate(*arguments, **options):
            yield breaking(progress) if options["first"] == 4 else progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "evaluate", broken)
        done(tmp_path / "run")
    folder = tmp_path / "run"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["not_finite"] == [{"sample": 5, "iteration": 2}]
    lines = lines_of(folder)
    assert [line["not_finite"] for line in lines] == [0, 0, 1, 1]
    found, want = whole(folder), whole(finished[0])
    np.testing.assert_array_equal(found["broke_at"], np.where(np.arange(10) == 5, 2, -1))
    others = np.arange(10) != 5
    for name in ("refined", "nfe"):
        np.testing.assert_array_equal(found[name][others], want[name][others])
    np.testing.assert_array_equal(found["refined"][5], np.zeros((32, 32, 1)))
    counted = want["violations"][-1][others]
    assert lines[-1]["violations"] == pytest.approx(counted.mean())


# --- what may happen to it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "batch_size"),  # 3 does not divide the 4 samples of a file
    [
        *((number, 3) for number in (1, 5, 16)),
        *(pytest.param(number, 3, marks=pytest.mark.heavy) for number in (2, 4, 6, 9, 14, 15)),
        (6, 64),
        *(pytest.param(number, 64, marks=pytest.mark.heavy) for number in (1, 15)),
    ],
)
def test_closed_it_goes_on_from_there(finished, tmp_path, number, batch_size):
    before = stopped_after(number, tmp_path / "run", batch_size=batch_size)
    after = done(tmp_path / "run", batch_size=batch_size)
    assert after[-1][:3] == finished[1][-1][:3]
    assert bits(tmp_path / "run") == bits(finished[0])
    assert after[0].done == before[-1].done  # nothing is done twice


def test_what_a_method_doubts_is_in_its_files(tmp_path):
    done(tmp_path, experiment=ANNEALED)
    found, batch = whole(tmp_path), source(np.arange(10))
    keys = ipr_jax.sample_keys(jax.random.key(7), 10)
    solved = ipr_jax.solve(fake, keys, batch.image, batch.editable, method=ANNEALED)
    np.testing.assert_array_equal(found["nfe"], solved.nfe)
    assert len(set(found["nfe"].tolist())) > 1  # some are calm early
    summed = np.where(batch.editable, found["doubt"], 0).sum(axis=(1, 2))
    assert (summed < 0.27)[found["nfe"] < 8].all()


def test_told_to_end_it_loses_no_more_than_a_pass_over_a_batch(finished, tmp_path):
    run = run_of(batch_size=2, storage=Storage(shard_size=4, save_minutes=60))
    steps = shards.refine(run, tmp_path / "run", SETTINGS, preempted=lambda: len(said) > 6)
    said = []
    with pytest.raises(PreemptionError):
        said.extend(status.done for status in steps)
    assert said == [0, 2, 4, 6, 8, 10, 12]
    said = []
    said.extend(status.done for status in shards.refine(run, tmp_path / "run", SETTINGS))
    assert said[:3] == [12, 14, 16]
    assert bits(tmp_path / "run") == bits(finished[0])


ANNEALED = Annealed(iterations=2, cycles=3, finish_steps=2, calm=0.27)


@pytest.mark.parametrize("method", [ANNEALED, pytest.param(EXPERIMENT, marks=pytest.mark.heavy)])
def test_ended_within_iterations_it_loses_no_evaluation(tmp_path, monkeypatch, method):
    """At 30 random moments; the host has the state after every evaluation of a batch."""
    done(tmp_path / "whole", experiment=method)
    monkeypatch.setattr(evaluate, "CHUNK_SECONDS", 0)
    chunks, advance = [], evaluate.advance_on

    def counted(*given, **options):
        found = advance(*given, **options)
        chunks.append(int(found.costs.nfe.sum()))
        return found

    monkeypatch.setattr(evaluate, "advance_on", counted)
    done(tmp_path / "chunks", experiment=method)
    number, rng, ended = len(chunks), np.random.default_rng(3), 0
    assert number > 25
    chunks.clear()
    run = run_of(experiment=method, storage=Storage(shard_size=4, save_minutes=60))
    while not (tmp_path / "parts" / "manifest.json").exists():
        left = len(chunks) + (rng.integers(1, 5) if ended < 30 else number)
        steps = shards.refine(
            run,
            tmp_path / "parts",
            SETTINGS,
            preempted=lambda left=left: len(chunks) >= left,
        )
        with contextlib.suppress(PreemptionError):
            for _ in steps:
                pass
        ended += 1
    assert ended > 10
    assert len(chunks) - number <= 2 * ended  # compiled again, on samples that have nothing to do
    assert bits(tmp_path / "parts") == bits(tmp_path / "chunks") == bits(tmp_path / "whole")


def test_told_to_end_it_does_not_wait_for_the_device():
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, a: jax.numpy.tanh(a @ a), x))
    x = np.ones((1000, 1000), np.float32)
    work.lower(x).compile()
    begun = work(x)
    with pytest.raises(PreemptionError):
        evaluate._wait(begun, lambda: True)
    assert not begun.is_ready()
    evaluate._wait(begun, lambda: False)
    assert begun.is_ready()


def test_a_finished_run_is_left_as_it_is(finished):
    folder, said = finished
    before = bits(folder)
    assert done(folder)[-1][:3] == said[-1][:3]
    assert bits(folder) == before
    said = r"configuration \(what is \"a test\" there and \"something else\" here\); choose"
    with pytest.raises(ValueError, match=f"holds a run of another {said}"):
        shards.refine(run_of(), folder, {"what": "something else"})


@pytest.fixture
def half(tmp_path):
    """A run of which one file is written, and two checkpoints of the next are there."""
    stopped_after(9, tmp_path / "run")
    assert len(checkpoints(tmp_path / "run")) == 2
    return tmp_path / "run"


def checkpoints(folder):
    """The older one and the newer one."""
    return sorted(folder.glob("state-0/*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("00000.npz", "00000.npz is not the file that 00000.json describes; remove both"),
        ("00000.json", r"00000.json is (damaged|of other samples); remove it"),
    ],
)
@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
def test_a_damaged_file_is_refused_and_can_be_made_again(finished, half, name, message, how):
    path = half / "samples" / name
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        at = data.index(b'"first"') + 1 if name.endswith("json") else len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    if (name, how) != ("00000.json", "removed"):  # then its samples are not done
        with pytest.raises(ValueError, match=message):
            done(half)
        assert len(checkpoints(half)) == 2
        for left in (half / "samples").glob("00000.*"):
            left.unlink()
    done(half)
    assert bits(half) == bits(finished[0])


def test_a_record_in_which_a_bit_is_another_is_refused(half):
    path = half / "samples" / "00000.json"
    data = path.read_bytes()
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"00000.json is damaged; remove it to refine its sam"):
            shards.refine(run_of(), half, SETTINGS)


def test_files_before_the_one_in_work_can_be_made_again(finished, half):
    """Which goes on first, so that the state of the others can be saved as well."""
    for path in (half / "samples").glob("00000.*"):
        path.unlink()
    said = [stopped_after(number, half) for number in (5, 3, 3)]
    assert [part[0].done for part in said] == [12, 24, 32]
    done(half)
    assert bits(half) == bits(finished[0])


def test_a_short_file_does_not_decide_the_batch_size_of_the_others(tmp_path, monkeypatch):
    """It goes on first, with 2 samples of the 4 that were asked for at once."""
    stopped_after(13, tmp_path / "run", batch_size=4)
    for path in (tmp_path / "run" / "samples").glob("00000.*"):
        path.unlink()
    asked = {}

    def told(*arguments, **options):
        asked[options["first"]] = options["batch_size"]
        yield from evaluate.evaluate(*arguments, **options)

    monkeypatch.setattr(shards, "evaluate", told)
    done(tmp_path / "run", batch_size=4)
    assert asked == {8: 4, 0: 4}


def test_a_halved_batch_stays_halved_in_a_short_file(tmp_path, monkeypatch):
    asked = []

    def halved(*arguments, **options):
        asked.append(options["batch_size"])
        for progress in evaluate.evaluate(*arguments, **options):
            yield progress._replace(batch_size=1)

    monkeypatch.setattr(shards, "evaluate", halved)
    done(tmp_path / "run", samples=6, batch_size=2, storage=Storage(shard_size=64))
    assert asked == [2, 1, 1]


def test_the_state_of_a_process_that_is_still_at_work_is_left(finished, tmp_path):
    """It may be done, and not yet have closed its folder."""
    steps = shards.refine(run_of(), tmp_path / "run", SETTINGS)
    next(steps)
    others = [tmp_path / "run" / f"state-{number}" for number in (1, 2)]
    for other in others:
        other.mkdir()
    with files.locked(others[0]):
        list(steps)
    assert [other.is_dir() for other in others] == [True, False]
    others[0].rmdir()
    assert bits(tmp_path / "run") == bits(finished[0])


def test_more_processes_at_work_in_a_folder_are_not_disturbed(finished, tmp_path):
    stopped_after(1, tmp_path / "run")
    other = tmp_path / "run" / "state-1"
    other.mkdir()
    with files.locked(other), pytest.raises(ValueError, match=r"at work in .*state-1; wait for it"):
        done(tmp_path / "run")
    done(tmp_path / "run")
    assert bits(tmp_path / "run") == bits(finished[0])


def test_two_runs_at_once_in_a_folder_are_refused(finished, tmp_path):
    run = shards.refine(run_of(), tmp_path / "run", SETTINGS)
    next(run)
    with pytest.raises(ValueError, match=r"another process is at work in .*state-0"):
        done(tmp_path / "run")
    list(run)
    assert bits(tmp_path / "run") == bits(finished[0])


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_state_gives_way_to_the_one_before(finished, half, how):
    _, newest = checkpoints(half)
    damage(newest, how)
    with pytest.warns(UserWarning, match=f"state-0/{newest.name} is damaged .*; it is left out"):
        said = done(half)
    assert bits(half) == bits(finished[0])
    assert [status.done for status in said[:3]] == [24, 28, 32]


@pytest.mark.filterwarnings("ignore:.*it is left out")
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_wherever_it_is_damaged_results_are_the_same(finished, half, how):
    older, newest = checkpoints(half)
    run = run_of()
    states = list(map(run.state, run.shards))
    _, want = snapshots.restore(half / "state-0", states.__getitem__)
    data, left = newest.read_bytes(), []
    ends = 1 - np.arange(1, 30) / len(data)  # where the archive says what is where
    for at in (*np.linspace(0, 1, 100, endpoint=False), *ends):
        damage(newest, how, at)
        older.write_bytes(data)
        number, state = snapshots.restore(half / "state-0", states.__getitem__)
        assert number == 1
        jax.tree.map(np.testing.assert_array_equal, state, want)
        left.append(newest.exists())
        newest.write_bytes(data)
    assert sum(left) < 20  # no array hangs on some bytes of an archive
    done(half)
    assert bits(half) == bits(finished[0])


def test_a_state_of_any_dtype_goes_on(tmp_path):
    tree = {"a": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "b": (np.True_, None)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    with snapshots.own(tmp_path / "state"):
        for subject in (7, 8, 9):
            snapshots.save(tmp_path / "state", subject, tree)
        snapshots.remove(tmp_path / "state", lambda subject: subject == 9)
        subject, found = snapshots.restore(tmp_path / "state", lambda _: shapes)
        assert subject == 8
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert found["a"].dtype == tree["a"].dtype
        jax.tree.map(np.testing.assert_array_equal, found, tree)
        snapshots.remove(tmp_path / "state")
        assert snapshots.restore(tmp_path / "state", lambda _: shapes) is None


def test_closed_it_makes_no_more_samples(tmp_path, monkeypatch):
    """The sixth was being made."""
    monkeypatch.setattr(shards, "MADE_AT_ONCE", 1)
    monkeypatch.setattr(shards.snapshots, "save", lambda *given: None)  # closing waits for nothing
    made, ended = [], threading.Event()

    def slow(indices):
        made.extend(indices.tolist())
        if indices[0] == 5:
            ended.wait(60)
        return source(indices)

    steps = shards.refine(run_of(source=slow), tmp_path / "run", SETTINGS)
    for _ in range(2):
        next(steps)
    while made[-1] < 5:
        time.sleep(0.01)
    threading.Timer(1, ended.set).start()
    steps.close()
    assert made == [0, 1, 2, 3, 4, 5]


def test_the_state_of_what_is_done_may_be_damaged(finished, half):
    """It is there if the process was killed just before it removed it."""
    shutil.copytree(half / "state-0", half.parent / "state-0")
    stopped_after(3, half)
    assert (half / "samples" / "00001.json").exists()
    shutil.rmtree(half / "state-0")
    shutil.copytree(half.parent / "state-0", half / "state-0")
    for path in checkpoints(half):
        damage(path, "truncated")
    done(half)
    assert bits(half) == bits(finished[0])


def test_without_a_whole_state_it_says_what_to_do(finished, half):
    for path in checkpoints(half):
        damage(path, "truncated")
    warned = pytest.warns(UserWarning, match="it is left out")
    with warned, pytest.raises(ValueError, match=r"no state in .*state-0 is whole; remove that"):
        done(half)
    shutil.rmtree(half / "state-0")
    done(half)
    assert bits(half) == bits(finished[0])


def test_a_state_of_other_shapes_is_not_taken(half):
    other = run_of(experiment=Refinement(iterations=4))
    warned = pytest.warns(UserWarning, match="its arrays are others")
    with warned, pytest.raises(ValueError, match=r"no state in .* is whole"):
        snapshots.restore(half / "state-0", lambda number: other.state(other.shards[number]))


def test_a_manifest_that_disagrees_is_refused(finished, tmp_path):
    done(tmp_path / "run")
    for name in ("manifest.json", "metrics.jsonl"):
        path = tmp_path / "run" / name
        text = path.read_text()
        path.write_text(text.replace("10", "11", 1))
        with pytest.raises(ValueError, match=f"{name} does not agree with the files in samples/"):
            done(tmp_path / "run")
        path.unlink()
        done(tmp_path / "run")
        assert path.read_text() == text
    path = tmp_path / "run" / "samples" / "00001.npz"
    path.write_bytes(path.read_bytes() + b"!")
    found = shards.read(tmp_path / "run")
    next(found)
    with pytest.raises(ValueError, match=r"00001.npz is not the file that .*manifest.json descr"):
        next(found)


def test_the_example_of_the_page_reads_a_run(finished, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "large-runs.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.M)
    monkeypatch.chdir(finished[0].parent)
    names = {}
    exec(compile(example.replace('"DIR"', repr(finished[0].name)), "large-runs.md", "exec"), names)
    assert (names["images"].shape, names["solved"].shape) == ((2, 32, 32, 1), (2,))
    assert names["images"].dtype == np.float32


def test_nothing_is_read_of_a_run_that_is_not_finished(half):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        next(shards.read(half))
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        next(shards.read(half / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 0}, "shard_size must be a whole number of at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be uint8 or float32, got 'float16'"),
        ({"save_minutes": -1}, "save_minutes must be at least 0, got -1"),
        ({"save_minutes": float("nan")}, "save_minutes must be at least 0, got nan"),
    ],
)
def test_bad_storage_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Storage(**change)


# --- the command ----------------------------------------------------------------------------------

WORDS = (
    *IPR,
    "--samples",
    8,
    "--iterations",
    3,
    "--shard-size",
    4,
    "--save-minutes",
    0,
    "--seed",
    3,
)


def program(*words, **environment):
    pipe = subprocess.PIPE
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path.cwd())} | environment
    words = list(map(str, words))
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)


REFINE = (sys.executable, "-m", "ipr_jax", "refine")


def finals(folder):
    """Without what a killed process left."""
    return {name: digest for name, digest in bits(folder).items() if not name.startswith(".")}


@pytest.fixture(scope="module")
def commanded(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert call("refine", "--model", tiny_folder, *WORDS, "--out", folder)[0] == 0
    return folder


@pytest.mark.heavy
def test_sigterm_saves_and_ends_with_143(commanded, tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    words = ("--model", tiny_folder, *WORDS, "--out", folder)
    process = program(*REFINE, *words)
    while not list(folder.glob("state-0/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[1]) == (143, "compiling")
    assert err == f"terminated: started again with --out {folder}, it goes on\n"
    assert call("refine", *words)[0] == 0
    assert finals(folder) == finals(commanded)


FULL = ("bash", "-c", 'trap "" XFSZ; ulimit -f 10; exec "$0" "$@"')
"""No file can be larger than 10 KiB, as on a disk that is full."""


@pytest.mark.heavy
@pytest.mark.parametrize("save_minutes", [0, 60])  # a checkpoint or a file is too large
def test_a_full_disk_is_one_line_and_loses_nothing(commanded, tiny_folder, tmp_path, save_minutes):
    words = ("--model", tiny_folder, *WORDS, "--out", tmp_path / "run")
    stored = ("--save-minutes", save_minutes)
    process = program(*FULL, *REFINE, *words, *stored)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.splitlines()[1]) == (2, "compiling")
    assert "file too large" in err.lower()
    assert str(tmp_path / "run") in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list((tmp_path / "run" / "samples").iterdir())
    assert call("refine", *words, *stored)[0] == 0
    assert finals(tmp_path / "run") == finals(commanded)


def test_a_folder_that_cannot_be_written_to_is_one_line(tiny_folder, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(30, "Read-only file system", str(tmp_path / "run"))

    monkeypatch.setattr(shards.Path, "mkdir", refuse)
    code, out, err = call("refine", "--model", tiny_folder, *WORDS, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err == f"error: [Errno 30] Read-only file system: '{tmp_path / 'run'}'\n"


def kill(times, command, finish, folder):
    """Kill runs of a command at random moments; each goes on until it finishes.

    Args:
        times: how often, in all, at least.
        command: its words, but for the folder of the run.
        finish: called with the folder of every finished run.
        folder: of all runs, and of the programs that the first one compiles.
    """
    cached = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(folder)}
    cached["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    rng, kills, longest = random.Random(0), 0, 0.0
    for number in itertools.count():
        out, begun = folder / f"run-{number}", time.monotonic()
        while True:  # the first compiles, the second tells how long a run is
            process = program(*command, out, **cached)
            try:
                _, err = process.communicate(timeout=rng.uniform(1, longest) if longest else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        assert (process.returncode, err) == (0, "")
        finish(out)
        if kills >= times:
            return
        if number == 1:
            longest = time.monotonic() - begun


@pytest.mark.heavy
def test_killed_at_random_moments(commanded, tiny_folder, tmp_path, pytestconfig):
    def finish(folder):
        assert finals(folder) == finals(commanded)

    times = pytestconfig.getoption("kills")
    kill(times, (*REFINE, "--model", tiny_folder, *WORDS, "--out"), finish, tmp_path)


@pytest.mark.heavy
def test_training_killed_at_random_moments(tmp_path, pytestconfig):
    list(train(tmp_path / "whole"))
    want = trained(tmp_path / "whole")

    def finish(folder):
        assert trained(folder) == want

    command = (sys.executable, Path(__file__).parents[1] / "small_run.py")
    kill(pytestconfig.getoption("kills"), command, finish, tmp_path)
