"""The measurements run and add up."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TINY

import ipr_jax
from benchmarks import data, device, fidelity, large, profile, throughput, train, workload
from ipr_jax import Prediction
from ipr_jax.models.config import PRESETS, TRANSFORMERS
from ipr_jax.runtime import flops
from ipr_jax.studies import search
from ipr_jax.training.recipes import RECIPES


@pytest.mark.heavy
def test_rates_of_data_and_network(monkeypatch, capsys):
    monkeypatch.setitem(data.NETWORKS, "mini-sudoku", TINY)
    with jax.numpy_dtype_promotion("standard"):
        data.main(data.Args(smoke=True))
    out, err = capsys.readouterr()
    assert "mini-sudoku" in err
    result = json.loads(out)
    assert {"versions", "device", "commit", "num_workers"} <= result.keys()
    assert list(result["tasks"]) == ["mini-sudoku"]
    row = result["tasks"]["mini-sudoku"]
    batches, network = row["batches_per_second"], row["network"]
    assert list(batches) == ["loop", "thread", "processes"]
    assert all(number > 0 for number in (*batches.values(), *network.values()))
    assert network["timed_images"] == 64
    images = 64 * max(batches["thread"], batches["processes"])
    limits = row["network_waits_above"]
    assert limits["images_per_second"] == pytest.approx(images)
    assert limits["tflop_per_second"] == pytest.approx(images * network["gflop_per_image"] / 1e3)


def test_every_task_has_batches_and_a_network_for_them():
    for task in data.Args().tasks:
        batch = data.batches_of(task, None)(0, np.arange(2))
        network = data.NETWORKS[task]
        assert batch.image.shape[1:] == network.image_shape
        assert batch.editable.shape[1:] == network.grid
    with pytest.raises(ValueError, match="the task mnist-sudoku needs"):
        data.batches_of("mnist-sudoku", None)


@pytest.mark.heavy
def test_throughput_of_a_loop_and_its_network(monkeypatch, tmp_path, capsys):
    """Of both architectures."""
    names = ("mini-sudoku", "mini-sudoku-transformer")
    monkeypatch.setitem(PRESETS, names[0], TINY)
    narrow = dataclasses.replace(TRANSFORMERS[names[1]], width=16, num_layers=1, hidden_width=16)
    monkeypatch.setitem(TRANSFORMERS, names[1], narrow)
    monkeypatch.setattr(throughput, "product_rate", lambda precision, repeats: 1e9)
    options = {"preset": names, "precision": ("float32", "bfloat16"), "batch": (2, 4)}
    args = throughput.Args(**options, evaluations=2, repeats=2, out=tmp_path / "out.json")
    throughput.main(args)
    assert "mini-sudoku" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "device", "commit"} <= result.keys()
    rows = result["rows"]
    order = itertools.product(("float32", "bfloat16"), (2, 4), names)
    assert [(row["precision"], row["batch"], row["preset"]) for row in rows] == [*order]
    for row in rows:
        work = workload.make(row["preset"], 1, "float32")
        number = flops.count(workload.network, work)
        assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(work.denoise))
        each = row["ms_per_evaluation"]["loop"] / 1e3
        assert row["gflop_per_sample"] == pytest.approx(number / 1e9, rel=0.1)
        rate = row["gflop_per_sample"] * 1e9 * row["batch"] / each
        assert row["flop_per_second"] == pytest.approx(rate)
        assert row["share_of_product"] == pytest.approx(rate / 1e9)
        done = row["refined_samples_per_second"] * throughput.paper_evaluations(row["preset"])
        assert done == pytest.approx(row["batch"] / each)
        ratio = row["loop_over_bare"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert row["compile_seconds"] > 0
        assert row["memory_bytes"] > 0
    with pytest.raises(FileExistsError, match="is not overwritten"):
        throughput.main(args)


def test_evaluations_of_the_paper():
    """As docs/reproduce.md has them."""
    found = [round(throughput.paper_evaluations(name)) for name in workload.TASKS]
    assert found == [740, 3969, 3915, 2267, 2267, 740, 2267, 2267, 3969, 3969]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": ("x",)}, "unknown preset 'x'; known: mini-sudoku, even-pixels, counting-p"),
        ({"batch": (0,)}, "batch must be a whole number of at least 1, got 0"),
        ({"devices": 999, "batch": (999,)}, "devices must be at most 1, got 999"),
        ({"devices": 2}, "batch must be a multiple of devices=2, got 1"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_measurements_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        throughput.Args(**options)


# --- the profile ----------------------------------------------------------------------------------

PROGRAM = """HloModule jit_f, is_scheduled=true

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=12 end_column=63}

%fused (p.1: f32[8,4,4,2], p.2: f32[3,3,2,6]) -> f32[8,4,4,6] {
  %p.1 = f32[8,4,4,2]{3,2,1,0:T(8,128)} parameter(0)
  %p.2 = f32[3,3,2,6]{3,2,1,0} parameter(1)
  %c.1 = f32[8,4,4,6]{3,2,1,0} convolution(%p.1, %p.2), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  ROOT %t.1 = f32[8,4,4,6]{3,2,1,0} tanh(%c.1)
}

%body (s: (s32[], f32[8,4,4,2])) -> (s32[], f32[8,4,4,2]) {
  %s = (s32[], f32[8,4,4,2]{3,2,1,0}) parameter(0)
  %g.1 = f32[8,4,4,2]{3,2,1,0} get-tuple-element(%s), index=1
  %w = f32[3,3,2,6]{3,2,1,0} constant({...})
  %fusion.7 = f32[8,4,4,6]{3,2,1,0} fusion(%g.1, %w), kind=kOutput, calls=%fused
  %dot.2 = f32[128,128]{1,0} dot(%g.1, %g.1), lhs_contracting_dims={3}, rhs_contracting_dims={3}
  %like-dot = f32[128,128]{1,0} convolution(%g.1, %g.1), dim_labels=bf_io->bf, metadata={op_name="jit(f)/dot_general" stack_frame_id=3}
  %cudnn.3 = (f32[8,4,4,6]{3,2,1,0}, u8[0]{0}) custom-call(%g.1, %w), custom_call_target="__cudnn$convForward"
  %gemm.4 = (f32[128,128]{1,0}, s8[64]{0}) custom-call(%dot.2, %dot.2), custom_call_target="__cublas$lt$matmul"
  ROOT %out = (s32[], f32[8,4,4,2]{3,2,1,0}) tuple(%g.1, %g.1)
}

%condition (s.2: (s32[], f32[8,4,4,2])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[8,4,4,2]) -> f32[8,4,4,2] {
  %x = f32[8,4,4,2]{3,2,1,0} parameter(0)
  %copy.9 = f32[8,4,4,2]{3,2,1,0} copy(%x)
  ROOT %while.5 = (s32[], f32[8,4,4,2]{3,2,1,0}) while(%copy.9), condition=%condition, body=%body
}
"""  # noqa: E501


def test_kernels_are_classed_by_what_the_program_says_is_in_them():
    program = profile.operations(PROGRAM)
    timed = [("copy.9", 2.0), ("while.5", 99.0), *[("fusion.7", 2.0), ("dot.2", 1.0)] * 2]
    timed += [("like-dot", 1.0), ("cudnn.3", 4.0), ("gemm.4", 6.0), ("not in the text", 1.0)]
    rows = profile.kernels(program, timed)
    found = {row["name"]: (row["class"], row["ms"], row["count"]) for row in rows}
    assert found == {
        "gemm.4": ("matrix product", 6, 1),
        "fusion.7": ("convolution", 4, 2),
        "cudnn.3": ("convolution", 4, 1),
        "copy.9": ("other", 2, 1),
        "dot.2": ("matrix product", 2, 2),
        "like-dot": ("matrix product", 1, 1),
        "not in the text": ("other", 1, 1),
    }
    assert rows[0]["name"] == "gemm.4"
    assert [row["share"] for row in rows] == pytest.approx([row["ms"] / 20 for row in rows])
    (fusion,) = (row for row in rows if row["name"] == "fusion.7")
    assert fusion["result"] == "f32[8,4,4,6]"
    (held,) = fusion["holds"]
    assert held == {"class": "convolution", "operands": "f32[8,4,4,2] x f32[3,3,2,6]"}


def plane(name, **lines):
    """A plane of a trace: events by line, each with a name, milliseconds and perhaps ``hlo_op``."""
    made = [
        SimpleNamespace(
            name=line.replace("_", " "),
            events=[
                SimpleNamespace(name=event, duration_ns=1e6 * ms, stats=[*operation.items()])
                for event, ms, operation in events
            ],
        )
        for line, events in lines.items()
    ]
    return SimpleNamespace(name=name, lines=made)


def test_operations_are_found_in_the_traces_of_every_device():
    host = plane(
        "/host:CPU",
        python=[("f", 9, {})],
        worker=[("dot.2", 2, {"hlo_op": "dot.2"}), ("end: dot.2", 0, {})],
    )
    gpu = plane(
        "/device:GPU:0",
        Stream_7=[("sm90_gemm", 3, {"hlo_op": "gemm.4"}), ("Memset", 1, {})],
        XLA_Ops=[("gemm.4", 3, {"hlo_op": "gemm.4"})],
    )
    tpu = plane(
        "/device:TPU:0",
        XLA_Modules=[("jit_f", 9, {})],
        XLA_Ops=[("%fusion.7 = f32[8]{0} fusion(f32[8]{0} %p)", 4, {})],
    )
    for planes, expected in [
        ([host], [("dot.2", 2)]),
        ([host, gpu], [("gemm.4", 3), ("Memset", 1)]),
        ([tpu, host], [("fusion.7", 4)]),
    ]:
        assert list(profile.events(SimpleNamespace(planes=planes))) == expected


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")  # Python 3.13
def test_a_pass_is_profiled(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "mini-sudoku", TINY)
    args = profile.Args(preset="mini-sudoku", batch=2, evaluations=3, out=tmp_path / "out.json")
    profile.main(args)
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "device", "commit"} <= result.keys()
    rows, shares = result["kernels"], result["share_by_class"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["convolution"] > 0
    assert result["ms"]["kernels"] == pytest.approx(sum(row["ms"] for row in rows))
    assert rows[0]["name"] in shown
    convolutions = [row for row in rows if row["class"] == "convolution"]
    assert {row["count"] for row in convolutions} == {3}
    assert not [row for row in rows if row["name"].startswith("while")]
    with pytest.raises(FileExistsError, match="is not overwritten"):
        profile.main(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "x"}, "unknown preset 'x'; known: mini-sudoku, even-pixels, counting-p"),
        ({"precision": "x"}, "unknown precision 'x'; known: float32, tf32, bfloat16"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"evaluations": 0}, "evaluations must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_profiles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        profile.Args(**options)


# --- a whole device in one call -------------------------------------------------------------------


@pytest.fixture
def device_run(tmp_path):
    presets = ("mini-sudoku", "even-pixels")
    return device.Run(device.Args(out=tmp_path, preset=presets, precision=("bfloat16",), batches=3))


def test_parts_are_written_as_they_come_and_a_failure_is_left_out(device_run):
    def good(run):
        yield [1]
        yield [1, 2]

    def broken(run):
        yield {"half": True}
        raise TypeError("it broke")

    def late(run):
        assert run.found["good"] == [1, 2]
        yield 3

    def nothing(run):
        yield from ()

    parts = {
        "good": (good, ()),
        "broken": (broken, ()),
        "nothing": (nothing, ()),
        "needy": (late, ("good", "nothing")),
        "late": (late, ("good",)),
    }
    assert not device.measure(device_run, parts)
    out = device_run.args.out
    found = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    summary = found.pop("summary")
    assert found == {"good": [1, 2], "broken": {"half": True}, "late": 3}
    assert summary["left_out"] == {"broken": "TypeError: it broke", "needy": "without nothing"}
    assert {"versions", "device", "commit", "arguments"} <= summary.keys()


def test_nothing_begins_that_does_not_fit(device_run):
    assert device_run.fits("short", 400)
    assert not device_run.fits("long", 500)
    assert device_run.left_out["long"].startswith("it may take 500 s and 480 s are left")
    over = device.Run(dataclasses.replace(device_run.args, minutes=1e-9))
    assert device.measure(over, {"part": (device.agreement, ())})
    assert over.left_out == {"part": "it may take 0 s and 0 s are left"}


def test_batches_grow_until_memory_is_short(device_run, monkeypatch):
    def rows_of(presets, batch, precision, rate, how):
        (preset,) = presets
        if preset == "even-pixels" and batch > 256:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        rates = {1024: 10, 4096: 30, 16384: 20}
        settings = {"preset": preset, "batch": batch, "precision": precision}
        return [settings | {"sample_evaluations_per_second": rates.get(batch, 1)}]

    monkeypatch.setattr(throughput, "measure", rows_of)
    monkeypatch.setattr(throughput, "product_rate", lambda precision, repeats: 1e9)
    monkeypatch.setattr(throughput, "table", lambda rows: "")
    *_, rows = device.speed(device_run)
    order = [("mini-sudoku", 1024), ("even-pixels", 256), ("mini-sudoku", 4096)]
    assert [(row["preset"], row["batch"]) for row in rows] == [*order, ("mini-sudoku", 16384)]
    assert device_run.left_out == {"even-pixels, bfloat16, batch 1024": "memory is short"}
    assert device.best(rows, "mini-sudoku")["bfloat16"]["batch"] == 4096

    theirs = {"published": {"median": 40.0}, "tuned": {"median": 20.0}}
    device_run.found = {
        "speed": rows,
        "published": {"float32": {"seconds_per_evaluation": {"sampler": theirs}}},
    }
    (found,) = device.against_published(device_run)
    ratios = {"published": {"bfloat16": 40.0}, "tuned": {"bfloat16": 20.0}}
    assert found == {"preset": "even-pixels", "times_as_fast": {"float32": ratios}}

    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(throughput, "measure", fail)
    with pytest.raises(RuntimeError, match="something else"):
        list(device.speed(device_run))


def test_predictions_of_another_device_must_agree(device_run, monkeypatch):
    def predicted(found):
        monkeypatch.setattr(device, "first_predictions", lambda _: {"sigma": next(found)})

    want = np.array([1.0, 100.0])
    predicted(iter([want * (1 + 1e-5), want]))
    (found,) = device.agreement(device_run)
    assert found["largest_difference"]["sigma"] == pytest.approx(1e-5, rel=1e-3)
    for error in (1e-3, np.nan):
        predicted(iter([want + error, want]))
        with pytest.raises(ValueError, match="those of the CPU within 2e-05, they differ by"):
            list(device.agreement(device_run))


def test_a_device_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileExistsError, match="is not overwritten"):
        device.main(device.Args(out=tmp_path))
    out = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match="--ipr must be a clone"):
        device.main(device.Args(out=out, ipr=tmp_path))
    assert not out.exists()
    for options, message in [
        ({"minutes": 0}, "minutes must be above 0 and finite, got 0"),
        ({"preset": ("x",)}, "unknown preset 'x'"),
        ({"precision": ("x",)}, "unknown precision 'x'"),
        ({"batches": 0}, "batches must be a whole number of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            device.Args(out=out, **options)


@pytest.mark.heavy
def test_a_device_is_measured(tmp_path):
    assert device.main(device.Args(out=tmp_path / "out", smoke=True))
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert found.keys() == {"agreement", "boards", "speed", "kernels", "summary"}
    assert found["agreement"]["largest_difference"].keys() == set(Prediction._fields)
    assert found["boards"].keys() == {"float32", "bfloat16"}
    assert [row["batch"] for row in found["speed"]] == [1, 4]
    assert found["kernels"]["share_by_class"]["convolution"] > 0
    assert found["summary"]["left_out"] == {
        "published": "--ipr names no clone",
        "against_published": "without published",
    }


@pytest.mark.heavy
def test_a_large_run_is_measured(tmp_path):
    args = large.Args(samples=6, in_memory=4, batch_size=2, out=tmp_path / "out.json")
    large.main(args)
    found = json.loads(args.out.read_text())
    images = (6 + 6) * 32 * 32 + 3 * 6 * 32 * 32  # in uint8, and 6 that are followed
    assert images < found["written_bytes"] < 2 * images
    assert found["peak_bytes"] > 1e8
    first, last = found["in_memory_per_second"]
    assert found["ratio"] == pytest.approx(2 * found["on_disk_per_second"] / (first + last))
    with pytest.raises(FileExistsError, match="is not overwritten"):
        large.main(args)


@pytest.mark.heavy
def test_minutes_of_training_end_with_a_card(tmp_path, monkeypatch):
    recipe = RECIPES["mini-sudoku-transformer"]
    model = dataclasses.replace(recipe.model, hidden_width=16)
    monkeypatch.setitem(RECIPES, "mini-sudoku-transformer", recipe._replace(model=model))
    args = train.Args(out=tmp_path / "run", recipe="mini-sudoku-transformer", smoke=True)
    with jax.numpy_dtype_promotion("standard"):
        train.main(args)
    found = json.loads((args.out / "card.json").read_text())
    assert {"versions", "device", "commit"} <= found.keys()
    assert (found["model"]["width"], found["model"]["num_layers"]) == (16, 1)
    assert found["settings"]["minutes"] == pytest.approx(0.08)
    assert found["training"]["images"] == 8 * found["training"]["step"] > 0
    assert [row["iteration"] for row in found["test"]["mini-sudoku"]] == [0, 1]
    assert {row["samples"] for row in found["test"]["mini-sudoku"]} == {4}
    text = (args.out / "card.md").read_text()
    rate = 100 * found["test"]["mini-sudoku"][1]["valid_rate"]
    assert f"| 1 | {rate:.1f} | " in text
    assert ipr_jax.load(args.out / "run" / "model").config.width == 16
    with pytest.raises(FileExistsError):
        train.main(args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "x"}, "unknown recipe 'x'; known: mini-sudoku, even-pixels, mini-sudoku-tr"),
        ({"minutes": 0}, "minutes must be above 0 and finite, got 0"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"recipe": "mini-sudoku", "width": 8}, "width must be those of a transformer"),
        ({"width": 12}, "width must be a multiple of num_heads=8, got 12"),
        ({"recipe": "mnist-sudoku-transformer"}, "the task mnist-sudoku needs data "),
    ],
    ids=str,
)
def test_impossible_training_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(train.Args(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_training_of_other_sizes_begins_from_random_weights(tmp_path):
    given = {"out": tmp_path / "run", "recipe": "mnist-sudoku-transformer"}
    assert train.adapted(train.Args(**given)).training.weights == "digits-sudoku"
    assert train.adapted(train.Args(**given, num_layers=1)).training.weights is None


def test_every_architecture_can_be_measured():
    assert set(workload.TASKS) == set(device.FIRST_BATCH) == {*PRESETS, *TRANSFORMERS}


# --- fidelity -------------------------------------------------------------------------------------


def test_the_nearest_image_and_how_far_images_spread():
    rng = np.random.default_rng(0)
    images, real = rng.normal(size=(5, 3, 3)), rng.normal(size=(7, 3, 3))
    slow = [min(np.sqrt(((a - b) ** 2).mean()) for b in real) for a in images]
    np.testing.assert_allclose(fidelity.nearest(images, real), slow)
    labels = np.array([1, 1, 2, 2, 2])
    found = fidelity.deviations(images, labels)
    for label in (1, 2):
        mine = images[labels == label]
        assert found[labels == label].mean() == pytest.approx(mine.var(axis=0, ddof=1).mean())


def test_distinct_boards_of_uniform_draws():
    """Of the solutions of a puzzle; as many as are found by drawing."""
    puzzle = np.zeros((2, 4, 4), int)
    puzzle[1, 0] = [1, 2, 3, 4]
    assert fidelity.solutions_of(puzzle).tolist() == [288, 12]
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.integers(0, 12, 5).tolist())) for _ in range(4000)]
    error = np.std(drawn) / len(drawn) ** 0.5
    assert abs(np.mean(drawn) - fidelity.expected_distinct(12, 5)) < 4 * error


def test_real_boards_are_as_real_digits():
    """Of the other writers; the same board again and again is one board."""
    boards, number, tries = fidelity.BOARDS["mini-sudoku"], 40, 6
    batch = boards.batch("test", 0, np.arange(number * tries), (0, 0))
    image = batch.image.reshape(number, tries, *boards.image_shape)
    nothing, every = np.zeros((number, 4, 4), int), np.ones((number, 4, 4), bool)
    found = fidelity.measure(boards, image, every, nothing, seed=0)
    assert found["valid"] > 0.95 * number * tries  # the reader errs
    assert found["distance"]["value"] < 1e-6  # they are among the real ones
    for name in ("spread", "distinct"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        assert found[name]["value"] == pytest.approx(1, abs=0.04)
    same = np.repeat(image[:, :1], tries, axis=1)
    again = fidelity.measure(boards, same, every, nothing, seed=0)["distinct"]
    assert again["value"] == pytest.approx(1 / fidelity.expected_distinct(288, tries), rel=1e-6)


@pytest.mark.heavy
def test_every_method_is_measured(tmp_path, capsys):
    fidelity.main(fidelity.Args(puzzles=2, tries=2, out=tmp_path / "out.json"))
    assert "annealed, one cycle" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [fidelity.REAL, *fidelity.METHODS]
    for row in rows[1:]:
        assert 0 <= row["valid"] <= 4
        assert row["spread"]["low"] <= row["spread"]["value"] <= row["spread"]["high"]


def test_searches_are_measured_beside_refinement():
    found = fidelity.Args(verifier="oracle").methods()
    assert found.items() > fidelity.METHODS.items()
    kinds = {search.kind_of(method) for name, method in found.items() if name.endswith(", oracle")}
    assert kinds == {"oracle"}
    assert len(found) == len(fidelity.METHODS) + len(search.METHODS) - len(search.GRADIENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "even-pixels"}, "task must be one of mini-sudoku, digits-sudoku, got 'even-pix"),
        ({"tries": 0}, "tries must be a whole number of at least 1, got 0"),
        ({"verifier": "luck"}, "verifier of mini-sudoku must be one of oracle, .*, got 'luck'"),
    ],
)
def test_bad_measurements_of_fidelity_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fidelity.Args(**options)
