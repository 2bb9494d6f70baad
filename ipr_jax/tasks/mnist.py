"""MNIST and the published boards of MNIST Sudoku, read from a user's files.

Shapes: N images, H = W = 28, values in [-1, 1], -1 = background, 1 = full ink; M boards.

Nothing is downloaded. Damaged and foreign files are refused by name.
"""

import csv
import gzip
import math
import os
from pathlib import Path

import numpy as np
import safetensors

from ipr_jax.core import check
from ipr_jax.runtime import files
from ipr_jax.tasks import sudoku
from ipr_jax.tasks.base import SPLITS, Split

SIDE = 28
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
RELEASE_URL = "datasets.zip of https://github.com/Chrixtar/SRM/releases"
HUB_URL = "https://huggingface.co/datasets/BartekPog/mnist-sudoku"

PLACES = ("", "raw", "MNIST/raw")
"""Where in a folder the files of MNIST may be."""
PACKED = "a gzip file (unpack it first)"
"""What ``files.kind_of`` calls them if they are packed."""

HUB_FILE = "sudoku-mnist.safetensors"
BOARDS_FILE = "sudokus.npy"
CONFIDENCES_FILE = "top_5000_values.csv"
NUM_TEST_BOARDS = 10_000
"""The last of the published boards; the others are for training."""
IMAGES_PER_DIGIT = 1000
"""How many images of each digit the published models were trained with (``top_n``)."""
NUM_TRAINING = 8_000
"""How many of the 10,000 test images of MNIST are for training where there are no other images."""


def load_mnist(folder: str | os.PathLike[str], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Load MNIST.

    Args:
        folder: has the two IDX files of the split under their usual names, such as
            train-images-idx3-ubyte or train-images.idx3-ubyte, with or without .gz; itself, in raw
            or in MNIST/raw, where torchvision puts them.
        split: "train" (60,000 images) or "test" (10,000).

    Returns:
        images: float32 [N, 28, 28] in [-1, 1] (gray value / 127.5 - 1).
        labels: int32 [N] in 0..9.

    Raises:
        FileNotFoundError: names the missing file, what is there and where to get it.
        ValueError: ``split`` is neither "train" nor "test"; a file is damaged or no such IDX file;
            no gray value is above 1; or there are not as many labels as images.

    Source: Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    prefix = "train" if split == "train" else "t10k"
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images_path} must hold images [N, 28, 28], got {list(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels"
        )
    if len(labels) and labels.max() > 9:
        raise ValueError(f"{labels_path} must hold labels in 0..9, got {labels.max()}")
    return _scale(images, images_path), labels.astype(np.int32)


def load_split_test(folder: str | os.PathLike[str], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Load the test images of MNIST, split: the first 8,000 for training, the others for tests.

    Args:
        folder: has the two files of test images, as for ``load_mnist``.
        split: "train" (8,000 images) or "test" (2,000).

    Returns:
        As ``load_mnist``.

    Raises:
        FileNotFoundError, ValueError: as ``load_mnist``; or there are no images for tests.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    part = slice(NUM_TRAINING) if split == "train" else slice(NUM_TRAINING, None)
    images, labels = load_mnist(folder, "test")
    if len(images) <= NUM_TRAINING:
        raise ValueError(
            f"the test images of MNIST in {folder} must be more than {NUM_TRAINING} to be split, "
            f"got {len(images)}"
        )
    return images[part], labels[part]


def has_test_alone(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the test images of MNIST and no training images."""
    return _has(folder, "t10k-images-idx3-ubyte") and not any(
        _has(folder, f"train-{name}-ubyte") for name in ("images-idx3", "labels-idx1")
    )


def load_confident(
    folder: str | os.PathLike[str], number: int = IMAGES_PER_DIGIT
) -> tuple[np.ndarray, np.ndarray]:
    """Load the training images of MNIST that the published models were trained and tested with.

    The release lists 5,000 images per digit with the confidence of a classifier; those with the
    highest are taken, of equal ones the earlier in the list. (The published code leaves the order
    of equal ones to an unstable sort.)

    Args:
        folder: of the release, with top_5000_values.csv and the training images of MNIST, as for
            ``load_mnist``.
        number: images per digit, at least 1.

    Returns:
        images: float32 [9 * number, 28, 28] in [-1, 1], digit by digit, most confident first.
        labels: int32 [9 * number], 1..9.

    Raises:
        FileNotFoundError: names the missing file and where to get it.
        ValueError: a file is damaged, has fewer images of a digit than ``number``, or that is below
            1.
    """
    check.count("number", number)
    path = _existing(Path(folder) / CONFIDENCES_FILE, RELEASE_URL)
    images, labels = load_mnist(folder, "train")
    label, position, confidence = _read_confidences(path)
    chosen = []
    for digit in range(1, 10):
        rows = np.flatnonzero(label == digit)
        rows = rows[np.argsort(-confidence[rows], kind="stable")][:number]
        every = np.flatnonzero(labels == digit)
        if len(rows) < number:
            raise ValueError(f"{path} must list {number} images of digit {digit}, got {len(rows)}")
        if position[rows].max() >= len(every):
            raise ValueError(
                f"{path} must list images 0..{len(every) - 1} of digit {digit}, "
                f"got {position[rows].max()}"
            )
        chosen.append(every[position[rows]])
    chosen = np.concatenate(chosen)
    return images[chosen], labels[chosen]


def load_boards(folder: str | os.PathLike[str]) -> np.ndarray:
    """Load the published boards.

    Args:
        folder: of the release, with sudokus.npy.

    Returns:
        int8 [M, 9, 9] in 1..9; the last ``NUM_TEST_BOARDS`` are for tests.

    Raises:
        FileNotFoundError: names the missing file and where to get it.
        ValueError: the file is damaged, has another shape, a board that is not valid, or no more
            than those for tests.
    """
    path = _existing(Path(folder) / BOARDS_FILE, RELEASE_URL)
    with files.refusing(path, "a NumPy array", "a NumPy array (.npy)"):
        array = np.lib.format.open_memmap(path, mode="r")
    if len(boards := _check_boards(array, path)) <= NUM_TEST_BOARDS:
        raise ValueError(f"{path} must have more than {NUM_TEST_BOARDS} boards, got {len(boards)}")
    return boards


def load_hub(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Load boards and images of digits from the file of the Hugging Face hub.

    Args:
        path: sudoku-mnist.safetensors.

    Returns:
        images: float32 [N, 28, 28] in [-1, 1].
        labels: int32 [N], 0..9.
        boards: int8 [M, 9, 9] in 1..9.

    Raises:
        FileNotFoundError: names the missing file and where to get it.
        ValueError: the file is damaged or has other tensors, a gray value or a board is not valid.
    """
    path = _existing(Path(path), HUB_URL)
    with (
        files.refusing(path, f"a safetensors file such as {HUB_FILE}", "a safetensors file"),
        safetensors.safe_open(path, framework="numpy") as file,
    ):
        images, boards = file.get_tensor("mnist_images"), file.get_tensor("sudokus")
    if images.ndim != 4 or len(images) != 10 or images.shape[2:] != (SIDE, SIDE):
        raise ValueError(
            f"mnist_images of {path} must have shape [10, N, 28, 28], got {list(images.shape)}"
        )
    labels = np.repeat(np.arange(10, dtype=np.int32), images.shape[1])
    return _scale(images.reshape(-1, SIDE, SIDE), path), labels, _check_boards(boards, path)


def _existing(path: Path, source: str) -> Path:
    if not path.is_file():
        there = files.contents(path.parent)
        raise FileNotFoundError(f"there is no file {path}, which is in {source}; {there}")
    return path


def _has(folder: str | os.PathLike[str], name: str) -> bool:
    try:
        _find(folder, name)
    except FileNotFoundError:
        return False
    return True


def _find(folder: str | os.PathLike[str], name: str) -> Path:
    """The IDX file of a name, under any of its usual ones."""
    dotted = name.replace("-idx", ".idx")
    for place in PLACES:
        for spelling in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
            if (path := Path(folder, place, spelling)).is_file():
                return path
    below = [path for place in PLACES[1:] if (path := Path(folder, place)).is_dir()]
    there = "; ".join(map(files.contents, [Path(folder), *below]))
    raise FileNotFoundError(
        f"{folder} has no {name} or {dotted}, with or without .gz, itself or in "
        f"{' or '.join(PLACES[1:])}; {there}; get it from {MNIST_URL}"
    )


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes, packed by gzip or not: uint8, ``ndim`` axes."""
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    with files.refusing(path, f"an IDX file of bytes with {ndim} axes", PACKED):
        is_packed = files.kind_of(path) == PACKED
        with gzip.open(path) if is_packed else path.open("rb") as file:
            content = file.read()
        if content[:4] != magic or len(content) < start:
            raise ValueError(
                f"it must begin with {magic.hex()}, got {content[:4].hex()} and "
                f"{len(content)} bytes"
            )
        shape = np.frombuffer(content[4:start], ">u4").tolist()
        if len(content) - start != math.prod(shape):
            raise ValueError(f"{shape} is {math.prod(shape)} bytes, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _scale(images: np.ndarray, path: Path) -> np.ndarray:
    """Turn gray values 0..255 into float32 in [-1, 1]."""
    if not (
        images.dtype.kind in "iuf"
        and ((images >= 0) & (images <= 255)).all()
        and (images > 1).any()
    ):
        raise ValueError(f"the images of {path} must have gray values in 0..255, some above 1")
    return images.astype(np.float32) / 255 * 2 - 1


def _read_confidences(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the columns label, image_index (among the images of this label) and confidence."""
    columns = ("label", "image_index", "confidence")
    with files.refusing(path, f"a table with the columns {columns} of numbers", "a text file"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [[row[name] for name in columns] for row in csv.DictReader(file)]
        label, position, confidence = np.array(rows, np.float64).reshape(-1, 3).T
    whole = np.stack([label, position])
    if not np.isfinite(confidence).all() or (whole != np.clip(np.round(whole), 0, 60_000)).any():
        raise ValueError(f"{path} must have whole labels and indices >= 0 and finite confidences")
    return label.astype(np.int64), position.astype(np.int64), confidence


def _check_boards(array: np.ndarray, path: Path) -> np.ndarray:
    """Turn numbers into boards: int8 [M, 9, 9], all of them valid."""
    if array.ndim != 3 or array.shape[1:] != (9, 9) or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} must have boards of numbers [M, 9, 9], got {array.dtype} {list(array.shape)}"
        )
    boards = np.empty(array.shape, np.int8)
    for start in range(0, len(array), 4096):
        part = slice(start, start + 4096)
        boards[part] = np.where(np.isin(array[part], np.arange(1, 10)), array[part], 0)
        wrong = np.flatnonzero(~sudoku.are_valid(boards[part]))
        if len(wrong):
            row = start + wrong[0]
            raise ValueError(f"board {row} of {path} is not valid: {array[row].tolist()}")
    return boards
