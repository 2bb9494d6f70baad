"""The objective against recorded losses and gradients, its definitions and its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, golden, golden_config, golden_model, nhwc
from flax import nnx
from scipy import stats

from ipr_jax import SRM, Prediction
from ipr_jax.core import patches
from ipr_jax.sampling import flow
from ipr_jax.training import objective


def recorded_batch(name):
    """The recorded training batch: image, noise, t, weight; and everything that was recorded."""
    want, size = golden(f"{name}/loss.npz"), golden_config(name).patch_size
    mask = want["mask"][:, 0, ::size, ::size] if "mask" in want else np.float32(1)
    t, weight = want["t_patch"] * mask, want["loss_weight_patch"] * mask
    return (nhwc(want["image"]), nhwc(want["eps"]), t, weight), want


@pytest.mark.parametrize("name", ["tiny_even", "tiny_sudoku"])
def test_losses_and_gradients_equal_the_published_ones(name):
    batch, want = recorded_batch(name)

    def total(model, *batch):
        losses = objective.evaluate(model, *batch)
        return losses.total, losses

    gradients = jax.jit(
        jax.grad(total, has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},  # halves the time to compile
    )
    gradient, losses = gradients(golden_model(name, "raw"), *batch)
    for term, value in losses._asdict().items():
        assert float(value) == pytest.approx(float(want[term]), rel=1e-5), term
    for layer, kernel in (
        (gradient.unet.out_conv, want["grad_out_conv"].transpose(2, 3, 1, 0)),
        (gradient.unet.embed.linear1, want["grad_time_mlp0"].T),
    ):
        np.testing.assert_allclose(layer.kernel[...], kernel, atol=1e-4 * np.abs(kernel).max())


LEVELS = (0.0, 1e-6, 1e-5, 1e-3, 1.01e-3, 0.5, 0.999, 1.0)


def toy_batch(rng, levels=LEVELS):
    """Images [B, 4, 4, 2] of 2 x 2 patches, one image per level, and a wrong prediction of them."""
    shape = (len(levels), 4, 4, 2)
    image = jnp.asarray(np.clip(rng.normal(size=shape), -1, 1), jnp.float32)
    noise, error, fraction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    t = jnp.broadcast_to(jnp.float32(levels)[:, None, None], (len(levels), 2, 2))
    sigma = jnp.exp(jnp.asarray(rng.normal(size=t.shape), jnp.float32))
    prediction = Prediction(flow.velocity_of(image, noise) + error, fraction, sigma)
    return prediction, image, noise, t


@jax.jit
def losses_of(prediction, image, noise, t, weight):
    z = flow.interpolate(image, noise, patches.expand(t, 2))
    return objective.losses(prediction, z, image, noise, t, weight)


@jax.jit
def losses_and_gradients(prediction, image, noise, t):
    def of(prediction):
        return losses_of(prediction, image, noise, t, jnp.ones_like(t))

    return of(prediction), jax.jacrev(of)(prediction)


@pytest.mark.parametrize("sigma", [0.0, 1e-12, 1.0, 1e8])
@pytest.mark.parametrize("fraction", [-3.0, 0.0, 1.0, 4.0])
def test_losses_and_gradients_are_finite_at_every_level(fraction, sigma, rng):
    prediction, image, noise, t = toy_batch(rng)
    extreme = Prediction(
        prediction.velocity, jnp.full(image.shape, fraction), jnp.full(t.shape, sigma)
    )
    for leaf in jax.tree.leaves(losses_and_gradients(extreme, image, noise, t)):
        assert np.isfinite(leaf).all()


def test_each_term_teaches_its_own_output(rng):
    _, gradients = losses_and_gradients(*toy_batch(rng))
    taught = {
        term: {field for field, g in each._asdict().items() if np.abs(g).max() > 0}
        for term, each in gradients._asdict().items()
    }
    assert taught == {
        "total": {"velocity", "variance_fraction", "sigma"},
        "velocity": {"velocity"},
        "vlb": {"variance_fraction"},
        "sigma": {"sigma"},
    }


def test_losses_of_a_perfect_prediction(rng):
    prediction, image, noise, t = toy_batch(rng)
    velocity = flow.velocity_of(image, noise)
    perfect = Prediction(velocity, jnp.zeros_like(image), prediction.sigma)
    losses, _ = losses_and_gradients(perfect, image, noise, t)
    assert losses.velocity == 0
    assert float(losses.vlb) == pytest.approx(0, abs=1e-6)
    nll = np.log(prediction.sigma).mean() + 0.5 * np.log(2 * np.pi)
    assert float(losses.sigma) == pytest.approx(nll, rel=1e-5)
    assert float(losses.total) == pytest.approx(float(losses.vlb + 0.01 * losses.sigma), rel=1e-6)


def test_terms_equal_their_definitions(rng):
    prediction, image, noise, t = toy_batch(rng, levels=np.linspace(0.1, 0.95, len(LEVELS)))
    losses = losses_of(prediction, image, noise, t, jnp.ones_like(t))
    image, noise, velocity, fraction, t, sigma = (
        np.asarray(a, np.float64)
        for a in (
            image,
            noise,
            prediction.velocity,
            prediction.variance_fraction,
            t,
            prediction.sigma,
        )
    )
    t, sigma = (np.kron(a, np.ones((1, 2, 2)))[..., None] for a in (t, sigma))
    error = velocity - (noise - image)
    assert float(losses.velocity) == pytest.approx((error**2).mean(), rel=2e-6)

    s = t - 1e-3
    kept = s * ((1 - t) * s) / ((1 - s) * t)
    unexplained = 1 - (((1 - t) * s) / ((1 - s) * t)) ** 2
    std_q = s * np.sqrt(unexplained)
    std_p = t**fraction * s ** (1 - fraction) * np.sqrt(unexplained)
    distance = ((1 - s) * -t + kept * (1 - t)) * error  # of the means: z - t u and z + (1 - t) u
    kl = np.log(std_p / std_q) + (std_q**2 + distance**2) / (2 * std_p**2) - 0.5
    assert float(losses.vlb) == pytest.approx(kl.mean() / np.log(2), rel=1e-5)

    nll = -stats.norm.logpdf(error, scale=sigma).mean()
    assert float(losses.sigma) == pytest.approx(nll, rel=2e-6)


def test_the_weight_of_a_patch_counts_for_that_patch_alone(rng):
    prediction, image, noise, t = toy_batch(rng)
    whole = losses_of(prediction, image, noise, t, jnp.ones_like(t))
    ones = np.eye(t.size, dtype=np.float32).reshape(t.size, *t.shape)
    parts = np.array([losses_of(prediction, image, noise, t, one) for one in ones])
    np.testing.assert_allclose(parts.sum(axis=0), whole, rtol=1e-5)

    where = np.arange(t.size).reshape(t.shape) % 3 == 0
    pixels = where.repeat(2, axis=1).repeat(2, axis=2)[..., None]
    image, noise = np.asarray(image), np.asarray(noise)
    other_image = np.where(pixels, image, -image)
    other_noise = np.where(pixels, noise, 2 * noise)
    weight = np.where(where, np.float32(1.5), np.float32(0))
    changed = losses_of(prediction, other_image, other_noise, t, weight)
    np.testing.assert_array_equal(changed, losses_of(prediction, image, noise, t, weight))


evaluate = jax.jit(objective.evaluate)


def test_the_noise_of_a_clue_does_not_matter(rng):
    small = dataclasses.replace(TINY, image_size=(4, 4), patch_size=2)
    model = nnx.jit(lambda: SRM(small, rngs=nnx.Rngs(0)))()
    shape = (4, *small.image_shape)
    image, noise = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    clue = rng.random((4, *small.grid)) < 0.5
    t = np.where(clue, 0, rng.random(clue.shape).astype(np.float32))
    weight = np.where(clue, 0, np.ones_like(t))
    want = evaluate(model, image, noise, t, weight)
    other = np.where(clue.repeat(2, axis=1).repeat(2, axis=2)[..., None], -noise, noise)
    np.testing.assert_array_equal(evaluate(model, image, other, t, weight), want)
    assert evaluate(model, image, -noise, t, weight).velocity != want.velocity
