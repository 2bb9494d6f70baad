"""MNIST Sudoku: 9x9 boards of MNIST digits, to be completed from given cells.

Shapes: B samples, [B, h, w] = [B, 9, 9] cells, which are the patches, [B, H, W, C] =
[B, 252, 252, 1] images in [-1, 1]. ``editable`` is True where the model generates the cell, False
where the cell is a given clue.

Source: Wewer et al., Spatial Reasoning with Denoising Models, arXiv 2502.21075.
"""

import functools
import os
from pathlib import Path

import numpy as np

from ipr_jax.tasks import boards, mnist, random_boards
from ipr_jax.tasks.base import Batch, Split, Task, generators


def open_boards(data: str | os.PathLike[str], read_digits: boards.ReadDigits) -> boards.DigitBoards:
    """Boards of MNIST digits from a user's files.

    ``data`` is one of

    - a folder with MNIST: boards uniform over the valid ones; digits of the split, but for those
      that ``read_digits`` misreads; where there are test images only, the first 8,000 of them are
      the training split (``mnist.load_split_test``), as for the model and the classifier that come
      with the package;
    - the folder of the SRM release, with sudokus.npy, top_5000_values.csv and the training images
      of MNIST: published boards, the last 10,000 of them for tests; of each digit the published
      1,000 images, for training and for tests;
    - sudoku-mnist.safetensors of the Hugging Face hub, or its folder: published boards and digits,
      the same for training and for tests.

    Args:
        data: the folder or the file.
        read_digits: what tiles show, such as ``mnist_classifier.read``, or
            ``mnist_classifier.read_digits`` of a converted classifier's logits.

    Raises:
        FileNotFoundError: names the missing file and where to get it.
        ValueError: a file is damaged, with its name and the reason; or a digit has no image.
    """
    data = Path(data)
    hub = data / mnist.HUB_FILE if data.is_dir() else data
    if hub.is_file() or data.suffix == ".safetensors":
        images, labels, published = mnist.load_hub(hub)
        parts = {"train": published, "test": published}
    elif any((data / name).exists() for name in (mnist.BOARDS_FILE, mnist.CONFIDENCES_FILE)):
        published = mnist.load_boards(data)
        images, labels = mnist.load_confident(data)
        parts = {
            "train": published[: -mnist.NUM_TEST_BOARDS],
            "test": published[-mnist.NUM_TEST_BOARDS :],
        }
    else:
        load = mnist.load_split_test if mnist.has_test_alone(data) else mnist.load_mnist

        @functools.cache
        def of_split(split: Split) -> boards.Tiles:
            return _sort(*boards.legible(*load(data, split), read_digits))

        of_split("test")  # now, to refuse what is missing or damaged
        return boards.DigitBoards(9, mnist.SIDE, of_split, random_boards.boards_9x9, read_digits)

    tiles = _sort(images, labels)

    def draw_boards(seed: int, split: Split, indices: np.ndarray) -> np.ndarray:
        rngs = generators(seed, split, indices, stream=1)
        rows = [rng.integers(len(parts[split])) for rng in rngs]
        return parts[split][np.array(rows, np.int64)]

    return boards.DigitBoards(9, mnist.SIDE, lambda split: tiles, draw_boards, read_digits)


def make(boards_of: boards.DigitBoards, difficulty: str = "hard") -> Task:
    """The task, trained with 0 to 80 given cells and tested with those of a difficulty.

    Args:
        boards_of: of ``open_boards``.
        difficulty: "easy", "medium" or "hard": 54-80, 27-53 or 0-26 given cells.

    Raises:
        ValueError: no such difficulty.
    """
    return boards_of.puzzles("mnist-sudoku", difficulty)


def published_test(
    folder: str | os.PathLike[str], difficulty: str = "hard", number: int = 500
) -> Batch:
    """The test puzzles of the published evaluations, the same images and the same clues.

    There, each follows from its number alone. The 10,000 test boards are cut into ``number`` equal
    parts; a generator seeded by the number of the puzzle chooses one of its part, and another one
    so seeded the number of given cells. Two generators seeded by the number of the board choose the
    images of its digits, and which cells are given.

    Args:
        folder: of the SRM release, as for ``open_boards``.
        difficulty: "easy", "medium" or "hard".
        number: of puzzles, a divisor of 10,000; 500 in the SRM paper. It changes all of them.

    Returns:
        ``number`` puzzles; ``label`` is the board, int8 [number, 9, 9].

    Raises:
        FileNotFoundError: names the missing file and where to get it.
        ValueError: a file is damaged, ``difficulty`` is unknown or ``number`` no divisor.
    """
    fewest, most = boards.clue_range(difficulty)
    if number < 1 or mnist.NUM_TEST_BOARDS % number:
        raise ValueError(f"number must divide {mnist.NUM_TEST_BOARDS}, got {number}")
    part = mnist.NUM_TEST_BOARDS // number
    chosen = np.empty((number, 9, 9), np.int64)
    editable = np.ones((number, 81), bool)
    rows = np.empty(number, np.int64)
    for k in range(number):
        rows[k] = np.random.default_rng(k).integers(k * part, (k + 1) * part)
        given = np.random.default_rng(k).integers(fewest, most + 1)
        chosen[k] = np.random.default_rng(rows[k]).integers(mnist.IMAGES_PER_DIGIT, size=(9, 9))
        editable[k, np.random.default_rng(rows[k]).choice(81, given, replace=False)] = False
    label = mnist.load_boards(folder)[-mnist.NUM_TEST_BOARDS :][rows]
    image = boards.draw_image(label, chosen, _sort(*mnist.load_confident(folder)))
    return Batch(image, editable.reshape(-1, 9, 9), label)


def _sort(images: np.ndarray, labels: np.ndarray) -> boards.Tiles:
    return boards.sort_tiles(images, labels, 9)
