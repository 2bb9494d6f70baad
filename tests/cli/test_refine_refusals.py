"""The command refine: folders, options and models that it refuses."""

import dataclasses

import pytest
from conftest import IPR, SHORT, TINY, call
from short_runs import EXAMPLE, SHIPPED, names_in, save_random


def test_an_existing_folder_is_left_alone(tiny_folder, work):
    (work / "old").mkdir()
    (work / "old" / "kept").write_text("as it was")
    code, out, err = call("refine", *IPR, "--model", tiny_folder, *SHORT, "--out", "old")
    assert (code, out) == (2, "")
    assert err == "error: old exists and holds no run; choose another folder\n"
    assert names_in(work / "old") == ["kept"]
    assert (work / "old" / "kept").read_text() == "as it was"
    code, _, err = call("refine", *IPR, "--model", tiny_folder, *SHORT, "--out", "old/kept/below")
    assert (code, err.count("\n")) == (2, 1)
    assert "Not a directory: 'old/kept/below'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--task", "chess"),
            "unknown --task 'chess'; known: mini-sudoku, digits-sudoku, mnist-su",
        ),
        (
            ("--task", "mnist-sudoku"),
            "the --task mnist-sudoku needs --data (a folder with MNIST)",
        ),
        (("--difficulty", "easy"), "the --task mini-sudoku takes no --difficulty"),
        (("--classifier", "mini-sudoku"), "the --task mini-sudoku takes no --classifier"),
        (("--data", "x"), "the --task mini-sudoku takes no --data"),
        (
            ("--task", "counting-stars", "--classifier", "nope"),
            f"no --classifier at 'nope': give a model folder or one of {SHIPPED}",
        ),
        (("--swapped", "-1"), "--swapped must be a whole number of at least 0, got -1"),
        (("--swapped", "9"), "--swapped must be in 1..8 on a 4x4 board, got 9"),
        (
            ("--swapped", "1", "--puzzle", EXAMPLE),
            "--puzzle is a board of its own, leave out --swapped",
        ),
        (("--swapped", "1", "--first-overlap", "0"), "are, leave out --first-overlap"),
        (("--task", "digits-sudoku", "--difficulty", "x"), "unknown --difficulty 'x'; known: "),
        (
            ("--model", "no[v2]"),
            f"no --model at 'no[v2]': give a model folder or one of {SHIPPED}",
        ),
        (("--model", "."), "is not a model of ipr_jax: "),
        (("--order", "x"), "unknown --order 'x'; known: certain, uncertain, random, raster"),
        (("--regions", "x"), "unknown --regions 'x'; known: fresh, fixed"),
        (("--noise", "[x]"), "unknown --noise '[x]'; known: fresh, initial"),
        (("--ratio", "0"), "--ratio must be in (0, 1], got 0.0"),
        (("--ratio=1.5",), "--ratio must be in (0, 1], got 1.5"),
        (("--overlap", "1.1"), "--overlap must be in [0, 1], got 1.1"),
        (("--precision", "fp8"), "unknown --precision 'fp8'; known: float32, tf32, bfloat16"),
        (("--first-overlap", "-0.5"), "--first-overlap must be in [0, 1], got -0.5"),
        (
            ("--steps-per-patch", "0"),
            "--steps-per-patch must be a whole number of at least 1, got 0",
        ),
        (
            ("--first_steps_per_patch", "0"),
            "--first_steps_per_patch must be a whole number of at least 1, got 0",
        ),
        (
            ("--first-steps-per-patch", "0", "--steps-per-patch", "1"),
            "--first-steps-per-patch must be a whole number of at least 1, got 0",
        ),
        (("--samples", "0"), "--samples must be a whole number of at least 1, got 0"),
        (("--iterations", "-1"), "--iterations must be a whole number of at least 0, got -1"),
        (("--temperature", "-1"), "--temperature must be finite and at least 0, got -1.0"),
        (("--temperature", "nan"), "--temperature must be finite and at least 0, got nan"),
        (("--stochasticity", "2"), "--stochasticity must be in [0, 1], got 2.0"),
        (("--seed", "-1"), "--seed must be a whole number of at least 0, got -1"),
        (("--seed", "4294967296"), "--seed must be below 4294967296, got 4294967296"),
        (("--batch-size", "0"), '--batch-size must be a whole number of at least 1 or "auto", go'),
        (("--shard-size", "0"), "--shard-size must be a whole number of at least 1, got 0"),
        (("--dtype", "u1"), "--dtype must be uint8 or float32, got 'u1'"),
        (("--save-minutes", "-1"), "--save-minutes must be at least 0, got -1.0"),
        (("--puzzle", "1..4"), f"4x4 --puzzle must be 16 .* got 4 in '1..4'; valid: '{EXAMPLE}'"),
        (
            ("--puzzle", "5" * 16),
            f"out of 1..4 .* got '5' in row 1, column 1 of '{'5' * 16}'; valid: '{EXAMPLE}'",
        ),
        (
            ("--puzzle", "1..1 .... .... ...."),
            "a --puzzle must have a solution, got one where row 1 has the digit 1 in r1c1 and r1c4",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny_folder, work, words, message):
    """It names the option as it was typed."""
    if "--model" not in words:
        words = ("--model", tiny_folder, *words)
    if not {"--task", "--method"} & set(words):
        words = (*IPR, *words)
    code, out, err = call("refine", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    for part in message.split(" .* "):
        assert part in err
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (16, 16)}, "makes images (16, 16, 1) in 2 x 2 patches of 8"),
        ({"patch_size": 4}, "makes images (32, 32, 1) in 8 x 8 patches of 4"),
    ],
)
def test_a_model_of_other_images_is_refused(tmp_path, work, change, message):
    other = save_random(tmp_path / "other", dataclasses.replace(TINY, **change))
    code, out, err = call("refine", *IPR, "--model", other)
    assert (code, out) == (2, "")
    needs = "the task mini-sudoku needs (32, 32, 1) in 4 x 4 patches of 8"
    assert err == f"error: {other} {message}, {needs}\n"
    assert [path.name for path in work.iterdir()] == ["other"]
