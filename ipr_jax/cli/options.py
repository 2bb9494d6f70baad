"""Options that several commands share, and how they open the task and the model they name."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax

from ipr_jax.cli.terminal import naming
from ipr_jax.methods import NOISES, REGIONS, Annealed, Guided, Refinement, Stop, stopping
from ipr_jax.models import Model, checkpoint, get_precision
from ipr_jax.models.networks import open_network
from ipr_jax.runtime import Size
from ipr_jax.sampling import ORDERS, REFINEMENT, Sampling
from ipr_jax.studies import experiments, search
from ipr_jax.tasks import Task, counting_polygons, get_task, missing, mnist_classifier
from ipr_jax.tasks.polygon_classifier import read_counts
from ipr_jax.tasks.registry import TAKES

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Whose samples, and where to.

    Attributes:
        model: a shipped model or a model folder; by default the best that ships for the task.
        difficulty: of 9x9 puzzles: easy, medium or hard (54-80, 27-53 or 0-26 given cells); by
            default medium for refine, else hard.
        data: folder of MNIST or of backgrounds, for the tasks that take one.
        classifier: model folder of a converted classifier, for the tasks that need one and, instead
            of the one that comes with the package, for mnist-sudoku.
        precision: of the network: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16.
        seed: of samples and noise.
        out: the folder; by default one under results/.
    """

    model: str | None = None
    difficulty: str | None = None
    data: Path | None = None
    classifier: Path | None = None
    precision: str = "float32"
    seed: int = 0
    out: Path | None = None

    def open(self, task: str) -> "Opened":
        """The task of a name with its data and classifier, and the model.

        Raises:
            ValueError, FileNotFoundError: unknown, or something is missing or does not fit.
        """
        get_precision(self.precision)
        ships = self.model is not None or task in checkpoint.DEFAULTS
        lacks = {} if ships else {"model": "a folder, none ships"}
        made, classifier = self.benchmark(task, lacks)
        model, provenance = _open_model(self.model or checkpoint.DEFAULTS[task], made)
        described = {
            "model": dataclasses.asdict(model.config),
            "provenance": provenance,
            "difficulty": self.difficulty,
            "data": self.data and str(self.data),
            "classifier": classifier,
        }
        return Opened(made, model, described)

    def benchmark(
        self, task: str, lacks: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[Task, dict[str, Any] | None]:
        """The task of a name with its data and classifier, and the provenance of that.

        Args:
            task: its name.
            lacks: what else is missing, by option, and what it has to be.

        Raises:
            ValueError, FileNotFoundError: unknown, or something is missing or does not fit.
        """
        given = {"difficulty": self.difficulty, "data": self.data, "classifier": self.classifier}
        lacks = {**missing(task, **given), **lacks}
        if lacks:
            needs = ", ".join(f"--{option} ({what})" for option, what in lacks.items())
            raise ValueError(f"the task {task} needs {needs}")
        classify, classifier = (
            _open_classifier(self.classifier, task) if self.classifier else (None, None)
        )
        if classify is None and "classifier" in TAKES[task]:
            classifier = {"package": mnist_classifier.WEIGHTS.name}
        made = get_task(task, difficulty=self.difficulty, data=self.data, classify=classify)
        return made, classifier


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """How many samples at once.

    Attributes:
        batch_size: samples per compiled call; "auto" = as many as fit on the device.
    """

    batch_size: Size = 64


class Opened(NamedTuple):
    """What the options name.

    Attributes:
        task: the benchmark.
        model: makes its images.
        described: JSON data that tells which they are.
    """

    task: Task
    model: Model
    described: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PassOptions:
    """What to do; what is not given is as in the paper, for the task.

    Attributes:
        method: ipr (the paper's, the default but of refine for Sudoku), annealed (one evaluation
            per iteration, of fewer and fewer patches), least-doubted (of several samples, the
            network's choice), or a search with a verifier: best-of-n, svdd, smc, das, fk-steering,
            bfs, treeg, dsearch, dfs, sop, abcd, rbf, langevin, bfs-langevin, dfs-langevin,
            ipr-accept or ipr-chains.
        verifier: of a search: oracle (what grades), independent, independent-soft (with a gradient)
            or internal (the network's own certainty).
        budget: of a search and of least-doubted, network evaluations that no sample exceeds; by
            default those of 4 first passes.
        iterations: of ipr, after the first pass (20); of annealed, in a cycle (40).
        cycles: of annealed, the best of which is kept.
        calm: of annealed: the doubt below which a sample needs no other cycle; 0 = it has them all.
        ratio: share of the editable patches that an iteration regenerates, in (0, 1].
        steps_per_patch: network evaluations for a single patch.
        overlap: share of its schedule that a patch has in common with the next, in [0, 1].
        first_steps_per_patch: network evaluations for a single patch, in the first pass.
        first_overlap: overlap in the first pass, in [0, 1].
        stochasticity: 0 = deterministic to 1 = ancestral.
        temperature: factor of every step's noise, at least 0.
        order: which patch is denoised next: certain, uncertain, random or raster.
        regions: which patches an iteration regenerates: random ones (fresh), rather those that the
            network disagreed with (informed), or those of the first iteration (fixed); by default
            informed for annealed, else fresh.
        noise: fresh noise in every iteration, or the initial one again.
    """

    # Iterations of ipr.
    USUAL: ClassVar[int] = 20
    method: str | None = None
    verifier: str | None = None
    budget: int | None = None
    iterations: int | None = None
    cycles: int = Annealed.cycles
    calm: float = Annealed.calm
    ratio: float = 0.25
    steps_per_patch: int | None = None
    overlap: float | None = None
    first_steps_per_patch: int | None = None
    first_overlap: float | None = None
    stochasticity: float = REFINEMENT.stochasticity
    temperature: float = REFINEMENT.temperature
    order: str = "certain"
    regions: str | None = None
    noise: str = "fresh"

    def chosen(self, task: str, opened: Task | None = None) -> Any:
        """What to do for a task, checked.

        Args:
            task: its name.
            opened: it, for verifiers.

        Raises:
            ValueError: a value is out of range, a name unknown, or an option has no effect.
        """
        name = self.method or "ipr"
        if name in METHODS:
            refuse_idle(self, f"--method {name} asks no verifier", "verifier", "budget")
            return METHODS[name](self, task)
        known = (*METHODS, *search.METHODS)
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
        if opened is None:
            raise ValueError(f"the method must be one of {', '.join(METHODS)} here, got {name!r}")
        verifier = self.verifier or (search.INTERNAL if name in search.ALONE else None)
        if verifier is None:
            raise ValueError(f"--method {name} needs --verifier, see --help")
        refuse_idle(self, f"--method {name} spends its --budget", "iterations", "cycles", "calm")
        plain = self.refinement(task)
        if not name.startswith("ipr-"):
            idle = ("ratio", "regions", "noise", "steps_per_patch", "overlap")
            refuse_idle(self, f"--method {name} has a first pass only", *idle)
        assert isinstance(plain.first, Sampling)
        assert isinstance(plain.later, Sampling)
        made = search.made(
            opened,
            name,
            verifier,
            first=plain.first,
            later=plain.later,
            ratio=self.ratio,
            budget=self.budget,
        )
        if isinstance(made, Guided):
            changes = {"select": plain.select, "noise": plain.noise}
            refinement = dataclasses.replace(made.refinement, **changes)
            made = dataclasses.replace(made, refinement=refinement)
        return made

    def refinement(self, task: str) -> Refinement:
        """The paper's method for a task, checked.

        Raises:
            ValueError: as ``chosen``.
        """
        refuse_idle(self, "--method ipr has no cycles", "cycles", "calm")
        shared = {
            "stochasticity": self.stochasticity,
            "temperature": self.temperature,
            "order": _known("order", self.order, ORDERS),
        }
        first, later = _known("task", task, experiments.SETTINGS)

        def sampling(base: Sampling, steps: int | None, overlap: float | None) -> Sampling:
            return dataclasses.replace(
                base,
                steps_per_patch=base.steps_per_patch if steps is None else steps,
                overlap=base.overlap if overlap is None else overlap,
                **shared,
            )

        with naming({name: f"first_{name}" for name in ("steps_per_patch", "overlap")}):
            first = sampling(first, self.first_steps_per_patch, self.first_overlap)
        return Refinement(
            iterations=self.USUAL if self.iterations is None else self.iterations,
            ratio=self.ratio,
            select=_known("regions", self.regions or "fresh", REGIONS),
            noise=_known("noise", self.noise, NOISES),
            first=first,
            later=sampling(later, self.steps_per_patch, self.overlap),
        )

    def annealed(self, task: str) -> Annealed:
        """Annealed refinement, checked.

        Raises:
            ValueError: as ``chosen``.
        """
        _known("task", task, experiments.SETTINGS)
        idle = ("ratio", "steps_per_patch", "overlap", "temperature", "order", "noise")
        idle += ("first_steps_per_patch", "first_overlap")
        why = "--method annealed has a schedule of its own (that of --method ipr is free)"
        refuse_idle(self, why, *idle)
        return Annealed(
            iterations=Annealed.iterations if self.iterations is None else self.iterations,
            cycles=self.cycles,
            calm=self.calm,
            select=_known("regions", self.regions or "informed", REGIONS),
            stochasticity=self.stochasticity,
        )


METHODS: dict[str, Callable[[PassOptions, str], Refinement | Annealed]] = {
    "ipr": PassOptions.refinement,
    "annealed": PassOptions.annealed,
}
"""What the options mean, by method."""


@dataclasses.dataclass(frozen=True)
class RefinementOptions(PassOptions, TaskOptions):
    """Whose samples, and how to refine them."""


def get_rule(name: str, task: Task) -> Stop:
    """The rule of a name by which samples of a task leave early; equal ones are compiled anew.

    Args:
        name: none; unchanged, where the task reads something in its images; or verified, where
            those leave that the headline score finds solved.
        task: whose samples.

    Raises:
        ValueError: the task has no such rule; lists those that it has.
    """
    rules: dict[str, Stop] = {"none": stopping.never}
    if task.read is not None:
        rules["unchanged"] = stopping.unchanged(task.read)
    rules["verified"] = stopping.verified(lambda images: task.score(images)[task.headline])
    if name not in rules:
        raise ValueError(
            f"stop must be one of {', '.join(rules)} for the task {task.name}, got {name!r}"
        )
    return rules[name]


def typed(words: Iterable[str]) -> dict[str, str]:
    """How the options on a command line were typed, by the argument that each became."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    found = {option[2:].replace("-", "_"): option for option in options}
    renamed = {"pairs": "swapped", "backgrounds": "data"}
    return found | {name: found[option] for name, option in renamed.items() if option in found}


def refuse_idle(options: Any, because: str, *names: str) -> None:
    """Refuse options that have no effect beside others.

    Args:
        options: a dataclass.
        because: why they have none.
        *names: of its fields.

    Raises:
        ValueError: one of them is not as by default.
    """
    for name in names:
        if getattr(options, name) != getattr(type(options), name):
            raise ValueError(f"{because}, leave out --{name.replace('_', '-')}")


def new_folder(options: TaskOptions, name: str) -> Path:
    """That of the options, or a new one."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return options.out or Path("results") / f"{name}-{now}"


def same_folder(folder: Path, options: Any, default: Any) -> Path:
    """That of the same command, which goes on there: options other than by default have another."""
    usual = plain(default)
    given = {name: v for name, v in plain(options).items() if name != "out" and v != usual[name]}
    return folder.with_name(f"{folder.name}-{digest(json.dumps(given))}") if given else folder


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def plain(options: Any) -> dict[str, Any]:
    """Options as JSON data."""
    fields = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def _open_classifier(path: Path, task: str) -> tuple[Callable[[jax.Array], Any], dict[str, Any]]:
    """What the images of a task show, by the classifier in a folder, and its provenance.

    Raises:
        ValueError, FileNotFoundError: there is none, or it is another task's.
    """
    with naming({"model": "classifier"}):
        network, provenance = open_network(path)
    needed = {"mnist-sudoku": mnist_classifier.MNISTConfig()} | {
        f"counting-{name}": variant.counts for name, variant in counting_polygons.VARIANTS.items()
    }
    if task in needed and network.config != needed[task]:
        raise ValueError(
            f"{path} must hold the classifier of {task}, {needed[task]}, it holds {network.config}"
        )
    if isinstance(network.config, mnist_classifier.MNISTConfig):
        return lambda tiles: mnist_classifier.read_digits(network(tiles)), provenance
    return lambda images: read_counts(network(images), network.config), provenance


def _open_model(name: str, task: Task) -> tuple[Model, dict[str, Any]]:
    """A model that makes the images of a task, and its provenance.

    Raises:
        ValueError, FileNotFoundError: there is none, or its images are others.
    """
    model, provenance = checkpoint.open_model(name)
    made, needed = (
        f"{source.image_shape} in {source.grid[0]} x {source.grid[1]} patches of "
        f"{source.patch_size}"
        for source in (model.config, task)
    )
    if made != needed:
        raise ValueError(f"{name} makes images {made}, the task {task.name} needs {needed}")
    return model, provenance


def _known(kind: str, name: str, table: Mapping[str, Value]) -> Value:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(table)}")
    return table[name]
