"""The benchmark against the published sampler, as far as it goes without PyTorch."""

import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, nhwc

from benchmarks import peers
from benchmarks.peers import Args, Round
from ipr_jax.schedule import make_plan

ROOT = Path(__file__).parents[1]
ROUND = Round(theirs=0.9, their_network=0.6, ours=0.1, ours_alone=0.25, our_network=0.2)


@pytest.fixture
def clone(tmp_path):
    """A folder with the files that tell a clone, all empty."""
    for name in (*peers.NEEDED["ipr"], *peers.NEEDED["srm"]):
        path = tmp_path / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "clone"


@pytest.fixture
def python(tmp_path):
    """A Python without PyTorch, whether there is one here or not."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    path.chmod(0o755)
    return path


# --- what the numbers say -------------------------------------------------------------------------


def test_the_factors_are_what_they_are_called_and_multiply_to_the_total():
    found = peers.factors(ROUND, their_flops=800, our_flops=400)
    expected = {"total": 9, "arithmetic": 2, "rate": 1.5, "loop": 1.2, "batching": 2.5}
    assert found == pytest.approx(expected)
    assert found.pop("total") == pytest.approx(math.prod(found.values()))


def test_ratios_are_taken_within_a_round():
    """The second round ran on a machine half as fast, which no ratio shows."""
    slow = Round(*(2 * value for value in ROUND))
    found = peers.summarise([ROUND, slow, ROUND], 10, 800, 400)
    for name, value in peers.factors(ROUND, 800, 400).items():
        assert found["factors"][name] == pytest.approx(
            dict.fromkeys(("median", "min", "max"), value)
        )
    per = found["seconds_per_evaluation"]
    assert per["theirs"] == pytest.approx({"median": 0.9, "min": 0.9, "max": 1.8})
    assert found["seconds_per_sample"]["ours"] == pytest.approx({"median": 1, "min": 1, "max": 2})
    beside = found["beside_the_network"]
    assert beside["theirs"] == pytest.approx({"median": 0.3, "min": 0.3, "max": 0.6})
    assert beside["ours_alone"] == pytest.approx({"median": 0.05, "min": 0.05, "max": 0.1})
    assert found["share_of_arithmetic"]["median"] == pytest.approx(math.log(2) / math.log(9))


def test_there_are_no_shares_of_a_loss():
    lost = ROUND._replace(ours=1.0)
    assert peers.summarise([ROUND, lost], 10, 800, 400)["share_of_arithmetic"] is None


def test_the_results_can_be_shown(capsys):
    result = {
        "arguments": {"batch": 8},
        "clones": {"ipr": None, "different_files": ["wrapper.py"]},
        "evaluations_per_sample": 10,
        "flops_per_evaluation": {"theirs": 8e9, "ours": 4e9},
        "warm_up_seconds": {"ours": 3.0},
        "largest_difference": {"sigma": 1e-6, "velocity": 2e-6},
        "load_per_core": 0.1,
    }
    peers.show(result | peers.summarise([ROUND], 10, 8 * 10**9, 4 * 10**9))
    shown = capsys.readouterr().out
    assert re.search(r"ipr_jax is faster by +9\.00 +9\.00 +9\.00", shown)
    assert "8.000 to 4.000 GFLOP" in shown
    assert "differ by 2.0e-06" in shown
    assert "src/model: wrapper.py" in shown


# --- both sides do the same -----------------------------------------------------------------------


class Twin:
    """Answers as the published network would that is off by ``error``."""

    def __init__(self, model, error):
        self.model, self.error = model, error

    def ask(self, do, given, out):
        assert do == "predict"
        with np.load(given) as file:
            z, t = file["z"], file["t"]
        size = TINY.patch_size
        found = self.model(jnp.asarray(nhwc(z)), jnp.asarray(t[:, ::size, ::size]))
        sigma = np.asarray(found.sigma).repeat(size, 1).repeat(size, 2)[:, None]
        arrays = {
            "velocity": np.moveaxis(np.asarray(found.velocity), -1, 1) + self.error,
            "variance_fraction": np.moveaxis(np.asarray(found.variance_fraction), -1, 1),
            "sigma": sigma,
        }
        np.savez(out, allow_pickle=False, **arrays)
        return {}


def test_predictions_must_agree_before_anything_is_timed(tiny_model, tmp_path):
    found = peers.check_agreement(tiny_model, Twin(tiny_model, 0), tmp_path)
    assert max(found.values()) < 1e-6
    for error in (1e-3, np.nan):
        with pytest.raises(
            ValueError, match=r"must agree within 0.0001, they differ by .*velocity"
        ):
            peers.check_agreement(tiny_model, Twin(tiny_model, error), tmp_path)


def test_random_weights_predict_something():
    model = peers.random_model(TINY, jnp.float32)
    found = model(jnp.zeros((1, *TINY.image_shape)), jnp.full((1, *TINY.grid), 0.5))
    assert all(float(jnp.abs(array).min()) > 0 for array in found)


def test_what_is_timed_takes_the_evaluations_of_its_plan(tiny_model):
    args = Args(ipr=Path(), iterations=3, steps_per_patch=2, overlap=0.5, ratio=0.25)
    image, evaluations = peers.sampler_of(tiny_model, args, 2)()
    steps = make_plan(16, 2, 0.5).num_steps
    assert image.shape == (2, *TINY.image_shape)
    assert evaluations == steps[16] + 3 * steps[4]


# --- refusals -------------------------------------------------------------------------------------


def test_a_clone_must_have_its_files(clone):
    peers.check_clone(clone, "ipr")
    for name in peers.NEEDED["ipr"]:
        (clone / name).rename(clone / "away")
        with pytest.raises(FileNotFoundError, match=f"--ipr must .* {clone} has no {name}"):
            peers.check_clone(clone, "ipr")
        (clone / "away").rename(clone / name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "mini-sudoku"}, "unknown preset 'mini-sudoku'; known: even-pixels, "),
        ({"batch": 0}, "batch"),
        ({"iterations": 0}, "iterations"),
        ({"repeats": 0}, "repeats"),
        ({"ratio": 0.0}, "ratio must be in"),
        ({"dtype": "bfloat16"}, "dtype must be float32, or bfloat16 on a GPU"),
        ({"busy": False}, r"load average per core must be at most 0.5 .* it is 3.0; .* --busy"),
    ],
)
def test_what_cannot_be_measured_is_refused(clone, monkeypatch, given, message):
    monkeypatch.setattr(peers.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(peers, "load_per_core", lambda: 3.0)
    good = Args(ipr=clone, srm=clone, busy=True)
    assert peers.check_args(good) == "cpu"
    with pytest.raises(ValueError, match=message):
        peers.check_args(dataclasses.replace(good, **given))


def test_nothing_is_overwritten(clone, tmp_path):
    out = tmp_path / "out.json"
    out.write_text("kept")
    with pytest.raises(FileExistsError):
        peers.main(Args(ipr=clone, busy=True, out=out))
    assert out.read_text() == "kept"


def test_a_missing_clone_ends_the_command_with_one_line(tmp_path):
    run = [sys.executable, "-m", "benchmarks.peers", "--ipr", str(tmp_path / "gone")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --ipr must be a clone of .*/gone has no src/.*\n", done.stderr)


def test_without_pytorch_it_says_so(clone, python, tmp_path):
    job = {"repository": str(clone), "device": "cpu", "dtype": "float32"}
    with (
        pytest.raises(ChildProcessError, match=rf"not run in {python}: .*torch.*requirements\.txt"),
        peers.faster_peer(python, job, tmp_path, calls=1),
    ):
        pass


def test_a_python_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        peers.Peer(tmp_path / "nowhere", tmp_path / "log", passive=True)


# --- the files ------------------------------------------------------------------------------------


def test_both_files_can_be_imported_without_pytorch():
    code = "import sys, benchmarks.peers, benchmarks.published; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_every_option_is_read_and_explained():
    source, described = inspect.getsource(peers), inspect.getdoc(Args) or ""
    for field in dataclasses.fields(Args):
        assert f"args.{field.name}" in source
        assert f"\n    {field.name}: " in described


def test_the_other_process_needs_nothing_of_this_project():
    text = (ROOT / "benchmarks" / "published.py").read_text()
    assert not re.findall(
        r"^(?:from|import) (?:ipr_jax|convert|benchmarks|jax)", text, re.MULTILINE
    )
