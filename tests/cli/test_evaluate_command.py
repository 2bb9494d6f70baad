"""The command evaluate: what it needs, and where it writes."""

import re

import numpy as np
from conftest import call

from ipr_jax.methods.engine import Costs
from ipr_jax.studies import evaluate, experiments


def test_all_that_a_task_needs_is_said_at_once(work):
    code, out, err = call("evaluate", "counting-stars")
    assert (code, out) == (2, "")
    assert err == (
        "error: the task counting-stars needs --classifier (the folder of a converted one), "
        "--model (a folder, none ships)\n"
    )


def test_evaluations_are_new_folders_each(tiny_folder, work, monkeypatch):
    """Of 4 samples, 2 break at the first iteration and 1 at the second: that is said."""

    def told(task, denoise, batch, refinement, key, *, batch_size):
        for number in range(3):
            finite = np.arange(4) >= (0, 2, 3)[number]
            nfe = np.zeros(4, np.int64)
            scores = {"valid": finite, "violations": nfe}
            yield evaluate.Progress(
                number, batch.image, None, scores, finite, Costs(*[nfe] * 3), 1.0, 1.0, 1.0, 4
            )

    monkeypatch.setattr(experiments, "evaluate", told)
    words = ("evaluate", "mini-sudoku", "--model", tiny_folder, "--iterations", 2)
    for _ in range(2):
        code, out, err = call(*words, "--samples", 4)
        assert (code, err) == (0, "")
        said = "not finite and not counted: 3 samples (2 at iteration 1, 1 at iteration 2)"
        assert said in out.splitlines()
    folders = sorted((work / "results").iterdir())
    assert [re.sub(r"[\d-]+$", "", path.name) for path in folders] == ["evaluate-mini-sudoku"] * 2
    assert out.endswith(f"\n\nwritten: results/{folders[-1].name}\n")
    _, out, _ = call(*words, "--samples", 4, "--out", "run[v2]")
    assert out.endswith("\n\nwritten: run[v2]\n")
    _, _, err = call(*words, "--samples", 5, "--out", "run[v2]")
    said = "run[v2] holds a run of another configuration (samples is 4 there and 5 here); choose"
    assert err == f"error: {said} another folder or the settings in run[v2]/config.json\n"
