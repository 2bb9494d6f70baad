"""How many samples fit: the search, the halving, the free memory of a device."""

import math
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipr_jax
from ipr_jax.runtime import memory
from ipr_jax.runtime.program import Program

EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
AMOUNTS = st.integers(0, 10**12)


class Counted:
    """A need by number of samples, and how often it was asked for."""

    def __init__(self, need):
        self.need, self.calls = need, 0

    def __call__(self, size):
        self.calls += 1
        return self.need(size)


# --- the search -----------------------------------------------------------------------------------


@given(base=AMOUNTS, each=AMOUNTS, available=AMOUNTS, most=st.integers(1, 10**5))
def test_the_largest_is_found_by_three_calls_where_the_need_is_a_line(base, each, available, most):
    needed = Counted(lambda size: base + each * size)
    if needed.need(1) > available:
        with pytest.raises(MemoryError, match=f"sample needs {base + each:,} bytes, {available:,}"):
            memory.largest(needed, available, most)
        return
    found = memory.largest(needed, available, most)
    assert 1 <= found <= most
    assert needed.need(found) <= available
    assert found == most or needed.need(found + 1) > available
    assert needed.calls <= (1 if found == most else 3)


@given(steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=200), available=AMOUNTS)
def test_what_is_found_fits_whatever_the_need(steps, available):
    need = np.cumsum(steps)
    needed = Counted(lambda size: int(need[size - 1]))
    if need[0] <= available:
        assert need[memory.largest(needed, available, len(steps)) - 1] <= available
        assert needed.calls <= 3 + math.log(len(steps), 4 / 3)


@pytest.mark.parametrize(("beyond", "found"), [(1000, 500), (30, 15), (2, 1)])
def test_what_cannot_even_be_compiled_does_not_fit(beyond, found):
    assert memory.largest(lambda n: math.inf if n >= beyond else n, 500, 1000) == found


def test_a_real_program_fits_and_one_sample_more_does_not(monkeypatch):
    double = jax.jit(lambda x: jnp.sort(2 * x, axis=-1))

    def program(size):
        return Program(double, (jax.ShapeDtypeStruct((size, 16, 16), jnp.float32),), {})

    usable, besides = 10**5, 10**4
    monkeypatch.setattr(memory, "usable_bytes", lambda: usable)
    found = memory.choose("auto", 1000, program, besides=besides)
    small, large = (program(size).compile().memory.total for size in (found, found + 1))
    assert small <= usable - besides < large
    assert memory.choose("auto", 5, program) == 5
    assert [memory.choose(size, 5, program) for size in (3, 9)] == [3, 5]


def test_a_compiler_that_runs_out_of_memory_is_no_error_and_another_error_is():
    def program(size):
        def lower():
            raise EXHAUSTED if size > 1 else jax.errors.JaxRuntimeError("INTERNAL: broken")

        return Program(SimpleNamespace(lower=lower), (), {})

    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        memory.choose("auto", 64, program)


def test_a_compiler_that_does_not_tell_cannot_do_it():
    silent = SimpleNamespace(memory_analysis=lambda: None)
    lowered = SimpleNamespace(compile=lambda: silent)
    program = Program(SimpleNamespace(lower=lambda: lowered), (), {})
    with pytest.raises(ValueError, match='"auto" needs a compiler that tells'):
        memory.choose("auto", 64, lambda size: program)


# --- at run time ----------------------------------------------------------------------------------


def test_work_is_done_with_half_as_many_until_it_fits():
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise EXHAUSTED
        return "done"

    with pytest.warns(UserWarning, match="out of memory with") as said:
        assert memory.halving(work, 21) == ("done", 2)
    assert tried == [21, 10, 5, 2]
    assert str(said[0].message) == "out of memory with 21 samples at once, going on with 10"


@pytest.mark.parametrize(
    ("error", "size"), [(EXHAUSTED, 1), (jax.errors.JaxRuntimeError("INTERNAL: broken"), 8)]
)
def test_other_errors_and_those_of_a_single_sample_are_raised(error, size):
    def work(size):
        raise error

    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        memory.halving(work, size)
    assert raised.value is error


# --- free memory ----------------------------------------------------------------------------------


def device(monkeypatch, number=1, **fields):
    monkeypatch.setattr(jax, "local_devices", lambda: number * [SimpleNamespace(**fields)])


def test_a_device_tells_its_own_free_memory(monkeypatch):
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}
    device(monkeypatch, memory_stats=lambda: stats, platform="gpu")
    assert memory.usable_bytes() == 630
    device(monkeypatch, memory_stats=lambda: None, platform="odd")
    with pytest.raises(ValueError, match="needs a device that tells its free memory"):
        memory.usable_bytes()


def test_a_cpu_has_what_the_machine_and_the_container_leave(monkeypatch, tmp_path):
    device(monkeypatch, memory_stats=lambda: None, platform="cpu")
    assert 0 < memory.usable_bytes() <= psutil.virtual_memory().total / 2
    files = {"memory.max": "5000\n", "memory.current": "4000\n", "memory.stat": "inactive_file 7\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_groups", lambda: [tmp_path])
    assert memory.usable_bytes() == 402
    device(monkeypatch, 8, memory_stats=lambda: None, platform="cpu")
    assert memory.usable_bytes() == 50


@pytest.mark.heavy
def test_a_cpu_takes_no_more_beside_the_plan_than_is_left_for_it():
    """The shipped model, 256 samples at once."""
    model, sampling = ipr_jax.load("mini-sudoku"), ipr_jax.Sampling(max_steps=3)
    shape, grid = (256, 32, 32, 1), (4, 4)
    planned = ipr_jax.compile(ipr_jax.generate, model, shape, grid, sampling=sampling).memory
    keys = ipr_jax.sample_keys(jax.random.key(0), 256)
    given = keys, np.zeros(shape, np.float32), np.ones((256, *grid), bool)
    process, seen, over = psutil.Process(), [], threading.Event()
    nothing = keys, given[1], np.zeros((256, *grid), bool)
    jax.block_until_ready(ipr_jax.generate(model, *nothing, sampling))  # makes the program

    def watch():
        while not over.wait(0.002):
            seen.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    before = process.memory_info().rss
    watching.start()
    jax.block_until_ready(ipr_jax.generate(model, *given, sampling))
    over.set()
    watching.join()
    grown, plan = max(seen) - before, planned.outputs + planned.temporaries
    assert plan < grown < plan / memory.CPU_SHARE


def test_limits_of_containers_of_both_versions(tmp_path):
    assert memory._left(tmp_path) == math.inf
    (tmp_path / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 20\n")
    (tmp_path / "memory.limit_in_bytes").write_text("900\n")
    (tmp_path / "memory.usage_in_bytes").write_text("500\n")
    assert memory._left(tmp_path) == 420
    (tmp_path / "memory.limit_in_bytes").unlink()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500\n")
    assert memory._left(tmp_path) == math.inf
