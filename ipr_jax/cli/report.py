"""``ipr-jax report RUN``."""

import json
from pathlib import Path
from typing import Annotated

import tyro

from ipr_jax.cli.options import TaskOptions
from ipr_jax.cli.terminal import say
from ipr_jax.runtime import files


def report(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
) -> None:
    """Make the page of a finished run or experiment again: report.html in its folder.

    It shows the first samples of a run after every iteration, the curves with their 95% intervals,
    settings and versions; one file, which needs no network.

    Args:
        run: the folder that refine, evaluate or experiment has written; the data and the classifier
            of its task must be where they were.
    """
    from ipr_jax.studies import report as pages

    path = run / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no config.json in {run}: {files.contents(run)}")
    with files.reading(path):
        config = json.loads(path.read_text())
    if "arms" in config:
        page = pages.of_experiment(run)
    elif "arguments" not in config:
        raise ValueError(
            f"{run} was not written by ipr-jax refine; for a run of shards.refine write the page "
            "with ipr_jax.studies.report: write(folder, of_run(folder, task))"
        )
    else:
        with files.reading(path):
            given, start = config["arguments"], config["start"]
            name, difficulty = given["task"], given["difficulty"]
            data, classifier = (
                given[each] and Path(given[each]) for each in ("data", "classifier")
            )
        options = TaskOptions(difficulty=difficulty, data=data, classifier=classifier)
        page = pages.of_run(run, options.benchmark(name)[0], start)
    say(f"written: {pages.write(run, page)}")
