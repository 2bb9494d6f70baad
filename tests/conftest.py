"""Strict settings for every test, and the recorded behaviour of the published code."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

from convert import mapping, torch_file  # noqa: E402
from ipr_jax import SRM, ModelConfig  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
PREFIXES = {"ema": "ema_denoiser.module.", "raw": "denoiser."}


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return {key: file[key] for key in file.files}


def golden_config(name: str) -> ModelConfig:
    described = json.loads((GOLDEN / name / "config.json").read_text())
    return ModelConfig(
        image_size=tuple(described["image_shape"]),
        channels=described["channels"],
        patch_size=described["patch_size"],
        widths=tuple(described["hid_dims"]),
        attention=tuple(described["attention"]),
        num_blocks=described["num_blocks"],
        time_width=described["t_emb_dim"],
        num_frequencies=described["d_emb"],
        head_width=described["num_head_channels"],
    )


def golden_model(name: str, weights: str) -> SRM:
    tensors = torch_file.state_dict(GOLDEN / name / "last.ckpt", PREFIXES[weights])
    return mapping.to_model(tensors, golden_config(name))


def nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -3, -1))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
