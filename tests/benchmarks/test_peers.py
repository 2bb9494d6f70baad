"""The benchmark against the published sampler, as far as it goes without PyTorch."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, nhwc

from benchmarks import peers, published
from benchmarks.peers import Args
from ipr_jax.sampling.schedule import make_plan

ROOT = Path(__file__).parents[2]
ROUND = {
    "sampler": {"published": 0.9, "tuned": 0.3, "ours": 0.1},
    "network": {"published": 0.6, "tuned": 0.24, "ours": 0.2},
}
OPERATIONS = {"published": 8 * 10**9, "tuned": 5 * 10**9, "ours": 4 * 10**9}


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


def test_the_factors_are_what_they_are_called_and_multiply():
    for side, expected in {
        "published": {"sampler": 9, "network": 3, "arithmetic": 2, "rate": 1.5, "around": 3},
        "tuned": {"sampler": 3, "network": 1.2, "arithmetic": 1.25, "rate": 0.96, "around": 2.5},
    }.items():
        found = peers.factors(ROUND, OPERATIONS, side)
        assert found == pytest.approx(expected)
        assert found["sampler"] == pytest.approx(found["network"] * found["around"])
        assert found["network"] == pytest.approx(found["arithmetic"] * found["rate"])


def test_ratios_are_taken_within_a_round():
    """The second round ran on a machine half as fast, which no ratio shows."""
    slow = {what: {side: 2 * took for side, took in sides.items()} for what, sides in ROUND.items()}
    found = peers.summarise([ROUND, slow, ROUND], OPERATIONS)
    for side in peers.SIDES:
        for name, value in peers.factors(ROUND, OPERATIONS, side).items():
            assert found["times_as_fast"][side][name] == pytest.approx(
                dict.fromkeys(("median", "min", "max"), value)
            )
    for what, sides in ROUND.items():
        for side, took in sides.items():
            assert found["seconds_per_evaluation"][what][side] == pytest.approx(
                {"median": took, "min": took, "max": 2 * took}
            )


def test_the_results_can_be_shown(capsys):
    result = {
        "arguments": {"batch": 8},
        "clones": {"ipr": None, "different_files": ["wrapper.py"]},
        "evaluations_per_sample": 10,
        "flops_per_evaluation": OPERATIONS,
        "largest_difference": {
            "published": {"sigma": 1e-6, "velocity": 2e-6},
            "tuned": {"sigma": 3e-6, "velocity": 1e-6},
        },
        "load_per_core": 0.1,
    }
    peers.show(result | peers.summarise([ROUND], OPERATIONS))
    shown = capsys.readouterr().out
    assert re.search(r"PyTorch tuned, sampler, batch 1 +300\.00 +300\.00 +300\.00", shown)
    assert re.search(r"PyTorch tuned, network, batch 8 +240\.00 ", shown)
    assert re.search(r"ipr_jax, sampler, batch 8 +100\.00 ", shown)
    published, tuned = shown.split("ipr_jax is faster than ")[1:]
    assert re.search(
        r"^PyTorch as published by\s+median.*\n sampler, batch 8 against 1 +9\.00 ", published
    )
    assert re.search(r" = network, batch 8 +3\.00 ", published)
    assert "8.000 to 4.000 GFLOP" in published
    assert re.search(r"^PyTorch tuned by\s+median.*\n sampler, batch 8 against 1 +3\.00 ", tuned)
    assert re.search(r" = network, batch 8 +1\.20 ", tuned)
    assert "5.000 to 4.000 GFLOP" in tuned
    assert "differ by 2.0e-06, tuned by 3.0e-06" in shown
    assert "src/model: wrapper.py" in shown


# --- both sides do the same -----------------------------------------------------------------------


def twin(model, error):
    """Answers as a published network would that is off by ``error``."""

    def ask(do, side, given, out):
        assert (do, side) == ("predict", "tuned")
        with np.load(given) as file:
            z, t = file["z"], file["t"]
        size = TINY.patch_size
        found = model(jnp.asarray(nhwc(z)), jnp.asarray(t[:, ::size, ::size]))
        sigma = np.asarray(found.sigma).repeat(size, 1).repeat(size, 2)[:, None]
        arrays = {
            "velocity": np.moveaxis(np.asarray(found.velocity), -1, 1) + error,
            "variance_fraction": np.moveaxis(np.asarray(found.variance_fraction), -1, 1),
            "sigma": sigma,
        }
        np.savez(out, allow_pickle=False, **arrays)
        return {}

    return ask


def test_predictions_must_agree_before_anything_is_timed(tiny_model, tmp_path):
    found = peers.check_agreement(tiny_model, twin(tiny_model, 0), "tuned", 2, tmp_path)
    assert max(found.values()) < 1e-6
    for error in (1e-3, np.nan):
        ask = twin(tiny_model, error)
        with pytest.raises(
            ValueError, match=r"must agree within 0.0001, tuned and ours differ by .*velocity"
        ):
            peers.check_agreement(tiny_model, ask, "tuned", 2, tmp_path)


class Denoiser:
    """Embeds as the published one does: in every block, at the resolution of the block."""

    def __init__(self):
        self.embedded = []
        self.time_embedding = SimpleNamespace(forward=self.embed)

    def embed(self, t):
        self.embedded.append(t.size)
        return np.cos(t)

    def forward(self, x, t):
        for step in (1, 2, 2, 1):
            x = x + self.time_embedding.forward(t[::step]).sum()
        return x


def test_noise_levels_are_embedded_once_per_resolution_and_evaluation(rng):
    plain, memoised = Denoiser(), Denoiser()
    published.memoise(memoised)
    for t in rng.random((2, 8)):
        assert memoised.forward(0.5, t) == plain.forward(0.5, t)
    assert plain.embedded == [8, 4, 4, 8] * 2
    assert memoised.embedded == [8, 4] * 2


def test_random_weights_predict_something():
    model = peers.random_model(TINY, jnp.float32)
    found = model(jnp.zeros((1, *TINY.image_shape)), jnp.full((1, *TINY.grid), 0.5))
    assert all(float(jnp.abs(array).min()) > 0 for array in found)


def test_what_is_timed_takes_the_evaluations_of_its_plan(tiny_model):
    args = Args(ipr=Path(), batch=2, iterations=3, steps_per_patch=2, overlap=0.5, ratio=0.25)
    image, evaluations = peers.sampler_of(tiny_model, args)()
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
        peers.start(python, tmp_path / "log") as ask,
    ):
        ask(**job)


def test_a_python_that_is_none_is_refused(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="nowhere"),
        peers.start(tmp_path / "nowhere", tmp_path / "log"),
    ):
        pass


# --- the files ------------------------------------------------------------------------------------


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
