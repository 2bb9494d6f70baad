"""The patch transformer: its contract, a slow copy of it, what it treats alike, and its files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call
from flax import nnx

import ipr_jax
from convert import conversion
from ipr_jax import PatchTransformer, TransformerConfig
from ipr_jax.core.keys import rngs
from ipr_jax.methods import export
from ipr_jax.methods.ipr import Refinement
from ipr_jax.models import checkpoint, networks, precision

TINY = TransformerConfig(
    image_size=(16, 16),
    channels=1,
    patch_size=4,
    width=8,
    num_layers=2,
    num_heads=2,
    hidden_width=6,
    num_frequencies=4,
    coordinates=("row", "column", "cell", "box"),
    attention_bias=("row", "column"),
    pixel_mean=-0.4,
    pixel_std=0.75,
)

evaluate = jax.jit(lambda model, z, t: model(z, t))


def randomised(config, **options):
    """A model without the zero initialisations, so that every part matters."""
    model = nnx.eval_shape(lambda: PatchTransformer(config, rngs=rngs(0), **options))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), model
    )


def inputs(rng, config=TINY, batch=3):
    z = jnp.asarray(rng.normal(size=(batch, *config.image_shape)), jnp.float32)
    return z, jnp.asarray(rng.random((batch, *config.grid)), jnp.float32)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_a_new_model_predicts_best_of_what_is_linear(level, rng):
    """Of pixels that are normal, its prediction is the regression, and sigma what is left."""
    model = PatchTransformer(TINY, rngs=rngs(0))
    image, noise = rng.normal(size=(2, 400, *TINY.image_shape))
    image = TINY.pixel_mean + TINY.pixel_std * image
    z, t = (1 - level) * image + level * noise, np.full((400, *TINY.grid), level, np.float32)
    found = evaluate(model, jnp.float32(z), t)
    slope, intercept = np.polyfit(z.ravel(), (noise - image).ravel(), 1)
    np.testing.assert_allclose(found.velocity, slope * z + intercept, atol=0.03)
    rest = (noise - image - found.velocity).std()
    np.testing.assert_allclose(found.sigma, rest, rtol=0.01)
    np.testing.assert_array_equal(found.variance_fraction, 0.5)
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}


def of_the_sum(pixels, levels, config):
    """How a sum of n m, with a standard deviation of 1, changes the best prediction of the velocity
    of normal pixels: from the normal law of all pixels, [P, S S C] of positive levels -> the same.
    """
    pixels = np.reshape(pixels, (len(levels), -1, config.channels))
    level = np.repeat(levels, pixels.shape[1])
    precision = np.diag(config.pixel_std**-2 + (1 - level) ** 2 / level**2)
    told = pixels.reshape(-1, config.channels) * ((1 - level) / level**2)[:, None]
    change = np.linalg.solve(precision + 1, told) - np.linalg.solve(precision, told)
    return (-change / level[:, None]).reshape(len(levels), -1)


def slow(model, z, t):
    """One image [H, W, C] of levels [h, w], token by token in float64."""
    c, state = model.config, nnx.to_pure_dict(nnx.state(model))
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)
    (h, w), size = c.grid, c.patch_size
    side = int(h**0.5)
    place = {
        "row": [i for i in range(h) for j in range(w)],
        "column": [j for i in range(h) for j in range(w)],
        "cell": list(range(h * w)),
        "box": [i // side * side + j // side for i in range(h) for j in range(w)],
    }

    def norm(x):
        return x / np.sqrt((x**2).mean() + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    tokens, levels = [], t.ravel().astype(np.float64)
    scale = 1 / np.sqrt(((1 - levels) * c.pixel_std) ** 2 + levels**2)
    pixels = [
        z[i * size : (i + 1) * size, j * size : (j + 1) * size].ravel()
        - (1 - t[i, j]) * c.pixel_mean
        for i in range(h)
        for j in range(w)
    ]
    linear = None
    if c.balance:
        change = of_the_sum(pixels, levels, c).reshape(h * w, -1, c.channels)
        linear = change[:, 0] / (c.pixel_std * scale[:, None])
        np.testing.assert_allclose(change, np.broadcast_to(change[:, :1], change.shape))
    frequencies = (
        np.pi / 2 * 128 ** (np.arange(c.num_frequencies // 2) / (c.num_frequencies // 2 - 1))
    )
    modulation = []
    for p, level in enumerate(levels):
        seen = pixels[p] * scale[p]
        token = (seen if linear is None else np.append(seen, linear[p])) @ weights["enter"]
        token = token + sum(weights["tables"][name][place[name][p]] for name in c.coordinates)
        waves = np.concatenate([np.cos(level * frequencies), np.sin(level * frequencies)])
        embedded = silu(waves @ weights["embed"] + weights["embed_bias"])
        modulation.append(np.tensordot(embedded, weights["level"], (0, 0)))
        tokens.append(token)
    for layer in [weights["layers"][i] for _ in range(c.repeats) for i in range(c.num_layers)]:
        m = [each + layer["level"] for each in modulation]
        qkv = [
            np.tensordot(norm(x) * (1 + m[p][1]) + m[p][0], layer["qkv"], (0, 0)).reshape(
                3, c.num_heads, -1
            )
            for p, x in enumerate(tokens)
        ]
        for p in range(h * w):
            heads = []
            for n in range(c.num_heads):
                query = norm(qkv[p][0, n]) * layer["sharpness"][n]
                logits = np.array(
                    [
                        query @ norm(other[1, n]) / np.sqrt(len(query))
                        + 8
                        * sum(
                            layer["bias"][k][n, place[k][p], place[k][q]] for k in c.attention_bias
                        )
                        for q, other in enumerate(qkv)
                    ]
                )
                share = np.exp(logits - logits.max())
                share = share / share.sum()
                heads.append(sum(share[q] * qkv[q][2, n] for q in range(h * w)))
            tokens[p] = tokens[p] + m[p][2] * (np.concatenate(heads) @ layer["proj"])
        for p, x in enumerate(tokens):
            gate, value = np.tensordot(norm(x) * (1 + m[p][4]) + m[p][3], layer["up"], (0, 0))
            tokens[p] = x + m[p][5] * ((silu(gate) * value) @ layer["down"])
    velocity, fraction, sigma = np.empty((3, h * w)).tolist()
    for p, x in enumerate(tokens):
        shift, factor = modulation[p][:2] + weights["last_level"]
        out = (norm(x) * (1 + factor) + shift) @ weights["leave"]
        share, out = np.split(out, [c.channels if c.balance else 0])
        one, two, *gain = np.split(out[:-1], 3 if c.gain else 2)
        one = one + sum(each * pixels[p] * scale[p] for each in gain)
        if c.balance:
            one = one + np.tile((1 + share) * linear[p], size**2)
        skip = (levels[p] - (1 - levels[p]) * c.pixel_std**2) * scale[p] ** 2
        rest = c.pixel_std * scale[p]
        velocity[p] = skip * pixels[p] - c.pixel_mean + rest * one
        fraction[p], sigma[p] = (two + 1) / 2, rest * np.exp(out[-1] / 2)
    shape = (h, w, size, size, c.channels)
    maps = [
        np.reshape(each, shape).swapaxes(1, 2).reshape(z.shape) for each in (velocity, fraction)
    ]
    return *maps, np.reshape(sigma, (h, w))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"repeats": 2, "attention_bias": (), "coordinates": ()},
        {"channels": 2, "num_heads": 4, "gain": True},
        {"channels": 2, "balance": True},
    ],
    ids=["plain", "repeated", "channels and gain", "balance"],
)
def test_the_network_equals_a_slow_copy(change, rng):
    config = dataclasses.replace(TINY, **change)
    model = randomised(config)
    z, t = inputs(rng, config, batch=2)
    for row in range(2):
        want = slow(model, np.asarray(z[row], np.float64), np.asarray(t[row]))
        for got, wanted in zip(evaluate(model, z, t), want, strict=True):
            np.testing.assert_allclose(got[row], wanted, rtol=2e-3, atol=2e-4)


def test_layers_that_repeat_are_as_many_with_the_same_weights(rng):
    once = randomised(dataclasses.replace(TINY, repeats=2))
    twice = randomised(dataclasses.replace(TINY, num_layers=4))
    twice.layers = nnx.List([*once.layers, *once.layers])
    for name in ("enter", "tables", "embed", "embed_bias", "level", "last_level", "leave"):
        setattr(twice, name, getattr(once, name))
    given = inputs(rng)
    for one, two in zip(evaluate(once, *given), evaluate(twice, *given), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_a_level_is_that_of_its_token(rng):
    """Others see it through the attention, and not if nothing comes of that."""
    z, t = inputs(rng)
    other = t.at[:, 1, 2].set(1 - t[:, 1, 2])
    for attends in (True, False):
        model = randomised(TINY)
        if not attends:
            for layer in model.layers:
                layer.proj[...] = jnp.zeros_like(layer.proj[...])
        one, two = (np.asarray(evaluate(model, z, each).sigma) for each in (t, other))
        changed = (one != two).all(axis=0)
        assert changed[1, 2]
        assert changed.sum() == (16 if attends else 1)


@pytest.mark.parametrize(
    ("coordinates", "bias", "order", "alike"),
    [
        ((), (), np.arange(16)[::-1], True),
        ((), ("row",), np.arange(16).reshape(4, 4)[:, [2, 0, 3, 1]].ravel(), True),
        ((), ("row",), np.arange(16).reshape(4, 4)[[2, 0, 3, 1]].ravel(), False),
        (("column",), ("column",), np.arange(16).reshape(4, 4)[[1, 0, 3, 2]].ravel(), True),
        (("cell",), (), np.arange(16)[::-1], False),
    ],
    ids=["no place", "rows", "other rows", "columns", "cells"],
)
def test_patches_that_it_cannot_tell_apart_may_change_places(coordinates, bias, order, alike, rng):
    config = dataclasses.replace(TINY, coordinates=coordinates, attention_bias=bias)
    model, (z, t) = randomised(config), inputs(rng)

    def moved(image):
        tiles = np.asarray(image).reshape(3, 4, 4, 4, 4).swapaxes(2, 3).reshape(3, 16, 4, 4)
        return tiles[:, order].reshape(3, 4, 4, 4, 4).swapaxes(2, 3).reshape(3, 16, 16, 1)

    levels = np.asarray(t).reshape(3, 16)[:, order].reshape(t.shape)
    got, want = evaluate(model, moved(z), levels), evaluate(model, z, t)
    assert np.allclose(got.velocity, moved(want.velocity), atol=1e-4) == alike


def test_every_sample_by_itself(rng):
    model, (z, t) = randomised(TINY), inputs(rng)
    whole, alone = evaluate(model, z, t), evaluate(model, z[1:2], t[1:2])
    for one, many in zip(alone, whole, strict=True):
        np.testing.assert_allclose(one[0], many[1], atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "transformer"
    checkpoint.save(path, TINY, nnx.state(randomised(TINY)), {"made": "at random"})
    return path


def test_a_folder_is_opened_with_its_precisions(folder, rng):
    model, given = ipr_jax.load(folder), inputs(rng)
    assert model.config == TINY
    want = evaluate(randomised(TINY), *given)
    for one, two in zip(evaluate(model, *given), want, strict=True):
        np.testing.assert_array_equal(one, two)
    low = ipr_jax.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.float32)}
    for name in ("float32", "tf32"):  # the same on this device
        for one, two in zip(jax.jit(precision.compute_in(model, name))(*given), want, strict=True):
            np.testing.assert_array_equal(one, two)
    for found in (evaluate(low, *given), jax.jit(precision.compute_in(model, "bfloat16"))(*given)):
        assert found.velocity.dtype == jnp.float32
        difference = np.abs(found.velocity - want.velocity).max()
        assert 0 < difference < 0.05 * np.abs(want.velocity).max()
    with pytest.raises(
        ValueError, match=r"\[B, 16, 16, 1\] for this model, got float32 \[1, 16, 12, 1\]"
    ):
        jax.eval_shape(model, jnp.ones((1, 16, 12, 1)), jnp.ones((1, 4, 3)))


def test_info_and_export_of_a_folder(folder, rng):
    code, out, err = call("info", folder)
    assert (code, err) == (0, "")
    rows = dict(line.strip().split(maxsplit=1) for line in out.splitlines())
    assert rows["network"] == "PatchTransformer"
    assert rows["attention_bias"] == "('row', 'column')"
    model = ipr_jax.load(folder)
    number = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert rows["parameters"] == f"{number:,}"

    once = ipr_jax.Sampling(steps_per_patch=1)
    method = Refinement(iterations=1, first=once, later=once)
    program = export.serialize(model, method)
    image, editable = np.zeros((2, 16, 16, 1), np.float32), np.ones((2, 4, 4), bool)
    keys = ipr_jax.sample_keys(jax.random.key(0), 2)
    exported = jax.export.deserialize(program).call(jax.random.key_data(keys), image, editable)
    first, refined = (
        ipr_jax.solve(model, keys, image, editable, method=each)
        for each in (dataclasses.replace(method, iterations=0), method)
    )
    np.testing.assert_allclose(exported["first_pass"], first.image, atol=1e-4)
    assert (refined.image != first.image).any(axis=(1, 2, 3)).all()
    np.testing.assert_allclose(exported["refined"], refined.image, atol=1e-4)
    np.testing.assert_array_equal(exported["nfe"], refined.nfe)
    assert (refined.nfe > first.nfe).all()
    assert exported["finite"].all()


def test_another_kind_of_network_is_named(folder):
    with pytest.raises(ValueError, match="its kind is 'TransformerConfig', where one of"):
        checkpoint.open_as(folder, {ipr_jax.ModelConfig: networks.build})
    rule = "has the networks of ModelConfig, MNISTConfig, PolygonConfig, not of TransformerConfig$"
    with pytest.raises(ValueError, match=rule):
        conversion.export(folder, folder.parent / "model.safetensors")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    image = np.zeros((1, *TINY.image_shape), np.float32)
    with pytest.raises(ValueError, match=r"^model must be of type SRM, got "):
        ipr_jax.condition_on(ipr_jax.load(folder), image, np.ones((1, *TINY.grid), bool))


def test_a_model_of_another_grid_is_named(folder):
    code, _, err = call("evaluate", "mini-sudoku", "--model", folder)
    assert code == 2
    assert "makes images (16, 16, 1) in 4 x 4 patches of 4, the task mini-sudoku needs" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width must be a multiple of num_heads=2, got 9"),
        ({"num_heads": 3}, "width must be a multiple of num_heads=3, got 8"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
        ({"num_frequencies": 5}, "num_frequencies must be even, got 5"),
        ({"image_size": (16, 18)}, "image_size must be positive multiples of patch_size=4"),
        ({"image_size": (16,)}, "image_size must be height and width, got"),
        ({"coordinates": ("diagonal",)}, "unknown name 'diagonal' in coordinates; those that fit"),
        ({"attention_bias": ("row", "row")}, "attention_bias must name each coordinate once"),
        (
            {"image_size": (16, 12)},
            r"'box' in coordinates needs a square grid whose side is a square, the grid is 4 x 3; "
            r"those that fit: \['row', 'column', 'cell'\]",
        ),
        ({"gain": 1}, "gain must be True or False, got 1"),
        ({"balance": None}, "balance must be True or False, got None"),
        ({"pixel_std": 0.0}, "pixel_std must be positive, got 0.0"),
        ({"pixel_mean": float("nan")}, "pixel_mean must be finite, got nan"),
    ],
    ids=str,
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(TINY, **change)
