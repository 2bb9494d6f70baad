"""Strict settings for every test, and the recorded behaviour of the published code."""

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # commands keep programs in the user's home
# Most of a test is compilation: these save 60% of it. XLA_FLAGS= leaves XLA as users have it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import settings

settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")
jax.config.update("jax_traceback_in_locations_limit", 0)  # pytest's stack, for every operation
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

from convert import mapping, srm, torch_file  # noqa: E402
from ipr_jax import SRM, ModelConfig  # noqa: E402
from ipr_jax.cli import main as cli  # noqa: E402
from ipr_jax.cli import terminal  # noqa: E402
from ipr_jax.methods import Refinement, engine  # noqa: E402
from ipr_jax.models import checkpoint  # noqa: E402
from ipr_jax.models.networks import build  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
PREFIXES = {"ema": "ema_denoiser.module.", "raw": "denoiser."}

IPR = ("--task", "mini-sudoku", "--method", "ipr")
"""The paper's refinement of small boards, for `ipr-jax refine`."""

FEW = ("--first-steps-per-patch", 1, "--steps-per-patch", 1)
SHORT = ("--samples", 3, "--iterations", 2, *FEW)
"""A refinement that is soon over, for the commands that refine."""

TINY = ModelConfig(
    image_size=(32, 32),
    channels=1,
    patch_size=8,
    widths=(8,),
    attention=(False,),
    num_blocks=1,
    time_width=8,
    num_frequencies=8,
    head_width=8,
    num_groups=4,
    dropout=0.0,
)
"""The smallest architecture for mini-sudoku images."""


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def golden_config(name: str) -> ModelConfig:
    described = json.loads((GOLDEN / name / "config.json").read_text())
    return ModelConfig(
        image_size=tuple(described["image_shape"]),
        channels=described["channels"],
        patch_size=described["patch_size"],
        widths=tuple(described["hid_dims"]),
        attention=tuple(described["attention"]),
        num_blocks=described["num_blocks"],
        time_width=described["t_emb_dim"],
        num_frequencies=described["d_emb"],
        head_width=described["num_head_channels"],
    )


def tensors_of(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors of a checkpoint whose names begin with a prefix, which is cut."""
    states = torch_file.outline(path).states
    state = ("state_dict",) if ("state_dict",) in states else ()
    names = [name for name in states[state] if name.startswith(prefix)]
    read = torch_file.state_dict(path, state, names).items()
    return {name.removeprefix(prefix): a for name, a in read if isinstance(a, np.ndarray)}


def golden_model(name: str, weights: str) -> SRM:
    tensors = tensors_of(GOLDEN / name / "last.ckpt", PREFIXES[weights])
    config = golden_config(name)
    abstract = nnx.eval_shape(lambda: build(config))
    return mapping.fill(abstract, srm.table(config), tensors)


def nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -3, -1))


def call(*words: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output and standard error.

    However long it takes, it does not say how far it is.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ipr-jax", *map(str, words)])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(terminal, "QUIET_SECONDS", math.inf)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def browsed(path: Path) -> Iterator[Any]:
    """A page from disk in Chromium, of playwright or the one that ``IPR_BROWSER`` names (see
    CONTRIBUTING.md); it says nothing to the console and asks the network for nothing.
    """
    from playwright.sync_api import sync_playwright

    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("IPR_BROWSER"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda asked: said.append(asked.url) if "http" in asked.url else None)
        tab.goto(path.as_uri())
        yield tab
        browser.close()
    assert said == []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="how often -k killed kills each run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the gate runs is heavy; the longest begin first, so that no worker waits in the end."""
    for item in items:
        if item.get_closest_marker("gate"):
            item.add_marker("heavy")
    first = ("test_on_eight_devices", "test_two_processes")
    items.sort(key=lambda item: not ("heavy" in item.keywords and item.name.startswith(first)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: ``TINY`` with random weights, none of them 0."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32))

    abstract = nnx.state(nnx.eval_shape(lambda: build(TINY)))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(folder, TINY, jax.tree.map(draw, abstract), {"made": "at random"})
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> SRM:
    return checkpoint.load(tiny_folder)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[int, str, str]]:
    """A finished run of `ipr-jax refine`: its folder and what the command said."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run :smile:"
    words = ("--seed", 4, "--dtype", "float32", "--out", folder)
    return folder, call("refine", *IPR, "--model", tiny_folder, *SHORT, *words)


def regenerate(denoise, keys, z, region, sampling):
    """A first pass over a region of noisy images: the state of the engine after it."""
    method = Refinement(iterations=0, first=sampling).on(region.shape[1:])
    problem = engine.Problem(keys, jnp.asarray(z), jnp.asarray(region))

    @jax.jit
    def run(method, problem):
        state = method.init(problem)._replace(z=problem.image)
        return engine.advance(denoise, method, problem, engine.at_once(state)).state

    return run(method, problem)
