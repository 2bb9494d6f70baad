"""Compiling ahead of time: what is read from compiled programs, and a real one for a TPU."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from jax import export

import ipr_jax
from benchmarks import aot
from ipr_jax import FIRST_PASS, REFINEMENT, PatchTransformer
from ipr_jax.core import rngs
from ipr_jax.models.config import PRESETS, TRANSFORMERS
from ipr_jax.studies import search
from ipr_jax.tasks import get_task

HLO = """
HloModule jit_refine, is_scheduled=true

%add (x: s32[], y: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  ROOT %all-reduce.7 = s32[] add(%x, %y)
}

%one (x: f32[2]) -> f32[2] {
  ROOT %x = f32[2] parameter(0)
}

%two (x: f32[2]) -> f32[2] {
  ROOT %gathered = f32[4]{0:T(128)} all-gather(%x), dimensions={0}
}

%pass (state: (s32[], f32[2])) -> (s32[], f32[2]) {
  %chosen = f32[2] conditional(%i, %z, %z), branch_computations={%one, %two}
  ROOT %tuple = (s32[], f32[2]) tuple(%i, %chosen)
}

%going_on (state: (s32[], f32[2])) -> pred[] {
  %any = pred[] all-reduce(%mine), channel_id=3, to_apply=%add
  ROOT %less = pred[] compare(%i, %any), direction=LT
}

%iteration (state: (s32[], f32[2])) -> (s32[], f32[2]) {
  %longest = s32[] all-reduce-start(%own), channel_id=1, to_apply=%add, metadata={op_name="max("}
  %done = s32[] all-reduce-done(%longest)
  ROOT %inner = (s32[], f32[2]) while(%start), condition=%going_on, body=%pass
}

%always (state: (s32[], f32[2])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %moved = f32[2] collective-permute(%x), source_target_pairs={{0,1}}
  %outer = (s32[], f32[2]) while(%start), condition=%always, body=%iteration
  ROOT %sum = f32[2] reduce-scatter(%z), to_apply=%add
}
"""


def test_collectives_are_counted_by_the_loops_around_them():
    assert aot.by_place(HLO, aot.COLLECTIVES) == {
        "once": {"collective-permute": 1, "reduce-scatter": 1},
        "per iteration": {"all-reduce": 1},
        "per evaluation": {"all-reduce": 1, "all-gather": 1},
    }


NARROW = dataclasses.replace(
    TRANSFORMERS["mini-sudoku-transformer"], width=8, num_layers=1, num_heads=2, hidden_width=8
)


@pytest.fixture
def tiny_case(monkeypatch):
    monkeypatch.setitem(PRESETS, "mini-sudoku", TINY)
    return aot.Case("v5e:2x2", "mini-sudoku", "float32", 4)


@pytest.fixture(params=["mini-sudoku", "mini-sudoku-transformer"])
def either_case(request, tiny_case, monkeypatch):
    """Of both architectures."""
    monkeypatch.setitem(TRANSFORMERS, "mini-sudoku-transformer", NARROW)
    return tiny_case._replace(preset=request.param)


def test_the_network_is_in_the_inner_loop_of_refinement(either_case):
    refine, given = aot.program(either_case)
    hlo = jax.jit(refine).lower(*given).as_text("hlo")
    found = aot.by_place(hlo, ("convolution", "dot"))
    assert found["once"] == found["per iteration"] == {}
    model, z, t = given[0], given[2], jax.ShapeDtypeStruct((4, *TINY.grid), jnp.float32)
    bare = jax.jit(lambda model, z, t: model(z, t)).lower(model, z, t).as_text("hlo")
    assert found["per evaluation"] == aot.by_place(bare, ("convolution", "dot"))["once"]


def test_refinement_lowers_for_tpu_and_gpu(either_case):
    refine, given = aot.program(either_case)
    lowered = export.export(jax.jit(refine), platforms=("tpu", "cuda"))(*given)
    image, nfe, finite = lowered.out_avals
    assert image.shape == (4, *TINY.image_shape)
    assert nfe.shape == finite.shape == (aot.ITERATIONS, 4)


@pytest.mark.parametrize(("hbm_gib", "fits"), [(1, True), (1e-6, False)])
def test_a_compiled_program_is_a_row(tiny_case, hbm_gib, fits, tmp_path, capsys, monkeypatch):
    """Compiled for this CPU in the place of a GPU."""
    monkeypatch.setitem(aot.CHIPS, "h200", aot.Chip(hbm_gib, {}))
    monkeypatch.setattr(aot, "topology", lambda target: jax.devices())
    args = aot.Args(
        target=("h200:1",),
        preset=("mini-sudoku",),
        batch=(2,),
        precision=("float32",),
        out=tmp_path / "out.json",
    )
    aot.main(args)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "h200:1" in line)
    assert line.split()[-2:] == ["yes" if fits else "no", "nothing"]
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "device", "commit", "arguments"} <= result.keys()
    (row,) = result["rows"]
    assert row["gflop_per_sample"] == aot.gflop_per_sample("mini-sudoku") > 0
    assert (row["target"], row["batch"], row["fits"]) == ("h200:1", 2, fits)
    assert row["memory_bytes"]["total"] > row["memory_bytes"]["argument"] > 0
    with pytest.raises(FileExistsError, match="is not overwritten"):
        aot.main(args)


def test_gpus_of_a_machine_are_described_to_their_compiler(monkeypatch):
    asked = []

    def described(*names, **options):
        asked.append((names, options))
        return jax.sharding.Mesh(jax.devices(), "x")

    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    monkeypatch.setattr(aot.topologies, "get_topology_desc", described)
    aot.topology("h200:8")
    ((names, options),) = asked
    assert (names, options["topology"]) == (("", "cuda"), "1x1x8")
    assert f"device_memory_size: {int(139.8 * 2**30)}\n" in options["target_config"]
    assert 'device_description_str: "NVIDIA H200"' in options["target_config"]


def test_too_large_a_program_does_not_fit(tiny_case, monkeypatch):
    monkeypatch.setattr(aot, "topology", lambda target: jax.devices())
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 17G of 15.75G hbm."

    def fail(message):
        def compiled(self):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)

    fail(said)
    row = aot.compile_for(tiny_case._replace(target="v5e:2x2"))
    assert (row["fits"], row["said"]) == (False, said.replace("\n", " "))
    (cells,) = zip(*(column.cells for column in aot.table([row]).columns), strict=True)
    assert cells[-2:] == ("does not fit", "")
    fail("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        aot.compile_for(tiny_case._replace(target="v5e:2x2"))


@pytest.mark.parametrize(("begin", "most", "tries"), [(8, 1000, 3), (8, 9, 2), (4000, 3, 13)])
def test_the_largest_batch_is_found_to_a_sixteenth_in_few_tries(begin, most, tries):
    """Where memory is affine in the samples per device, but for a little."""
    tried = []

    def attempt(batch):
        tried.append(batch)
        assert batch % 4 == 0
        each = batch // 4
        memory = {"argument": 50, "total": 50 + each + each % 2}
        row = {"batch": batch, "devices": 4, "hbm_bytes": 50 + most}
        fits = memory["total"] <= row["hbm_bytes"]
        return row | {"fits": fits} | ({"memory_bytes": memory} if fits else {})

    row = aot.largest(attempt, attempt(4 * begin))
    assert row["fits"]
    assert row["batch"] < row["too_large"]
    assert row["too_large"] - row["batch"] <= 4 * max(1, row["batch"] // 64)
    assert row["too_large"] in tried
    assert len(set(tried)) == len(tried) <= tries


def test_not_one_sample_per_device_fits():
    row = aot.largest(
        lambda batch: {"batch": batch, "devices": 4, "fits": False},
        {"batch": 64, "devices": 4, "fits": False},
    )
    assert (row["fits"], row["batch"], row["too_large"]) == (False, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target": ("v9:2x2",)},
            "target must be a topology of v4, v5e, v5p, v6e, .* or a number of h100, h200, ",
        ),
        ({"target": ("h200:2x2",)}, "target must be .* got 'h200:2x2'"),
        ({"target": ("v5e",)}, "target must be .* got 'v5e'"),
        ({"preset": ("x",)}, "unknown preset 'x'; known: mini-sudoku, even-pixels, counting-p"),
        ({"batch": (0,)}, "batch must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        aot.Args(**options)


def test_what_cannot_be_compiled_for_is_named(tiny_case, monkeypatch):
    monkeypatch.setattr(aot, "topology", lambda target: 3 * jax.devices())
    with pytest.raises(ValueError, match="a multiple of the 3 chips of v5e:1x3, got 4"):
        aot.compile_for(tiny_case._replace(target="v5e:1x3"))
    monkeypatch.undo()
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'libtpu: pip install -e "\.\[aot\]"'):
        aot.topology("v5e:2x2")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jax\[cuda12\]=='):
        aot.topology("h200:1")


@pytest.mark.heavy
def test_refinement_compiles_for_a_tpu(tmp_path):
    """Needs the extra ``aot``; without it, this fails and names it."""
    words = [sys.executable, "-m", "benchmarks.aot", "--target", "v5e:2x2"]
    words += ["--preset", "mini-sudoku", "digits-sudoku", "--precision", "bfloat16"]
    words += ["--batch", "8", "--out", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert (row["device_kind"], row["devices"], row["fits"]) == ("TPU v5 lite", 4, True)
        # Every device runs its own samples to the end of its own schedules.
        assert row["collectives"] == {place: {} for place in aot.PLACES}
        memory = row["memory_bytes"]
        assert 0 < memory["argument"] < memory["total"] < 2**28


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["annealed", "das"])
def test_every_method_compiles_for_a_tpu(name):
    """With nothing exchanged and nothing that waits for the host."""
    task = get_task("mini-sudoku")
    method = ipr_jax.Annealed()
    if name != "annealed":
        verifier = "independent-soft" if name == "das" else "independent"
        method = search.made(task, name, verifier, first=FIRST_PASS, later=REFINEMENT)
    batch, keys = task.test_batch(0, np.arange(8)), ipr_jax.sample_keys(jax.random.key(0), 8)
    model = PatchTransformer(NARROW, rngs=rngs(0))
    given = (model, keys, batch.image, batch.editable)
    program = ipr_jax.solve.program(*given, method=method, slots=4)
    placed = jax.sharding.SingleDeviceSharding(aot.topology("v5e:2x2")[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        program.arguments,
    )
    hlo = program.function.lower(*shapes, **program.static).compile().as_text()
    assert "while" in hlo
    assert not re.findall(r"all-gather|all-reduce|collective-permute|infeed|outfeed|host", hlo)
