"""The programs that commands keep on disk: where, when not, and what they save."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from conftest import IPR, call

from ipr_jax.runtime import cache

SETTINGS = {"jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True}


@pytest.fixture
def enable(monkeypatch):
    """What ``cache.enable`` changes of some settings."""

    def run(**settings):
        changed = {}
        config = SimpleNamespace(values=SETTINGS | settings, update=changed.__setitem__)
        with monkeypatch.context() as patch:
            patch.setattr(cache.jax, "config", config)
            cache.enable()
        return changed

    return run


@pytest.mark.parametrize(
    ("home", "caches", "path"),
    [("mine", "", "mine/.cache/ipr_jax"), ("mine", "other", "other/ipr_jax")],
)
def test_the_folder_is_made_among_the_users_caches(
    enable, monkeypatch, tmp_path, home, caches, path
):
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setenv("XDG_CACHE_HOME", caches and str(tmp_path / caches))
    assert enable()["jax_compilation_cache_dir"] == str(tmp_path / path)
    assert (tmp_path / path).is_dir()
    assert (tmp_path / path).stat().st_mode & 0o077 == 0
    assert enable()["jax_persistent_cache_min_compile_time_secs"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"jax_compilation_cache_dir": "theirs"},
        {"jax_compilation_cache_dir": "gs://bucket/theirs"},
        {"jax_enable_compilation_cache": False},
    ],
)
def test_the_users_own_settings_come_first(enable, monkeypatch, tmp_path, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.chdir(tmp_path)
    assert not enable(**settings)
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("how", ["no folder", "no access"])
def test_a_folder_that_cannot_be_written_to_is_said_and_not_used(
    enable, monkeypatch, tmp_path, whose, how
):
    caches = tmp_path / "file"
    if how == "no folder":
        caches.write_text("")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    settings = {} if whose == "ours" else {"jax_compilation_cache_dir": str(caches / "ipr_jax")}
    said = f"no compiled programs are kept: {caches / 'ipr_jax'} cannot be written to"
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
        assert enable(**settings) == {"jax_enable_compilation_cache": False}


def test_commands_of_the_tests_keep_nothing():
    assert call("nope")[0] == 2
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.gate
def test_the_second_run_compiles_nothing(tmp_path):
    """Of the shipped model on one sample."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "caches")}
    words = (sys.executable, "-m", "ipr_jax", "refine", *IPR, "--samples", "1", "--iterations", "1")

    def run(name):
        command = [*words, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        kept = sorted(path.name for path in (tmp_path / "caches" / "ipr_jax").iterdir())
        lines = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        return kept, [(line["valid"], line["nfe"]) for line in lines]

    kept, first = run("cold")
    assert any(name.startswith("jit_advance_on") for name in kept)
    assert run("warm") == (kept, first)
