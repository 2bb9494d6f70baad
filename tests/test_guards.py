"""Guards against what makes a loop slow: arithmetic, compilation, transfers, overhead."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ipr_jax
from benchmarks import workload
from benchmarks.timing import seconds
from ipr_jax import Prediction, Sampling
from ipr_jax.runtime import flops

EVERYTHING = np.ones((4, 4, 4), bool)

PROGRAMS = {
    "generate": lambda model, keys, image: ipr_jax.generate(model, keys, image, EVERYTHING),
    "refine": lambda model, keys, image: ipr_jax.refine(
        model, keys, image, EVERYTHING, iterations=3
    ),
    "stream": lambda model, keys, image: ipr_jax.stream(
        model, keys, image, EVERYTHING, iterations=3, slots=4
    ),
    "solve": lambda model, keys, image: ipr_jax.solve(
        model, keys, image, EVERYTHING, method=ipr_jax.Annealed(iterations=3), slots=4
    ),
}
"""The loops, on four images of mini-sudoku."""


def inputs(seed=0):
    image = np.random.default_rng(seed).uniform(-1, 1, (4, 32, 32, 1)).astype(np.float32)
    return jax.device_put((ipr_jax.sample_keys(jax.random.key(seed), 4), image))


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset"),
    [*((name, "mini-sudoku-transformer") for name in PROGRAMS), ("refine", "mini-sudoku")],
)
def test_a_turn_of_a_loop_costs_one_evaluation_of_the_network(name, preset):
    """Of both architectures; a loop's body counts once, whatever the number of its turns."""
    model = nnx.eval_shape(lambda: workload.new_model(preset))
    keys, image = inputs()
    bare = flops.count(lambda model, z, t: model(z, t), model, image, jnp.ones((4, 4, 4)))
    assert bare <= flops.count(PROGRAMS[name], model, keys, image) <= 1.01 * bare


# --- compilation ----------------------------------------------------------------------------------


def scaled(factor, z, t):
    """A denoiser with one weight."""
    return Prediction(factor * z, 0.4 + 0 * z, t + jnp.abs(z[:, ::8, ::8, 0]))


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_numbers_compile_nothing_at_all(name, caplog):
    """Neither the loop nor anything around it: keys, images, masks, weights and settings differ."""

    def run(seed):
        keys, image = inputs(seed)
        editable = np.random.default_rng(seed).random((4, 4, 4)) < 0.3 + 0.2 * seed
        model = jax.tree_util.Partial(scaled, jnp.float32(0.1 * seed))
        sampling = Sampling(
            steps_per_patch=2 + seed,
            overlap=0.2 * seed,
            stochasticity=0.3 * seed,
            temperature=1 - 0.2 * seed,
        )
        ratio = 0.2 + 0.3 * seed
        if name == "generate":
            return ipr_jax.generate(model, keys, image, editable, sampling)
        if name == "refine":
            options = {"iterations": 2, "start": seed, "sampling": sampling}
            return ipr_jax.refine(model, keys, image, editable, ratio=ratio, **options)
        if name == "solve":
            method = ipr_jax.Annealed(iterations=3, ratio=(1, ratio), stochasticity=0.3 * seed)
            return ipr_jax.solve(model, keys, image, editable, method=method, slots=2)
        options = {"iterations": 1 + seed, "patience": 1 + seed, "slots": 2}
        options |= {"first": sampling, "later": sampling}
        return ipr_jax.stream(model, keys, image, editable, ratio=ratio, **options)

    def compiled(seed):
        caplog.clear()
        with jax.log_compiles():
            run(seed)
        return [text for text in caplog.messages if text.startswith("Compiling ")]

    assert compiled(0)
    assert not compiled(1)
    assert not compiled(2)


# --- transfers ------------------------------------------------------------------------------------


def of_the_host(text):
    """The operations of a compiled program that involve the host."""
    operation = r"(?:infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*(?:callback|python)"
    return re.findall(operation, text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_loop_never_leaves_its_device(name, tiny_model):
    """One of them with the network, the others with a denoiser that compiles sooner."""
    quick = jax.tree_util.Partial(scaled, jnp.float32(0.1))
    arguments = tiny_model if name == "generate" else quick, *inputs()
    program = jax.jit(PROGRAMS[name]).lower(*arguments).compile()
    with jax.transfer_guard("disallow"):
        found = jax.block_until_ready(program(*arguments))
    assert found.finite.all()
    assert not of_the_host(program.as_text())


def test_a_visit_to_the_host_is_found():
    def visiting(z, t):
        jax.debug.callback(lambda value: None, z[0, 0, 0, 0])
        return scaled(0.1, z, t)

    keys, image = inputs()
    program = jax.jit(lambda *given: PROGRAMS["generate"](visiting, *given)).lower(keys, image)
    assert of_the_host(program.compile().as_text())


# --- overhead -------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_the_loop_adds_little_to_its_network():
    """The best of seven rounds of each, in turn; about 1.0 on a quiet machine."""
    work = workload.make("even-pixels", 8, "float32")
    network = jax.jit(workload.network).lower(work).compile()

    def inside():
        return workload.refinement(work, 4)

    def outside():
        return [network(work) for _ in range(4)]

    jax.block_until_ready((inside(), outside()))
    rounds = [(seconds(inside), seconds(outside)) for _ in range(7)]
    best, bare = (min(times) for times in zip(*rounds, strict=True))
    assert best < 1.2 * bare
