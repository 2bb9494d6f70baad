"""Compiling ahead of time: the later call neither traces nor compiles, and needs what was said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.methods import stopping
from ipr_jax.sampling.order import raster_order

SHAPE, GRID = (3, 4, 4, 1), (2, 2)


def fake(z, t):
    return Prediction(0.3 * z, 0 * z, t + 1)


def always(images):
    return jnp.ones(len(images), bool)


@pytest.fixture
def compiled():
    """What is traced, lowered and compiled."""
    found = []

    def listen(event, seconds, **described):
        if event.startswith("/jax/core/compile/"):
            found.append((event, described.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("driver", "options", "numbers"),
    [
        (
            ipr_jax.generate,
            {"sampling": Sampling(order=raster_order)},
            {"sampling": Sampling(steps_per_patch=1, temperature=0.5, order=raster_order)},
        ),
        (
            ipr_jax.refine,
            {"iterations": 2, "record": always},
            {"iterations": 2, "record": always, "ratio": 0.5, "start": 1},
        ),
        (
            ipr_jax.stream,
            {"iterations": 9, "slots": 2, "stop": stopping.verified(always)},
            {"iterations": 1, "slots": 2, "first": Sampling(steps_per_patch=1)},
        ),
        (
            ipr_jax.solve,
            {"method": ipr_jax.Refinement(iterations=9), "slots": 2},
            {"method": ipr_jax.Refinement(iterations=1, ratio=0.5), "slots": 2, "budget": 99},
        ),
    ],
    ids=["generate", "refine", "stream", "solve"],
)
def test_a_later_call_compiles_nothing(compiled, driver, options, numbers):
    """With other keys, images, masks and numbers, on the host or on the device."""
    found = ipr_jax.compile(driver, fake, SHAPE, GRID, **options)
    assert any(event.endswith("backend_compile_duration") for event, _ in compiled)
    assert found.seconds > 0
    sizes = 3 * (4 * 4 * 4 + 4 + 8)  # float32 images, bool masks, keys
    assert found.memory.arguments >= sizes
    assert found.memory.outputs >= 3 * 4 * 4 * 4
    assert found.memory.total == sum(found.memory)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, SHAPE).astype(np.float32)
    editable = rng.random((3, *GRID)) < 0.6
    on_device = jnp.asarray(image), jnp.asarray(editable)
    keys = ipr_jax.sample_keys(jax.random.key(5), 3)
    compiled.clear()
    for given in ((image, editable), on_device):
        jax.block_until_ready(driver(fake, keys, *given, **options | numbers))
    assert not compiled
    assert ipr_jax.compile(driver, fake, SHAPE, GRID, **options).seconds < found.seconds


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((SHAPE[1:], GRID), {}, r"image_shape must be \(B, H, W, C\) and grid \(h, w\), got"),
        ((SHAPE, (4,)), {}, r"image_shape must be \(B, H, W, C\) and grid \(h, w\), got"),
        (((0, 4, 4, 1), GRID), {}, "num_samples must be a whole number of at least 1, got 0"),
        ((SHAPE, (3, 3)), {}, "square patches of the 4x4 images"),
        ((SHAPE, GRID), {"iterations": 0}, "iterations must be a whole number of at least 1"),
    ],
)
def test_bad_sizes_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ipr_jax.compile(ipr_jax.refine, fake, *arguments, **{"iterations": 1} | options)


def test_other_functions_and_options_are_refused():
    with pytest.raises(ValueError, match="driver must be generate, refine, solve or stream"):
        ipr_jax.compile(jnp.sin, fake, SHAPE, GRID)
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        ipr_jax.compile(ipr_jax.generate, fake, SHAPE, GRID, steps=3)
