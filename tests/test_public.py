"""All that is public: under JAX's settings, under its transformations, and with bad arguments."""

import contextlib
import dataclasses
import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import ipr_jax
from ipr_jax import SRM, Prediction, Refined, Sampled, Sampling, Streamed
from ipr_jax.core import patches
from ipr_jax.core.keys import rngs
from ipr_jax.methods import scores, stopping
from ipr_jax.models import Model

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (2, 4, 4, 1)).astype(np.float32)
EDITABLE = np.array([[[1, 0], [1, 1]], [[0, 0], [0, 1]]], bool)
LEVELS = tuple(RNG.random((3, 2, 2, 2)).astype(np.float32))
"""Sigma, uniform numbers and noise levels, for the orders."""
WEIGHT = np.float32(0.9)
FEW = Sampling(steps_per_patch=2, overlap=0.5)


def scaled(weight, z, t):
    """A denoiser with one weight."""
    patch = z.shape[1] // t.shape[1]
    velocity = weight * z * patches.expand(t, patch) + 0.1
    sigma = 0.1 + patches.patch_mean(jnp.abs(z[..., 0]), patch)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), sigma)


def bound(weight):
    return jax.tree_util.Partial(scaled, weight)


def brightness(image):
    return image.mean(axis=(1, 2, 3))


def is_bright(image):
    return brightness(image) > 0


STOP = stopping.verified(is_bright)
ANNEALED = ipr_jax.Annealed(iterations=2, cycles=2, finish_steps=2)


def bright(image, level, prediction):
    return brightness(image)


PARTICLES = ipr_jax.Particles.of(
    "bfs",
    scores.verifier(bright, "independent"),
    particles=2,
    sampling=Sampling(steps_per_patch=1, overlap=1.0),
)


def new_keys():
    return ipr_jax.sample_keys(jax.random.key(0), 2)


def generate(weight, keys, image, editable, sampling=FEW, **options):
    return ipr_jax.generate(bound(weight), keys, image, editable, sampling, **options)


def refine(weight, keys, image, editable, **options):
    options = {"iterations": 2, "sampling": FEW, "record": brightness} | options
    return ipr_jax.refine(bound(weight), keys, image, editable, **options)


def stream(weight, keys, image, editable, **options):
    options = {"iterations": 2, "slots": 2, "first": FEW, "later": FEW, "stop": STOP} | options
    return ipr_jax.stream(bound(weight), keys, image, editable, **options)


def solve(weight, keys, image, editable, **options):
    method = ipr_jax.Refinement(iterations=2, first=FEW, later=FEW, stop=STOP)
    return ipr_jax.solve(bound(weight), keys, image, editable, method=method, slots=2, **options)


DRIVERS = {"generate": generate, "refine": refine, "stream": stream, "solve": solve}


def network():
    """A prediction of a model with clues, and its weights, drawn by NumPy."""
    config = TINY.__dict__ | {"image_size": (4, 4), "patch_size": 4, "concat_clues": True}
    made = nnx.eval_shape(lambda: SRM(ipr_jax.ModelConfig(**config), rngs=rngs(0)))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), made)
    denoise = ipr_jax.condition_on(model, IMAGE, EDITABLE)
    return jax.jit(denoise)(IMAGE, LEVELS[0][:, :1, :1]), jax.tree.leaves(model)


def transformer():
    """A prediction of a transformer whose weights were drawn by NumPy."""
    config = ipr_jax.TransformerConfig(
        image_size=(4, 4), channels=1, patch_size=2, width=8, num_layers=1, num_heads=2
    )
    made = nnx.eval_shape(lambda: ipr_jax.PatchTransformer(config, rngs=rngs(0)))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), made)
    return jax.jit(model)(IMAGE, LEVELS[0]), jax.tree.leaves(model)


def repainted():
    denoise = ipr_jax.repaint(bound(WEIGHT), IMAGE, EDITABLE, IMAGE[::-1])
    return denoise(IMAGE, LEVELS[0][:, :1, :1])


def compiled():
    found = ipr_jax.compile(ipr_jax.generate, bound(WEIGHT), IMAGE.shape, (2, 2), sampling=FEW)
    assert isinstance(found, ipr_jax.Compiled)
    assert isinstance(found.memory, ipr_jax.Memory)
    return found.memory.outputs


def arguments():
    return WEIGHT, new_keys(), IMAGE, EDITABLE


USES = {
    "FIRST_PASS": lambda: ipr_jax.FIRST_PASS.settings(4),
    "REFINEMENT": lambda: ipr_jax.REFINEMENT.settings(4),
    "PRESETS": lambda: [config.image_size for config in ipr_jax.PRESETS.values()],
    "Sampling": lambda: Sampling(stochasticity=jnp.float32(0.3), overlap=np.float32(0.5)).settings(
        4
    ),
    "Compiled, Memory, compile": compiled,
    "SRM, ModelConfig, condition_on": network,
    "TRANSFORMERS": lambda: [config.grid for config in ipr_jax.TRANSFORMERS.values()],
    "PatchTransformer, TransformerConfig": transformer,
    "Denoiser, Prediction, repaint": repainted,
    "Sampled, generate": lambda: generate(*arguments()),
    "Refined, refine": lambda: refine(*arguments()),
    "Streamed, stream": lambda: stream(*arguments()),
    "Annealed": lambda: ipr_jax.solve(bound(WEIGHT), *arguments()[1:], method=ANNEALED),
    "Particles": lambda: ipr_jax.solve(bound(WEIGHT), *arguments()[1:], method=PARTICLES),
    "Refinement, Solved, solve": lambda: solve(*arguments()),
    "doubts": lambda: ipr_jax.doubts(bound(WEIGHT), *arguments()[1:3], grid=(2, 2)),
    "sample_keys": lambda: jax.random.key_data(
        ipr_jax.sample_keys(jax.random.key(0), 4, first=2**32 - 4)
    ),
    "data_mesh": lambda: ipr_jax.data_mesh().size,
    "load": lambda: jax.tree.leaves(ipr_jax.load("mini-sudoku"))[:3],
    "certain_first": lambda: ipr_jax.certain_first(*LEVELS),
    "uncertain_first": lambda: ipr_jax.uncertain_first(*LEVELS),
    "random_order": lambda: ipr_jax.random_order(*LEVELS),
    "raster_order": lambda: ipr_jax.raster_order(*LEVELS),
    "graph_order": lambda: ipr_jax.graph_order(np.ones((4, 4)))(*LEVELS),
    "fixed_regions": lambda: ipr_jax.fixed_regions(new_keys(), 2, (2, 2)),
    "fresh_regions": lambda: ipr_jax.fresh_regions(new_keys(), 2, (2, 2)),
    "fresh_noise": lambda: ipr_jax.fresh_noise(new_keys(), 2, (4, 4, 1)),
    "initial_noise": lambda: ipr_jax.initial_noise(new_keys(), 2, (4, 4, 1)),
}
"""What is public, once each."""


# --- JAX's settings -------------------------------------------------------------------------------


@contextlib.contextmanager
def promoting():
    """As users have JAX; the tests are run with every promotion of shapes and dtypes an error."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def without_nan():
    with promoting(), jax.debug_nans(True):
        yield


SETTINGS = {
    "64 bits, no promotion": lambda: jax.enable_x64(True),
    "nothing compiled, no promotion": jax.disable_jit,
    "no nan": without_nan,
}


@pytest.fixture(scope="module")
def plain():
    with promoting():
        return {name: use() for name, use in USES.items()}


def test_every_public_name_is_used():
    names = [name for names in USES for name in names.split(", ")]
    assert sorted(names) == sorted(ipr_jax.__all__)


SLOW = "nothing compiled, no promotion"


@pytest.mark.parametrize(
    "setting",
    [*sorted(SETTINGS.keys() - {SLOW}), pytest.param(SLOW, marks=pytest.mark.heavy)],
)
def test_results_and_their_dtypes_do_not_depend_on_the_settings(setting, plain):
    with SETTINGS[setting]():
        found = {name: use() for name, use in USES.items()}
    for name, want in plain.items():
        got = jax.tree.leaves(found[name])
        for one, other in zip(got, jax.tree.leaves(want), strict=True):
            assert jnp.shape(one) == jnp.shape(other), name
            assert getattr(one, "dtype", type(one)) == getattr(other, "dtype", type(other)), name
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("function", "result"),
    [
        (ipr_jax.generate, Sampled),
        (ipr_jax.refine, Refined),
        (ipr_jax.stream, Streamed),
        (ipr_jax.compile, ipr_jax.Compiled),
        (ipr_jax.load, Model),
        (ipr_jax.data_mesh, Mesh),
        (ipr_jax.sample_keys, jax.Array),
    ],
)
def test_signatures_tell_what_is_returned(function, result, plain):
    assert inspect.signature(function).return_annotation is result
    assert function.__annotations__["return"] is result
    if function.__name__ in DRIVERS:
        assert type(plain[f"{result.__name__}, {function.__name__}"]) is result


# --- JAX's transformations ------------------------------------------------------------------------

MESH = ipr_jax.data_mesh(jax.devices()[:1])
SPECS = (PartitionSpec(), *[PartitionSpec("data")] * 3)
SUBSETS = [(), (0,), (1,), (2,), (3,), (0, 1, 2, 3)]
"""Which of weight, keys, images and masks are traced; the others are closed over."""


@pytest.mark.parametrize("name", DRIVERS)
def test_any_of_the_arrays_may_be_traced(name, plain):
    """By ``jit``, and by ``shard_map`` as it is by default."""
    (want,) = (found for names, found in plain.items() if names.endswith(f", {name}"))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), want.image)
    for subset in SUBSETS:
        whole = list(arguments())

        def call(*traced, subset=subset, whole=whole):
            given = dict(enumerate(whole)) | dict(zip(subset, traced, strict=True))
            return DRIVERS[name](*given.values()).image

        specs = tuple(SPECS[place] for place in subset)
        mapped = jax.shard_map(call, mesh=MESH, in_specs=specs, out_specs=SPECS[1])
        for function in (call, mapped):
            found = jax.eval_shape(function, *(whole[place] for place in subset))
            assert (found.shape, found.dtype) == shapes


NUMBERS = {
    "generate": lambda n: {
        "sampling": dataclasses.replace(FEW, stochasticity=n / 4, temperature=n)
    },
    "refine": lambda n: {"start": n},
}
"""Numbers of these drivers that may be traced."""


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_traced_changes_no_value(name):
    """Keys by ``jit`` and ``shard_map``, weights and numbers by ``vmap``; images are constants."""
    weights, numbers = jnp.array([0.9, 0.5]), jnp.array([1, 2])

    def one(keys, weight, number):
        return DRIVERS[name](weight, keys, IMAGE, EDITABLE, **NUMBERS[name](number)).image

    @jax.jit
    @partial(jax.shard_map, mesh=MESH, in_specs=SPECS[1], out_specs=PartitionSpec(None, "data"))
    def both(keys):
        return jax.vmap(partial(one, keys))(weights, numbers)

    with promoting():
        found = both(new_keys())
        for got, weight, number in zip(found, weights, numbers, strict=True):
            np.testing.assert_allclose(got, one(new_keys(), weight, number), atol=2e-6)


def test_keys_of_a_traced_index():
    key = jax.random.key(3)
    found = jax.jit(lambda first: ipr_jax.sample_keys(key, 2, first=first))(5)
    assert (found == ipr_jax.sample_keys(key, 7)[5:]).all()


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("ratio", lambda n: refine(*arguments(), ratio=n)),
        ("iterations", lambda n: refine(*arguments(), iterations=n)),
        ("slots", lambda n: stream(*arguments(), slots=n)),
        ("overlap", lambda n: Sampling(overlap=n)),
        ("steps_per_patch", lambda n: Sampling(steps_per_patch=n)),
        ("max_steps", lambda n: Sampling(max_steps=n)),
        ("top_k", lambda n: Sampling(top_k=n)),
        ("num_samples", lambda n: ipr_jax.sample_keys(jax.random.key(0), n)),
        ("decay", lambda n: ipr_jax.graph_order(np.eye(2), decay=n)),
    ],
)
def test_numbers_that_cannot_be_traced_say_so(name, use):
    with pytest.raises(ValueError, match=f"{name} must be known before the program is traced"):
        jax.eval_shape(use, 1)


def test_a_traced_graph_is_refused():
    with pytest.raises(ValueError, match="dependencies cannot be traced"):
        jax.eval_shape(lambda graph: ipr_jax.graph_order(graph)(*LEVELS), np.eye(4))


def test_derivatives_are_those_of_forward_mode():
    def loudness(weight):
        return (generate(weight, *arguments()[1:]).image ** 2).mean()

    weight, step = jnp.float32(0.9), jnp.float32(0.01)
    with promoting():
        _, slope = jax.jvp(loudness, (weight,), (jnp.float32(1),))
        around = [loudness(weight + sign * step) for sign in (1, -1)]
        np.testing.assert_allclose(slope, (around[0] - around[1]) / (2 * step), rtol=2e-3)
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            jax.grad(loudness)(weight)


# --- bad arguments --------------------------------------------------------------------------------


def never(z, t):
    raise AssertionError("traced")


def driven(driver=ipr_jax.refine, **change):
    given = {"denoise": never, "keys": new_keys(), "image": IMAGE, "editable": EDITABLE}
    options = {} if driver is ipr_jax.generate else {"iterations": 1}
    return driver(**given | options | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoise": None}, r"denoise must be a function \(z, t\) -> Prediction, got None"),
        ({"keys": None}, r"keys must be a key array \[2\], .* from sample_keys; got None"),
        ({"keys": [0, 1]}, "from sample_keys; got a list"),
        ({"image": None}, r"image must be float32 \[B, H, W, C\], B at least 1, got None"),
        ({"image": IMAGE.tolist()}, "image must be float32 .* got a list"),
        ({"editable": None}, r"editable must be bool \[B, h, w\], got None"),
        ({"editable": EDITABLE.tolist()}, "editable must be bool .* got a list"),
        ({"mesh": "cpu"}, "mesh must be None or from data_mesh, got 'cpu'"),
    ],
)
@pytest.mark.parametrize("driver", [ipr_jax.generate, ipr_jax.refine, ipr_jax.stream])
def test_arguments_of_another_type_are_refused_by_every_driver(driver, change, message):
    with pytest.raises(ValueError, match=message):
        driven(driver, **change)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: driven(ratio="half"), r"ratio must be in \(0, 1\], got 'half'"),
        (lambda: driven(ratio=[0.5]), r"ratio must be in \(0, 1\], got a list"),
        (lambda: driven(ratio=np.array([0.5])), r"ratio must be in .* got float64 \[1\]"),
        (lambda: driven(iterations=None), "iterations must be a whole number of .* got None"),
        (lambda: driven(iterations=2**31), "iterations must be below 2147483648, got 2147483648"),
        (lambda: driven(start=2**31 - 1), "start must be below 2147483647, got 2147483647"),
        (lambda: driven(sampling=None), "sampling must be of type Sampling, got None"),
        (lambda: driven(select="fresh"), r"select must be a function \(keys, .* got 'fresh'"),
        (lambda: driven(noise=None), r"noise must be a function \(keys, .* got None"),
        (lambda: driven(record=3), "record must be a function image -> arrays, got 3"),
        (
            lambda: driven(ipr_jax.generate, sampling="x"),
            "sampling must be of type Sampling, got 'x'",
        ),
        (lambda: driven(ipr_jax.stream, first=1), "first must be of type Sampling, got 1"),
        (lambda: driven(ipr_jax.stream, later=None), "later must be of type Sampling, got None"),
        (lambda: driven(ipr_jax.stream, stop=0), r"stop must be a function \(iteration, .* got 0"),
        (lambda: driven(ipr_jax.stream, slots="all"), "at least 1 or \"auto\", got 'all'"),
        (lambda: Sampling(order="certain"), r"order must be a function \(sigma, .* got 'certain'"),
        (lambda: Sampling(overlap=None), r"overlap must be in \[0, 1\], got None"),
        (lambda: Sampling(stochasticity="low"), r"stochasticity must be in \[0, 1\], got 'low'"),
        (lambda: Sampling(temperature=jnp.ones(2)), r"temperature must be .* got float32 \[2\]"),
        (lambda: Sampling(max_steps=2**31), "max_steps must be below 2147483648"),
        (
            lambda: Sampling(steps_per_patch=2**31 - 1).settings(9),
            "the steps of a pass must be below 2147483648",
        ),
        (lambda: ipr_jax.sample_keys(None, 2), "key must come from jax.random.key, got None"),
        (lambda: ipr_jax.sample_keys(new_keys(), 2), r"jax.random.key, got key<fry> \[2\]"),
        (
            lambda: ipr_jax.sample_keys(jax.random.key(0), 2, first=2**32),
            "first must be below 4294967295, got 4294967296",
        ),
        (
            lambda: ipr_jax.sample_keys(jax.random.key(0), 2, first=2**32 - 1),
            "first must be below 4294967295, got 4294967295",
        ),
        (lambda: ipr_jax.data_mesh([]), r"devices must be at least one, and each once, got \[\]"),
        (
            lambda: ipr_jax.data_mesh(2 * jax.devices()),
            "devices must be at least one, and each once",
        ),
        (lambda: ipr_jax.data_mesh("cpu"), r"devices must be such as jax.devices\(\) .* got 'cpu'"),
        (lambda: ipr_jax.data_mesh(1), r"devices must be such as jax.devices\(\) .* got 1"),
        (
            lambda: ipr_jax.condition_on(never, IMAGE, EDITABLE),
            "model must be of type SRM, got never",
        ),
        (lambda: ipr_jax.repaint(None, IMAGE, EDITABLE, IMAGE), "denoise must be a function"),
        (
            lambda: ipr_jax.repaint(never, IMAGE, EDITABLE, None),
            "noise must be float32 .* got None",
        ),
        (
            lambda: ipr_jax.compile(ipr_jax.refine, never, 4, (2, 2), iterations=1),
            r"image_shape must be \(B, H, W, C\) and grid \(h, w\), got 4",
        ),
        (
            lambda: ipr_jax.compile(ipr_jax.refine, never, (4, 4.5, 4, 1), (2, 2), iterations=1),
            "every number of image_shape and grid must be a whole number .* got 4.5",
        ),
    ],
)
def test_arguments_of_another_type_or_range_are_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def with_denoiser(found):
    """A batch of 2 images by a denoiser that returns this, of images and levels."""
    return lambda: driven(ipr_jax.generate, denoise=found)


def with_function(**functions):
    """The same by a good denoiser and another function."""
    return lambda: driven(denoise=bound(WEIGHT), **functions)


def with_order(order):
    return lambda: generate(*arguments(), Sampling(order=order))


def with_stop(stop):
    return lambda: stream(*arguments(), stop=stop)


@pytest.mark.parametrize(
    ("use", "name", "message"),
    [
        (with_denoiser(lambda z, t: z), "the denoiser", "a Prediction, got float32 [2, 4, 4, 1]"),
        (with_denoiser(lambda z, t: [z, z, t]), "the denoiser", "a Prediction, got a list"),
        (
            with_denoiser(lambda z, t: Prediction(z, z, t > 0)),
            "the denoiser's sigma",
            "shape (2, 2, 2) and be float32, got bool [2, 2, 2]",
        ),
        (
            with_denoiser(lambda z, t: Prediction(z, 0.5, t)),
            "the denoiser's variance_fraction",
            "shape (2, 4, 4, 1) and be float32, got 0.5",
        ),
        (
            with_order(lambda sigma, uniform, t: sigma[0]),
            "what order returns",
            "shape (2, 2, 2) and be float32, got float32 [2, 2]",
        ),
        (
            with_order(lambda sigma, uniform, t: sigma > 1),
            "what order returns",
            "shape (2, 2, 2) and be float32, got bool [2, 2, 2]",
        ),
        (
            with_function(select=lambda keys, iteration, grid: jnp.ones((2, *grid), bool)),
            "what select returns",
            "shape (2, 2, 2) and be float32, got bool [2, 2, 2]",
        ),
        (
            with_function(select=lambda keys, iteration, grid: jnp.zeros((2, 1), jnp.int32)),
            "what select returns",
            "shape (2, 2, 2) and be float32, got int32 [2, 1]",
        ),
        (
            with_function(noise=lambda keys, iteration, shape: jnp.ones((2, 1, 1, 1))),
            "what noise returns",
            "shape (2, 4, 4, 1) and be float32, got float32 [2, 1, 1, 1]",
        ),
        (with_function(record=lambda image: {"a": "b"}), "record", "arrays, got 'b'"),
        (
            with_stop(lambda iteration, before, after: brightness(after)),
            "what stop returns",
            "shape (1,) and be bool, got float32 [1]",
        ),
        (
            with_stop(lambda iteration, before, after: after > 0),
            "what stop returns",
            "shape (1,) and be bool, got bool [1, 4, 4, 1]",
        ),
    ],
)
def test_what_functions_return_is_checked(use, name, message):
    with pytest.raises(ValueError, match=re.escape(f"{message}")) as error:
        use()
    assert str(error.value).startswith(f"{name} must ")


def test_floats_of_any_width_are_taken_as_float32():
    def narrow(z, t):
        return tuple(part.astype(jnp.bfloat16) for part in scaled(jnp.float32(0.9), z, t))

    def widened(z, t):
        return tuple(part.astype(jnp.float32) for part in narrow(z, t))

    found, want = (
        ipr_jax.generate(denoise, *arguments()[1:], FEW).image for denoise in (narrow, widened)
    )
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, want)
