"""The package as a whole: public names, documentation, imports, random numbers, the README."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ipr_jax
from ipr_jax.cli.evaluate import EvaluateOptions
from ipr_jax.cli.experiment import ExperimentOptions
from ipr_jax.cli.export import ExportOptions
from ipr_jax.cli.refine import RefineOptions
from ipr_jax.cli.stream import StreamOptions
from ipr_jax.methods.ipr import Refinement
from ipr_jax.models import checkpoint
from ipr_jax.models.config import ModelConfig
from ipr_jax.sampling.settings import Sampling
from ipr_jax.studies.experiments import Experiment
from ipr_jax.tasks.base import Task
from ipr_jax.tasks.counting_polygons import Variant
from ipr_jax.tasks.polygon_classifier import PolygonConfig
from ipr_jax.training.trainer import TrainConfig

ROOT = Path(__file__).parents[1]
ROOMS = (
    *("core", "runtime", "tasks", "sampling", "models", "methods", "training", "studies"),
    "cli",
)
"""The folders of the package; each imports only from those before it."""
OUTSIDE = {"ipr_jax.interrupts", "ipr_jax.public", "ipr_jax.__main__"}
"""The files that are in none: the first imports nothing of the package and may be imported by all,
the others only gather."""
TOOLS = {
    *("conftest.py", "eight_devices.py", "damaged_checkpoints.py", "small_run.py"),
    *("converted.py", "lightning.py", "short_runs.py", "torch_writer.py", "toys.py"),
}
"""Files of the tests without a test."""


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def trees(*folders):
    """Every Python file of the folders, parsed, by module name."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {name_of(path): ast.parse(path.read_text(), str(path)) for path in paths}


LIBRARY = trees("ipr_jax")
CONVERTER = trees("convert")
ALL = trees("ipr_jax", "convert", "benchmarks")


def imported(tree):
    """The modules that a file imports anywhere, ``from package import module`` resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in ALL else node.module


def described(tree):
    """The module-level names that have a docstring, a constant's being the text below it."""
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if ast.get_docstring(node):
                yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if text and isinstance(below.value.value, str):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (target.id for target in targets)


# --- names and documentation ----------------------------------------------------------------------


def test_the_public_names_are_all_of_them_and_described():
    public = {name for name in vars(ipr_jax.public) if not name.startswith("_")}
    assert public == set(ipr_jax.__all__) <= set(dir(ipr_jax))
    assert sorted(ipr_jax.__all__, key=sort_key) == ipr_jax.__all__
    found = {}
    for node in LIBRARY["ipr_jax.public"].body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name: node.module for alias in node.names}
    assert set(found) == public
    for name, face in found.items():
        homes = {
            alias.name: node.module
            for node in LIBRARY[face].body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        module = homes[name]
        assert name in described(LIBRARY[module]), f"{module}.{name} has no docstring"
        assert getattr(ipr_jax, name) is getattr(importlib.import_module(module), name)
    assert not hasattr(ipr_jax, "lod")


def sort_key(name):
    """Constants, then classes and types, then functions."""
    return (not name.isupper(), not name[0].isupper(), name)


@pytest.mark.parametrize("module", ALL)
def test_everything_public_has_a_docstring(module):
    tree = ALL[module]
    assert ast.get_docstring(tree), "the module"
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = {node.name for node in definitions if not node.name.startswith("_")}
    assert not public - set(described(tree))


@pytest.mark.parametrize(
    "config",
    [
        *(
            ModelConfig,
            Sampling,
            Refinement,
            TrainConfig,
            RefineOptions,
            EvaluateOptions,
            StreamOptions,
            ExperimentOptions,
            ExportOptions,
        ),
        *(PolygonConfig, Variant, Task, Experiment),
    ],
)
def test_every_field_is_read_and_explained(config):
    """Outside of the validation of its value; and named in the docstring."""
    checks = [
        node
        for tree in LIBRARY.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
    ]
    inside = {id(node) for check in checks for node in ast.walk(check)}
    read = {
        node.attr
        for tree in LIBRARY.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and id(node) not in inside
    }
    names = {field.name for field in dataclasses.fields(config)}
    assert names
    assert not names - read
    documented = "".join(inspect.getdoc(base) or "" for base in config.__mro__[:-1])
    assert not [name for name in names if f"\n    {name}: " not in documented]


# --- imports --------------------------------------------------------------------------------------


def room_of(module):
    """The folder that a module is in, or None."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def arrows(files):
    """Which modules each file imports, of the package."""
    return {name: {each for each in imported(tree) if each in ALL} for name, tree in files.items()}


def test_every_file_is_in_a_room():
    assert {name for name in LIBRARY if room_of(name) is None} == {"ipr_jax", *OUTSIDE}


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_runs_upward(room):
    below = {"ipr_jax.interrupts"} | (set(CONVERTER) if room == "cli" else set())
    for name, own in arrows(LIBRARY).items():
        if room_of(name) == room:
            above = {
                each for each in own - below if room_of(each) not in ROOMS[: ROOMS.index(room) + 1]
            }
            assert not above, name


@pytest.mark.parametrize("files", [LIBRARY, CONVERTER], ids=["ipr_jax", "convert"])
def test_no_imports_run_in_a_circle(files):
    """Files import each other directly: the face of a folder is for those outside of it."""
    faces = {name for name in files if files is LIBRARY and name.count(".") < 2} - OUTSIDE
    inside = {
        name: {each for each in own if each in files and room_of(each) == room_of(name)}
        for name, own in arrows(files).items()
        if name not in faces
    }
    graphlib.TopologicalSorter(inside).prepare()
    assert not [name for name, own in inside.items() if own & faces]


@pytest.mark.parametrize("room", ROOMS[:-1])
def test_the_face_of_a_room_is_what_others_use(room):
    face = importlib.import_module(f"ipr_jax.{room}")
    used = {
        alias.name
        for name, tree in ALL.items()
        if room_of(name) != room
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == f"ipr_jax.{room}"
        for alias in node.names
    }
    lazy = {name for name in used if f"ipr_jax.{room}.{name}" in ALL}
    assert set(face.__all__) <= used
    assert used <= set(face.__all__) | lazy


def test_the_rooms_and_the_packages_are_listed():
    layout = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where what lives")[2]
    listed = re.findall(r"^(?:ipr_jax/)?(\w+)/ {2,}", layout, re.MULTILINE)
    assert listed == [*ROOMS, "convert", "benchmarks", "tests", "docs"]


@pytest.mark.parametrize("module", ALL)
def test_neither_torch_nor_anything_undeclared_is_imported(module):
    declared = {"chex", "flax", "jax", "matplotlib", "ml_dtypes", "numpy", "optax", "orbax"}
    declared |= {"PIL", "psutil", "rich", "safetensors", "scipy", "sklearn", "tyro"}
    declared |= {"ipr_jax", "convert", "benchmarks"}
    tops = {name.partition(".")[0] for name in imported(ALL[module])}
    assert tops <= declared | set(sys.stdlib_module_names)


def test_the_import_is_quick_and_light():
    """What is heavy and not needed to sample is loaded when it is used; before a command answers
    Ctrl-C, nothing is.
    """
    code = """
import json, sys, time
import ipr_jax.__main__, benchmarks, convert
first = sorted(sys.modules)
import chex, flax.nnx, jax, jax.numpy, numpy, optax, orbax.checkpoint
before = set(sys.modules)
start = time.process_time()
ipr_jax.refine
seconds = time.process_time() - start
new = sorted(set(sys.modules) - before)
import benchmarks.peers, benchmarks.published
print(json.dumps([first, seconds, new, sorted(sys.modules)]))
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    first, seconds, new, loaded = json.loads(done.stdout)
    own = {name for name in first if name.startswith("ipr_jax")}
    assert own == {"ipr_jax", "ipr_jax.__main__", "ipr_jax.interrupts"}
    assert not {"jax", "numpy"} & set(first)
    assert "ipr_jax.methods.refinement" in new
    assert seconds < 2
    heavy = {"sklearn", "matplotlib", "tyro", "rich", "scipy", "PIL", "convert", "benchmarks"}
    assert not heavy & {name.partition(".")[0] for name in new}
    assert "torch" not in loaded
    later = {"ipr_jax.tasks", "ipr_jax.training", "ipr_jax.studies.evaluate", "ipr_jax.cli"}
    assert not later & set(new)


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", LIBRARY)
def test_random_numbers_come_from_new_style_keys_and_own_generators(module):
    tree = LIBRARY[module]
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    hidden = re.compile(r"(np|numpy)\.random\.(?!default_rng\b|Generator\b)")
    assert not [name for name in used if hidden.match(name) or name.endswith(".PRNGKey")]
    assert not {"random", "numpy.random"} & set(imported(tree))


# --- tests and README -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_every_file_here_is_collected(path):
    if path.name in TOOLS:
        return
    assert path.name.startswith("test_")
    names = [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    tests = [name for name in names if name.startswith(("test_", "Test"))]
    assert tests
    assert len(tests) == len(set(tests)), "the second test of a name hides the first"


README = ROOT / "README.md"


@pytest.mark.gate
def test_the_first_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    example = re.search(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert example, "the README has a Python example"
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "README.md", "exec"), {"__name__": "__main__"})


def test_shipped_models_are_small_and_say_nothing_of_the_machine_that_saved_them():
    for name in checkpoint.SHIPPED:
        inside = [
            path for path in (ROOT / "ipr_jax" / "models" / name).rglob("*") if path.is_file()
        ]
        assert sum(path.stat().st_size for path in inside) < 8e6
        assert "SHA256SUMS" in {path.name for path in inside}
        assert "commit_success.txt" not in {path.name for path in inside}  # Orbax's, has the path
        assert (ROOT / "ipr_jax" / "models" / f"{name}.md").read_text().startswith(f"# {name}\n")


def test_the_links_of_the_readme_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert links
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]
