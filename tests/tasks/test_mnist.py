"""MNIST and the published boards from files, whole and damaged; MNIST Sudoku."""

import gzip
import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ipr_jax.models.config import PRESETS
from ipr_jax.models.networks import open_network
from ipr_jax.tasks import (
    boards,
    digits,
    get_task,
    mnist,
    mnist_classifier,
    mnist_sudoku,
    random_boards,
    sudoku,
)
from ipr_jax.training import digit_reader

GRAY = np.arange(10) * 25
"""The first pixel of the images here, by digit."""


def read_digits(tiles):
    """What the images here show."""
    return jnp.clip(jnp.round((tiles[:, 0, 0, 0] + 1) * 5.1), 1, 9).astype(jnp.int32)


def some_images(labels, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 28, 28), np.uint8)
    images[:, 0, 0] = GRAY[labels]
    return images


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def write_mnist(folder, split, labels, *, before="-", zipped=False, seed=0):
    """Write the two files of a split; returns the images."""
    images, prefix = some_images(labels, seed), {"train": "train", "test": "t10k"}[split]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images", images), ("labels", labels.astype(np.uint8))):
        content, end = idx(array), f"idx{array.ndim}-ubyte{'.gz' if zipped else ''}"
        path = folder / f"{prefix}-{name}{before}{end}"
        path.write_bytes(gzip.compress(content, 1, mtime=0) if zipped else content)
    return images


LABELS = np.arange(40) % 10


@pytest.fixture
def folder(tmp_path) -> Path:
    write_mnist(tmp_path, "test", LABELS)
    return tmp_path


SMALL = {"train": slice(10), "test": slice(10, None)}
"""The split of the test images, if the first ten are for training."""


@pytest.mark.parametrize("zipped", [False, True])
def test_test_images_alone_are_split(tmp_path, monkeypatch, zipped):
    """Those that train are not those that test; with training images, nothing is split."""
    monkeypatch.setattr(mnist, "NUM_TRAINING", 10)
    write_mnist(tmp_path, "test", LABELS, zipped=zipped)
    images, labels = mnist.load_mnist(tmp_path, "test")
    board_of = mnist_sudoku.open_boards(tmp_path, read_digits)
    for split, part in SMALL.items():
        small = mnist.load_split_test(tmp_path, split)
        np.testing.assert_array_equal(small[0], images[part])
        np.testing.assert_array_equal(small[1], labels[part])
        wanted = boards.sort_tiles(*small, 9)
        for found, want in zip(board_of.tiles(split), wanted, strict=True):
            np.testing.assert_array_equal(found, want)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'x'"):
        mnist.load_split_test(tmp_path, "x")
    write_mnist(tmp_path, "train", LABELS[:20], seed=1)
    board_of = mnist_sudoku.open_boards(tmp_path, read_digits)
    for split in SMALL:
        wanted = boards.sort_tiles(*mnist.load_mnist(tmp_path, split), 9)
        np.testing.assert_array_equal(board_of.tiles(split).images, wanted.images)


# --- MNIST ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("before", ["-", "."])
@pytest.mark.parametrize("inside", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_is_read_as_written(tmp_path, split, inside, before, zipped):
    written = write_mnist(tmp_path / inside, split, LABELS, before=before, zipped=zipped)
    images, labels = mnist.load_mnist(str(tmp_path), split)
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(np.round((images + 1) * 127.5), written)
    assert images[written == 0].max() == -1
    assert images[written == 255].min() == 1


def test_names_do_not_tell_whether_files_are_packed(folder):
    images, labels = mnist.load_mnist(folder, "test")
    for path in list(folder.iterdir()):
        packed = gzip.compress(path.read_bytes())
        path.write_bytes(packed)
        np.testing.assert_array_equal(mnist.load_mnist(folder, "test")[0], images)
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(gzip.decompress(packed))
        np.testing.assert_array_equal(mnist.load_mnist(folder, "test")[1], labels)


def test_a_missing_file_is_named_with_what_is_there_and_where_to_get_it(folder):
    with pytest.raises(FileNotFoundError) as error:
        mnist.load_mnist(folder, "train")
    assert str(error.value) == (
        f"{folder} has no train-images-idx3-ubyte or train-images.idx3-ubyte, with or without .gz, "
        f"itself or in raw or MNIST/raw; {folder} holds t10k-images-idx3-ubyte, "
        f"t10k-labels-idx1-ubyte; get it from {mnist.MNIST_URL}"
    )
    raw = folder / "raw"
    raw.mkdir()
    with pytest.raises(FileNotFoundError, match=f"t10k-labels-idx1-ubyte; {raw} holds nothing; "):
        mnist.load_mnist(folder, "train")
    for number in range(9):
        (raw / f"{number}.png").touch()
    with pytest.raises(FileNotFoundError, match=r" holds 0\.png, .*, 7\.png and 1 more; get it"):
        mnist.load_mnist(raw, "train")
    with pytest.raises(FileNotFoundError, match=f"there is no folder {raw / 'none'}; get it from"):
        mnist.load_mnist(raw / "none", "train")
    path = folder / "t10k-labels-idx1-ubyte"
    with pytest.raises(FileNotFoundError, match=f"{path} is a file and no folder; get it from"):
        mnist.load_mnist(path, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-labels-idx1-ubyte or .*https:"):
        mnist.load_mnist(folder, "test")
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        mnist.load_mnist(folder, "val")  # type: ignore[arg-type]


def header(*words):
    return struct.pack(f">{len(words)}I", *words)


PACKED = gzip.compress(b"<html>", mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images-idx3", b"", "of bytes with 3 axes: it is an empty file"),
        ("images-idx3", b"<html>", "of bytes with 3 axes: it is an HTML page"),
        ("labels-idx1", b"version https://git-lfs.github.com", "1 axes: it is a Git LFS pointer"),
        ("labels-idx1", PACKED, "begin with 00000801, got 3c68746d and 6 bytes"),
        ("images-idx3", header(2051, 40, 28), "with 3 axes: it must begin with 00000803, got 0000"),
        ("images-idx3", idx(LABELS.astype(np.uint8)), "begin with 00000803, got 00000801"),
        ("images-idx3", idx(some_images(LABELS))[:-1], r"\[40, 28, 28\] is 31360 bytes, got 31359"),
        ("images-idx3", idx(some_images(LABELS)) + b"0", "31360 bytes, got 31361"),
        ("images-idx3", header(2051, 2**32 - 1, 28, 28), "bytes, got 0"),
        ("images-idx3", idx(np.zeros((40, 7, 28), np.uint8)), r"\[N, 28, 28\], got \[40, 7, 28\]"),
        ("images-idx3", idx(some_images(LABELS[1:])), "39 images, but .* has 40 labels"),
        ("images-idx3", idx(some_images(LABELS) // 128), r"gray values in 0\.\.255, some above 1"),
        ("labels-idx1", idx(some_images(LABELS)), "begin with 00000801, got 00000803"),
        ("labels-idx1", idx(np.full(40, 10, np.uint8)), r"labels in 0\.\.9, got 10"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(folder, name, content, message):
    path = folder / f"t10k-{name}-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        mnist.load_mnist(folder, "test")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "checksum", "middle", "head"])
def test_damaged_archives_are_refused_by_name(folder, damage):
    path = folder / "t10k-images-idx3-ubyte"
    whole = bytearray(gzip.compress(path.read_bytes()))
    path.unlink()
    if damage == "cut":
        whole = whole[: len(whole) // 2]
    else:
        whole[{"checksum": -6, "middle": len(whole) // 2, "head": 2}[damage]] ^= 0xFF
    path.with_suffix(".gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"ubyte\.gz cannot be read as an IDX file .* axes: \w+"):
        mnist.load_mnist(folder, "test")


def test_a_file_that_cannot_be_read_is_refused_by_name(folder, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress((folder / "t10k-images-idx3-ubyte").read_bytes()))
    (folder / "t10k-images-idx3-ubyte").unlink()
    monkeypatch.setattr(gzip, "open", fail)
    with pytest.raises(ValueError, match=f"{path} cannot .* with 3 axes: Input/output error$"):
        mnist.load_mnist(folder, "test")


# --- the release ----------------------------------------------------------------------------------

NUM_EXTRA = 30


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder like that of the release: 10,030 boards, 1,005 images of each digit."""
    path = tmp_path_factory.mktemp("release")
    np.save(
        path / "sudokus.npy", random_boards.boards_9x9(0, "train", np.arange(10_000 + NUM_EXTRA))
    )
    labels = np.random.default_rng(0).permutation(np.arange(10).repeat(1005))
    write_mnist(path / "MNIST" / "raw", "train", labels)
    rng = np.random.default_rng(1)
    lines = [",image_index,confidence,label"]
    for digit in range(10):
        for position in rng.permutation(1005):
            lines.append(f"{len(lines)},{position},{rng.integers(100) / 100},{digit}")
    (path / "top_5000_values.csv").write_text("\n".join(lines) + "\n")
    return path


def slow_candidates(release):
    """The 1,000 most confident images of each digit 0..9, the earlier ones if equal."""
    images, labels = mnist.load_mnist(release, "train")
    rows = [line.split(",") for line in (release / "top_5000_values.csv").read_text().split()[1:]]
    found = []
    for digit in range(10):
        listed = [
            (-float(row[2]), int(row[0]), int(row[1])) for row in rows if row[3] == f"{digit}"
        ]
        found.append(images[labels == digit][[place for _, _, place in sorted(listed)[:1000]]])
    return found


def test_the_most_confident_images_are_taken(release):
    images, labels = mnist.load_confident(release)
    np.testing.assert_array_equal(images, np.concatenate(slow_candidates(release)[1:]))
    np.testing.assert_array_equal(labels, np.arange(1, 10).repeat(1000))
    few, _ = mnist.load_confident(release, 3)
    np.testing.assert_array_equal(few.reshape(9, 3, 28, 28), images.reshape(9, -1, 28, 28)[:, :3])
    with pytest.raises(ValueError, match="number must be a whole number of at least 1, got 0"):
        mnist.load_confident(release, 0)


CSV = "label,image_index,confidence\n" + "".join(f"{digit},0,0.5\n" for digit in range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must list 1 images of digit 1, got 0"),
        (CSV.replace("5,0,0.5\n", "").encode(), "must list 1 images of digit 5, got 0"),
        (CSV.replace("confidence", "sure").encode(), "as a table with the columns"),
        (CSV.replace("7,0,", "7,,").encode(), "as a table with the columns"),
        (CSV.encode() + b"1\n", "whole labels and indices"),
        (CSV.encode() + b"\xff\xfe\n", "as a table with the columns"),
        (CSV.replace("3,0,0.5", "3,0,nan").encode(), "finite confidences"),
        (CSV.replace("3,0,0.5", "3,0.5,0.5").encode(), "whole labels and indices"),
        (CSV.replace("3,0,0.5", "3,9,0.5").encode(), r"images 0\.\.3 of digit 3, got 9"),
        (CSV.replace("3,0,0.5", "3,-1,0.5").encode(), "whole labels and indices"),
        (CSV.replace("3,0,0.5", "3,1e300,0.5").encode(), "whole labels and indices"),
    ],
)  # fmt: skip
def test_a_damaged_list_is_refused_by_name(tmp_path, content, message):
    write_mnist(tmp_path, "train", LABELS)
    path = tmp_path / "top_5000_values.csv"
    with pytest.raises(FileNotFoundError, match=r"values.csv, which is in .*Chrixtar/SRM.* holds"):
        mnist.load_confident(tmp_path, 1)
    path.write_text(CSV)
    assert mnist.load_confident(tmp_path, 1)[0].shape == (9, 28, 28)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        mnist.load_confident(tmp_path, 1)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float32])
def test_boards_are_read_as_written(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(mnist, "NUM_TEST_BOARDS", 3)
    written = random_boards.boards_9x9(1, "test", np.arange(5))
    np.save(tmp_path / "sudokus.npy", written.astype(dtype))
    read = mnist.load_boards(tmp_path)
    assert read.dtype == np.int8
    np.testing.assert_array_equal(read, written)


def change(array, value):
    array = array.copy()
    array[3, 4, 5] = value
    return array


INVALID = "board 3 of .* is not valid"
OTHER_BOARDS = {
    "empty": (lambda b: change(b, 0), INVALID),
    "twice": (lambda b: change(b, b[3, 4, 6]), INVALID),
    "wraps": (lambda b: change(b.astype(np.int64), 2**40 + int(b[3, 4, 5])), INVALID),
    "nan": (lambda b: change(b.astype(float), np.nan), INVALID),
    "half": (lambda b: change(b.astype(float), b[3, 4, 5] + 0.5), INVALID),
    "flat": (lambda b: b.reshape(-1, 81), r"\[M, 9, 9\], got int8 \[5, 81\]"),
    "text": (lambda b: b.astype("U1"), r"\[M, 9, 9\], got <U1"),
    "objects": (lambda b: b.astype(object), "Python objects"),
    "few": (lambda b: b[:3], "more than 3 boards, got 3"),
}
FOREIGN = {
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer .*",
    b"PK\3\4": "a zip archive that is cut short or damaged",
}


@pytest.mark.parametrize(("alter", "message"), OTHER_BOARDS.values(), ids=OTHER_BOARDS)
def test_other_boards_are_refused_by_name(tmp_path, monkeypatch, alter, message):
    monkeypatch.setattr(mnist, "NUM_TEST_BOARDS", 3)
    path = tmp_path / "sudokus.npy"
    with pytest.raises(FileNotFoundError, match=r"no file .*sudokus.npy, which is in datasets.zip"):
        mnist.load_boards(tmp_path)
    np.save(path, alter(random_boards.boards_9x9(1, "test", np.arange(5))))
    with pytest.raises(ValueError, match=message) as error:
        mnist.load_boards(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("content", "kind"), FOREIGN.items(), ids=FOREIGN.values())
def test_other_files_of_boards_say_what_they_are(tmp_path, content, kind):
    path = tmp_path / "sudokus.npy"
    path.write_bytes(content)
    for use in (
        lambda: mnist.load_boards(tmp_path),
        lambda: mnist_sudoku.open_boards(tmp_path, read_digits),
    ):
        with pytest.raises(
            ValueError, match=f"{path} cannot be read as a NumPy array: it is {kind}"
        ):
            use()


def test_half_of_the_release_is_not_taken_for_plain_mnist(folder):
    (folder / "top_5000_values.csv").write_text(CSV)
    with pytest.raises(FileNotFoundError, match=r"no file .*sudokus\.npy, which is in datasets"):
        mnist_sudoku.open_boards(folder, read_digits)


@given(st.integers(0, 150), st.integers(0, 255), st.booleans())
def test_a_damaged_file_of_boards_is_refused_or_read_right(tmp_path_factory, place, byte, cut):
    path = tmp_path_factory.mktemp("boards") / "sudokus.npy"
    written = random_boards.boards_9x9(1, "test", np.arange(3))
    np.save(path, written)
    content = bytearray(path.read_bytes())
    content[place] = byte
    path.write_bytes(content[: place if cut else None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "NUM_TEST_BOARDS", 1)
        try:
            outcome = mnist.load_boards(path.parent)
        except ValueError as error:
            outcome = str(error)
    if isinstance(outcome, str):
        assert str(path) in outcome
    else:
        assert sudoku.are_valid(outcome).all()


# --- the hub --------------------------------------------------------------------------------------


def write_hub(path, **changed):
    images = some_images(np.arange(10).repeat(4)).reshape(10, 4, 28, 28)
    tensors = {
        "mnist_images": images,
        "sudokus": random_boards.boards_9x9(0, "train", np.arange(6)),
    }
    save_file(tensors | changed, path)
    return tensors


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_the_hub_is_read_as_written(tmp_path, dtype):
    path = tmp_path / "sudoku-mnist.safetensors"
    tensors = write_hub(path)
    save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, path)
    images, labels, grids = mnist.load_hub(path)
    assert (images.dtype, labels.dtype, grids.dtype) == (np.float32, np.int32, np.int8)
    shown = np.round((images + 1) * 127.5).reshape(10, 4, 28, 28)
    np.testing.assert_array_equal(shown, tensors["mnist_images"])
    np.testing.assert_array_equal(labels, np.arange(10).repeat(4))
    np.testing.assert_array_equal(grids, tensors["sudokus"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mnist_images": np.zeros((9, 4, 28, 28), np.uint8)}, r"\[10, N, 28, 28\], got \[9,"),
        ({"mnist_images": np.full((10, 4, 28, 28), np.nan, np.float32)}, "gray values"),
        ({"mnist_images": np.full((10, 4, 28, 28), 256, np.int32)}, "gray values"),
        ({"mnist_images": np.ones((10, 4, 28, 28), np.float32)}, r"gray values .* some above 1"),
        ({"mnist_images": np.ones((10, 4, 28, 28), bool)}, "gray values"),
        ({"sudokus": np.ones((6, 9, 9), np.int64)}, "board 0 of .* is not valid"),
        ({"sudokus": np.ones((6, 81), np.int64)}, r"\[M, 9, 9\]"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, changed, message):
    path = tmp_path / "sudoku-mnist.safetensors"
    write_hub(path, **changed)
    with pytest.raises(ValueError, match=message) as error:
        mnist.load_hub(path)
    assert str(path) in str(error.value)


def test_a_damaged_file_of_the_hub_is_refused_by_name(tmp_path):
    path = tmp_path / "sudoku-mnist.safetensors"
    with pytest.raises(FileNotFoundError, match=r"safetensors, which is in https://huggingface"):
        mnist.load_hub(path)
    write_hub(path)
    whole = path.read_bytes()
    other = whole.replace(b"sudokus", b"sudokas")
    for content, message in (
        (b"", "it is an empty file"),
        (b"<!doctype html>", "it is an HTML page"),
        (gzip.compress(whole, mtime=0), r"it is a gzip file \(unpack it first\)"),
        (whole[:7], r"\w"),
        (whole[:100], r"\w"),
        (whole[:-1], r"\w"),
        (b"\xff" * 8 + whole[8:], r"\w"),
        (other, r"File does not contain tensor sudokus"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} cannot be read as a safe.*: {message}"):
            mnist.load_hub(path)


# --- MNIST Sudoku ---------------------------------------------------------------------------------


def tiles_of(image):
    return image.reshape(-1, 9, 28, 9, 28).swapaxes(2, 3)


def check_task(task, board_of):
    """Draw, read and score a few boards of a task, and its corrupted ones."""
    config = PRESETS[task.name]
    assert (task.image_shape, task.patch_size) == (config.image_shape, config.patch_size)
    for draw in (task.test_batch, task.training_batch):
        batch = draw(3, np.arange(4))
        assert batch.image.shape == (4, *config.image_shape)
        assert batch.editable.shape == (4, *config.grid)
        np.testing.assert_array_equal(board_of.read_board(batch.image), batch.label)
        np.testing.assert_array_equal(draw(3, np.array([2])).image[0], batch.image[2])
        assert task.score(jnp.asarray(batch.image))["valid"].all()
    wrong = mnist_sudoku.make(board_of).corrupted(3).test_batch(3, np.arange(4))
    shown = np.asarray(board_of.read_board(wrong.image))
    assert ((shown != wrong.label).sum(axis=(1, 2)) == 6).all()
    assert sudoku.are_valid(wrong.label).all()
    assert not task.score(jnp.asarray(wrong.image))["valid"].any()


def test_boards_of_plain_mnist(folder):
    written = write_mnist(folder, "train", LABELS, seed=1)
    board_of = mnist_sudoku.open_boards(folder, read_digits)
    task = mnist_sudoku.make(board_of)
    check_task(task, board_of)
    batch = task.training_batch(0, np.arange(5))
    np.testing.assert_array_equal(batch.label, random_boards.boards_9x9(0, "train", np.arange(5)))
    known = {image.tobytes() for image in mnist.load_mnist(folder, "train")[0]}
    assert {tile.tobytes() for tile in tiles_of(batch.image).reshape(-1, 28, 28)} <= known
    assert len(known) == len(written)
    given_cells = (~task.test_batch(0, np.arange(200)).editable).sum(axis=(1, 2))
    assert (given_cells.min(), given_cells.max()) == (0, 26)


def test_images_that_are_misread_are_left_out(folder):
    write_mnist(folder, "train", LABELS)
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx(np.where(np.arange(40) < 10, LABELS, (LABELS + 2) % 10).astype(np.uint8)))
    board_of = mnist_sudoku.open_boards(folder, read_digits)
    np.testing.assert_array_equal(board_of.tiles("test").number, np.ones(10))
    path.write_bytes(idx(np.full(40, 4, np.uint8)))
    with pytest.raises(ValueError, match=r"every digit in 1\.\.9 needs an image, 1 has none"):
        mnist_sudoku.open_boards(folder, read_digits)


def test_boards_of_the_release(release):
    board_of = mnist_sudoku.open_boards(release, read_digits)
    task = mnist_sudoku.make(board_of, "easy")
    check_task(task, board_of)
    published = [board.tobytes() for board in mnist.load_boards(release)]
    train = task.training_batch(0, np.arange(60)).label
    assert {board.tobytes() for board in train} <= set(published[:NUM_EXTRA])
    assert len({board.tobytes() for board in train}) > NUM_EXTRA / 2
    test = task.test_batch(0, np.arange(60)).label
    assert {board.tobytes() for board in test} <= set(published[NUM_EXTRA:])


def test_boards_of_the_hub(tmp_path):
    path = tmp_path / "sudoku-mnist.safetensors"
    tensors = write_hub(path)
    board_of = mnist_sudoku.open_boards(tmp_path, read_digits)
    np.testing.assert_array_equal(
        board_of.tiles("test").images, mnist_sudoku.open_boards(path, read_digits).tiles("test")[0]
    )
    check_task(mnist_sudoku.make(board_of, "medium"), board_of)
    drawn = board_of.draw_boards(0, "test", np.arange(100))
    assert {board.tobytes() for board in drawn} == {b.tobytes() for b in tensors["sudokus"]}


@pytest.mark.parametrize(("difficulty", "number"), [("hard", 500), ("easy", 16)])
def test_published_puzzles_are_those_of_a_slow_account(release, difficulty, number):
    batch = mnist_sudoku.published_test(release, difficulty, number)
    grids, candidates = mnist.load_boards(release)[-10_000:], slow_candidates(release)
    fewest, most = {"hard": (0, 26), "easy": (54, 80)}[difficulty]
    share = math.ceil(10_000 / number)
    assert len(batch.image) == number
    for k in range(16):
        given_cells = int(np.random.default_rng(k).integers(fewest, most + 1))
        row = int(np.random.default_rng(k).integers(k * share, min((k + 1) * share, 10_000)))
        np.testing.assert_array_equal(batch.label[k], grids[row])
        rng, tiles = np.random.default_rng(row), tiles_of(batch.image[k])[0]
        for i in range(9):
            for j in range(9):
                images = candidates[grids[row, i, j]]
                np.testing.assert_array_equal(tiles[i, j], images[rng.integers(0, len(images))])
        clues = np.random.default_rng(row).choice(81, given_cells, replace=False)
        editable = np.ones((9, 9), bool)
        editable[clues // 9, clues % 9] = False
        np.testing.assert_array_equal(batch.editable[k], editable)


def test_other_settings_are_refused(release, folder):
    with pytest.raises(ValueError, match="must be more than 8000 to be split, got 40"):
        mnist_sudoku.open_boards(folder, read_digits)
    write_mnist(folder, "train", LABELS)
    board_of = mnist_sudoku.open_boards(folder, read_digits)
    for wrong in (mnist_sudoku.make, mnist_sudoku.published_test):
        with pytest.raises(ValueError, match=r"unknown difficulty 'x'; known: \['easy'"):
            wrong(board_of if wrong is mnist_sudoku.make else release, "x")
    with pytest.raises(ValueError, match=r"pairs must be in 1\.\.40"):
        mnist_sudoku.make(board_of).corrupted(0)
    for number in (0, 300, -500):
        with pytest.raises(ValueError, match=f"number must divide 10000, got {number}"):
            mnist_sudoku.published_test(release, "hard", number)
    with pytest.raises(FileNotFoundError, match="has no t10k-images-idx3-ubyte or"):
        mnist_sudoku.open_boards(folder / "nowhere", read_digits)
    (folder / "mnist.zip").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"mnist\.zip cannot be read as .*: it is a zip archive"):
        mnist_sudoku.open_boards(folder / "mnist.zip", read_digits)


def test_the_classifier_scores_boards(folder):
    config = mnist_classifier.MNISTConfig()
    network = nnx.jit(lambda: mnist_classifier.MNISTClassifier(config, rngs=nnx.Rngs(0)))()
    tiles = boards.sort_tiles(*mnist.load_mnist(folder, "test"), 9)
    board_of = boards.DigitBoards(
        9,
        28,
        lambda split: tiles,
        random_boards.boards_9x9,
        lambda tiles: mnist_classifier.read_digits(network(tiles)),
    )
    image = board_of.batch("test", 0, np.arange(2), (0, 0)).image
    read = jax.jit(board_of.read_board)(image)
    assert (read.shape, read.dtype) == ((2, 9, 9), jnp.int32)
    tile = jax.jit(network)(tiles_of(image)[1, 2, 3][None, ..., None])
    assert read[1, 2, 3] == mnist_classifier.read_digits(tile)[0]
    assert jax.eval_shape(board_of.score, image)["violations"].shape == (2,)


def other_handwriting():
    """The 8x8 digits of scikit-learn, enlarged to the size of those of MNIST, and their labels."""
    images, labels = digits.load_digits("train")
    large = jax.image.resize(jnp.asarray(images), (len(images), 20, 20), "cubic").clip(-1, 1)
    return np.pad(large, ((0, 0), (4, 4), (4, 4)), constant_values=-1), labels


def test_the_classifier_of_the_package_reads_other_handwriting():
    images, labels = other_handwriting()
    images, labels = images[labels > 0], labels[labels > 0]
    read = jax.jit(mnist_classifier.read)(images[..., None])
    assert (read.shape, read.dtype) == (labels.shape, jnp.int32)
    assert (np.asarray(read) == labels).mean() > 0.9


@pytest.mark.gate
def test_the_shipped_model_solves_boards_of_a_folder_of_test_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "NUM_TRAINING", 1000)
    images, labels = other_handwriting()
    gray = np.round((images + 1) * 127.5).astype(np.uint8)
    for name, array in (("images", gray), ("labels", labels.astype(np.uint8))):
        (tmp_path / f"t10k-{name}-idx{array.ndim}-ubyte").write_bytes(idx(array))
    words = ("--task", "mnist-sudoku", "--data", ".", "--difficulty", "easy", "--samples", 4)
    code, _, err = call("refine", *words, "--cycles", 1, "--iterations", 20, "--out", "run")
    assert (code, err) == (0, "")
    with np.load("run/samples/00000.npz") as file:
        found = {name: file[name] for name in file.files}
    task = get_task("mnist-sudoku", data=".", difficulty="easy")
    puzzles = task.test_batch(0, np.arange(4))
    kept = np.kron(puzzles.editable, np.ones((1, 28, 28), bool))[..., None]
    assert found["refined"].shape == puzzles.image.shape == (4, 252, 252, 1)
    started = np.round((puzzles.image + 1) * 127.5)
    np.testing.assert_array_equal(found["refined"][~kept], started[~kept])
    hidden = np.where(kept, -1, puzzles.image)
    refined, before = jnp.float32(found["refined"]) / 127.5 - 1, jnp.float32(hidden)
    assert task.score(refined)["valid"].any()
    assert task.score(refined)["violations"].mean() < task.score(before)["violations"].mean() / 4
    assert call("report", "run") == (0, "written: run/report.html\n", "")


@pytest.mark.heavy
def test_the_classifier_trains(folder):
    images, labels = mnist.load_mnist(folder, "test")
    with jax.numpy_dtype_promotion("standard"):
        network = digit_reader.train_mnist_classifier(images[:10], labels[:10], num_steps=30)
    logits = network(jnp.asarray(images[:10])[..., None])
    assert (np.asarray(logits.argmax(axis=-1)) == labels[:10]).mean() > 0.5


def test_a_file_is_no_classifier_and_says_what_it_is(tmp_path):
    path = tmp_path / "mnist_classifier.pth"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(FileNotFoundError, match=r"pth', which is a Git LFS pointer .*: give a mod"):
        open_network(path)
