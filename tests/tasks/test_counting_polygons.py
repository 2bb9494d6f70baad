"""Counting polygons and stars: where things are, what is drawn, the backgrounds, the scores."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from ipr_jax.tasks import counting_polygons
from ipr_jax.tasks.counting_polygons import POLYGONS, STARS, Variant
from ipr_jax.tasks.polygon_classifier import Counts, PolygonClassifier, PolygonConfig, read_counts

variants = st.sampled_from([POLYGONS, STARS])
splits = st.sampled_from(["train", "test"])
numbers = st.integers(0, 2**40)
both = pytest.mark.parametrize("variant", [POLYGONS, STARS], ids=["polygons", "stars"])


def covered(scene, scale=4):
    """Every object and every digit's box by itself, drawn large: bool [N + 2, H, W]."""
    pictures = []
    for corners in scene.objects:
        picture = Image.new("1", (128 * scale, 128 * scale))
        ImageDraw.Draw(picture).polygon((corners * scale).ravel().tolist(), fill=1)
        pictures.append(np.asarray(picture))
    for left, top, right, bottom in (scene.digits * scale).astype(int):
        picture = np.zeros((128 * scale, 128 * scale), bool)
        picture[top:bottom, left:right] = True
        pictures.append(picture)
    return np.array(pictures)


@pytest.fixture
def grey_folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (128, 128), (40, 40, 40)).save(tmp_path / f"{name}.png")
    return tmp_path


# --- where things are -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(variants, splits, numbers, numbers)
def test_nothing_overlaps_or_leaves_the_image(variant, split, seed, index):
    scene = counting_polygons.get_scene(variant, split, seed, index)
    for part in (scene.objects, scene.digits):
        assert part.min() >= 0
        assert part.max() <= 128
    apart = ndimage.binary_dilation(covered(scene), np.ones((1, 3, 3)), 2)  # by half a pixel
    assert apart.any(axis=(1, 2)).all()
    assert apart.sum(axis=0).max() == 1


@settings(max_examples=100)
@given(variants, splits, numbers, numbers)
def test_objects_are_equal_regular_and_as_many_as_the_label_says(variant, split, seed, index):
    scene = counting_polygons.get_scene(variant, split, seed, index)
    num_objects, num_vertices = scene.label
    assert scene.label.dtype == np.int32
    assert 1 <= num_objects <= 9
    assert variant.counts.min_vertices <= num_vertices <= variant.counts.max_vertices
    stars = variant.inner_radius is not None
    assert scene.objects.shape == (num_objects, num_vertices * (2 if stars else 1), 2)
    assert (scene.circles.shape, scene.digits.shape) == ((num_objects + 2, 3), (2, 4))
    centers, radii = scene.circles[:num_objects, :2], scene.circles[:num_objects, 2:]
    assert ((scene.circles[:, 2] >= 0.08 * 128) & (scene.circles[:, 2] <= 0.16 * 128)).all()
    np.testing.assert_allclose(scene.objects.mean(axis=1), centers)
    distances = np.linalg.norm(scene.objects - centers[:, None], axis=2) / radii
    np.testing.assert_allclose(distances[:, ::2], 1)
    np.testing.assert_allclose(distances[:, 1::2], 0.1 if stars else 1)
    sides = np.linalg.norm(scene.objects - np.roll(scene.objects, 1, axis=1), axis=2) / radii
    np.testing.assert_allclose(sides, sides[0, 0])
    middles = (scene.digits[:, :2] + scene.digits[:, 2:]) / 2
    assert abs(middles - scene.circles[num_objects:, :2]).max() <= 0.25
    heights = scene.digits[:, 3] - scene.digits[:, 1]
    np.testing.assert_allclose(heights / scene.circles[num_objects:, 2], 0.73, atol=0.05)


@both
def test_the_law_of_the_numbers(variant):
    labels = np.array(
        [counting_polygons.get_scene(variant, "train", 0, index).label for index in range(1500)]
    )
    low, high = variant.counts.min_vertices, variant.counts.max_vertices
    pairs = Counter(map(tuple, labels.tolist()))
    assert set(pairs) == {(n, k) for n in range(1, 10) for k in range(low, high + 1)}
    expected = 1500 / len(pairs)
    freedom = len(pairs) - 1
    chi2 = sum((n - expected) ** 2 / expected for n in pairs.values())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


# --- what is drawn --------------------------------------------------------------------------------


@both
def test_the_image_shows_the_scene(variant, grey_folder):
    image, editable, label = counting_polygons.batch(
        variant, "test", 1, np.arange(40), backgrounds=grey_folder
    )
    assert (image.shape, image.dtype) == ((40, 128, 128, 3), np.float32)
    assert (editable.shape, editable.dtype) == ((40, 16, 16), bool)
    assert (label.shape, label.dtype) == ((40, 2), np.int32)
    assert editable.all()
    pixels = np.round((image + 1) * 127.5)
    np.testing.assert_allclose((image + 1) * 127.5, pixels, atol=1e-4)
    for index in range(40):
        scene = counting_polygons.get_scene(variant, "test", 1, index)
        np.testing.assert_array_equal(scene.label, label[index])
        ink = (pixels[index, ..., 2] - 40) / (229 - 40)  # the rarest hue is blue, if any
        if variant is POLYGONS:  # the points of a star end thinner than a pixel
            assert ndimage.label(ink > 0.2, np.ones((3, 3)))[1] == label[index, 0] + 2
        share = covered(scene).reshape(-1, 128, 4, 128, 4).mean(axis=(2, 4))
        digits = share[-2:].any(axis=0)
        assert abs(ink - share[:-2].sum(axis=0))[~digits].max() < 0.4
        assert abs(ink - share[:-2].sum(axis=0))[~digits].mean() < 0.01
        for left, top, right, bottom in scene.digits:
            around = np.s_[int(top) - 2 : int(bottom) + 3, int(left) - 2 : int(right) + 3]
            rows, columns = np.nonzero(ink[around] > 0.15)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = np.array([left, top, right, bottom]) - np.tile([int(left) - 2, int(top) - 2], 2)
            assert abs(found - box).max() < 1


@pytest.mark.parametrize(
    ("background", "hue"),
    [((200, 30, 30), 1 / 2), ((30, 200, 200), 0), ((30, 30, 200), 1 / 6)],
)
def test_the_color_is_the_hue_farthest_from_the_background(background, hue):
    red, green, blue = counting_polygons.rarest_color(Image.new("RGB", (128, 128), background))
    assert (min(red, green, blue), max(red, green, blue)) == (0, 229)
    found = Image.new("RGB", (1, 1), (red, green, blue)).convert("HSV").getpixel((0, 0))
    assert abs((found[0] / 255 - hue + 0.5) % 1 - 0.5) < 2 / 255


def test_the_color_is_far_from_all_that_is_frequent():
    """Of five hues next to each other, the sixth and last is missing."""
    hues = np.repeat(np.arange(5, dtype=np.uint8) * 43, 1000).reshape(50, 100)
    full = Image.fromarray(np.full_like(hues, 255))
    image = Image.merge("HSV", (Image.fromarray(hues), full, full)).convert("RGB")
    red, green, blue = counting_polygons.rarest_color(image)
    hue = Image.new("RGB", (1, 1), (red, green, blue)).convert("HSV").getpixel((0, 0))[0]
    assert abs(hue - 215) <= 4


# --- what a sample depends on ---------------------------------------------------------------------


@both
def test_rows_depend_on_the_arguments_and_their_index_alone(variant):
    whole = counting_polygons.batch(variant, "test", 3, np.arange(6))
    part = counting_polygons.batch(variant, "test", 3, np.array([5, 2, 5]))
    for all_rows, rows in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_rows[[5, 2, 5]], rows)
    assert len({image.tobytes() for image in whole.image}) == 6
    other = STARS if variant is POLYGONS else POLYGONS
    for images in (counting_polygons.batch(variant, "test", 4, np.arange(6)).image,
                   counting_polygons.batch(variant, "train", 3, np.arange(6)).image,
                   counting_polygons.batch(other, "test", 3, np.arange(6)).image):  # fmt: skip
        assert (images != whole.image).any(axis=(1, 2, 3)).all()
    assert counting_polygons.batch(variant, "test", 3, np.zeros(0, int)).image.shape[0] == 0


def test_a_variant_of_ones_own():
    counts = PolygonConfig(min_vertices=4, max_vertices=4)
    variant = Variant(counts=counts, inner_radius=0.5)
    label = counting_polygons.batch(variant, "train", 0, np.arange(60)).label
    assert set(label[:, 0].tolist()) == set(range(1, 10))
    assert set(label[:, 1].tolist()) == {4}


def test_the_bundled_photographs_are_used_by_default():
    """In every hue, and no part of a picture in both splits."""
    train, test = map(counting_polygons._photographs, ("train", "test"))
    from sklearn.datasets import load_sample_images

    for left, right, whole in zip(test, train, load_sample_images().images, strict=True):
        np.testing.assert_array_equal(np.hstack([left, right]), whole)
    image = counting_polygons.batch(POLYGONS, "test", 0, np.arange(64)).image
    assert image.min() >= -1
    assert image.max() <= 1
    assert image.std(axis=(1, 2, 3)).min() > 0.05
    pixels = ((image + 1) * 127.5).round().astype(np.uint8).reshape(64, -1, 3)
    hues = Image.fromarray(pixels).convert("HSV").getchannel("H")
    assert (np.bincount(np.asarray(hues).ravel() // 32, minlength=8) > 64 * 128 * 128 / 40).all()


# --- a folder of backgrounds ----------------------------------------------------------------------


def flags(folder, number, size=(128, 128)):
    """Pictures of another brightness each, their right half black."""
    for index in range(number):
        picture = Image.new("RGB", size, (100 + index, 100 + index, 100 + index))
        picture.paste((0, 0, 0), (size[0] // 2, 0, *size))
        path = folder / f"{index // 10}" / f"{index:03}.PNG"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)


def test_splits_share_no_background_and_training_mirrors(tmp_path):
    flags(tmp_path, 40)
    (tmp_path / "readme.txt").write_text("no image")
    seen = {}
    for split, number in (("train", 400), ("test", 30)):
        image = counting_polygons.batch(POLYGONS, split, 0, np.arange(number), tmp_path).image
        pixels = np.round((image + 1) * 127.5)[..., 0].reshape(number, 128, 2, 64)
        # The commonest value of either half.
        common = [
            [np.bincount(half.astype(int).ravel(), minlength=256).argmax() for half in picture]
            for picture in pixels.swapaxes(1, 2)
        ]
        sides = np.array(common)
        assert (sides.min(axis=1) == 0).all()
        seen[split] = set((sides.max(axis=1) - 100).tolist())
        mirrored = (sides[:, 0] == 0).mean()
        assert mirrored == 0 if split == "test" else abs(mirrored - 0.5) < 0.1
    assert seen == {"train": set(range(38)), "test": {38, 39}}


@pytest.mark.parametrize("size", [(300, 128), (128, 200), (64, 40), (1024, 1024), (1, 1), (1, 900)])
def test_backgrounds_of_any_size_are_scaled_and_cropped_to_their_middle(tmp_path, size):
    ramp = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[1], size[0])
    Image.fromarray(ramp).save(tmp_path / "a.png")
    background = np.asarray(counting_polygons._read(tmp_path / "a.png"))
    assert background.shape == (128, 128, 3)
    assert abs(background[64, 64, 0] - ramp.mean()) < 3


def test_a_background_of_16_bits_is_neither_white_nor_black(tmp_path):
    for name in "ab":
        Image.fromarray(np.full((128, 128), 40 * 257, np.uint16)).save(tmp_path / f"{name}.png")
    image = counting_polygons.batch(POLYGONS, "test", 0, np.arange(1), tmp_path).image
    np.testing.assert_array_equal(np.round((np.median(image, axis=(1, 2)) + 1) * 127.5), 40)


def make(folder):
    return counting_polygons.make("polygons", lambda images: None, folder)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"PK\3\4")
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "only.jpg")
    for path, found in (
        (folder, f"found 1: {folder} holds only.jpg"),
        (tmp_path / "missing", f"found 0: there is no folder {tmp_path / 'missing'}"),
        (tmp_path / "file", f"found 0: {tmp_path / 'file'} is a zip archive that is cut"),
    ):
        for use in (
            make,
            lambda path: counting_polygons.batch(POLYGONS, "train", 0, np.arange(1), path),
        ):
            with pytest.raises(ValueError, match=r"at least 2 images \(\.bmp, \.gif") as error:
                use(path)
            assert found in str(error.value)


def test_a_damaged_background_is_refused_by_name_when_the_task_is_made(tmp_path, rng):
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("a.png", "b.jpg", "c.png"):
        noise.save(tmp_path / name)
    task = make(tmp_path)
    data = (tmp_path / "a.png").read_bytes()
    for damaged in (data[:2000], b"text", b""):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: "):
            make(tmp_path)
        with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: "):
            task.training_batch(0, np.arange(9))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", 0, [0]), "'train' or 'test', got 'all'"),
        (("test", -1, [0]), "seed must be >= 0 .* got -1"),
        (("test", 0, [-1]), "indices a flat list of numbers >= 0"),
        (("test", 0, 3), "indices a flat list of numbers >= 0"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        counting_polygons.batch(POLYGONS, *arguments)


@pytest.mark.parametrize(
    ("counts", "inner_radius", "message"),
    [
        ({"max_vertices": 12}, 0.1, "max_vertices must be one digit, at most 9, got 12"),
        ({"min_vertices": 2}, None, "at least 3 for polygons and 2 for stars, got 2"),
        ({"min_vertices": 1}, 0.1, "at least 3 for polygons and 2 for stars, got 1"),
        ({"min_vertices": 8}, None, "min_vertices must not exceed max_vertices=7, got 8"),
        ({}, 1.0, r"inner_radius must be in \(0, 1\) or None, got 1.0"),
        ({}, float("nan"), r"inner_radius must be in \(0, 1\) or None, got nan"),
    ],
)
def test_impossible_counts_are_refused(counts, inner_radius, message):
    with pytest.raises(ValueError, match=message):
        Variant(counts=PolygonConfig(**counts), inner_radius=inner_radius)


def test_variants_have_names():
    assert counting_polygons.get_variant("polygons") is POLYGONS
    assert counting_polygons.get_variant("stars") is STARS
    with pytest.raises(ValueError, match=re.escape("'circles'; known: ['polygons', 'stars']")):
        counting_polygons.get_variant("circles")


# --- scores ---------------------------------------------------------------------------------------


def test_scores_compare_the_numbers_in_either_order():
    counts = Counts(
        num_polygons=jnp.array([5, 3, 3, 5, 4, 9]),
        num_vertices=jnp.array([3, 5, 3, 5, 4, 3]),
        is_uniform=jnp.array([True, False, True, True, False, True]),
        stated=jnp.array([[3, 5], [3, 5], [3, 5], [3, 5], [4, 4], [3, 8]]),
    )
    score = jax.jit(functools.partial(counting_polygons.scores, classify=lambda images: counts))
    scores = score(jnp.zeros((6, 128, 128, 3)))
    assert scores["consistent"].tolist() == [True, True, False, False, True, False]
    assert scores["uniform"].tolist() == counts.is_uniform.tolist()
    for name in ("num_polygons", "num_vertices", "stated"):
        np.testing.assert_array_equal(scores[name], getattr(counts, name))
    task = counting_polygons.make("polygons", classify=lambda images: counts)
    seen = task.read(jnp.zeros((6, 128, 128, 3)))
    np.testing.assert_array_equal(seen[1], [3, 5, 3, 5, 0])
    np.testing.assert_array_equal(seen[5], [9, 3, 3, 8, 1])
    with pytest.raises(ValueError, match=r"\[B, 128, 128, 3\], got \(1, 128, 128\)"):
        score(jnp.zeros((1, 128, 128)))


@pytest.mark.parametrize(("variant", "corners"), [("polygons", "corners"), ("stars", "points")])
def test_samples_are_described_by_the_numbers_stated_and_counted(variant, corners):
    stated = np.array([[3, 5], [1, 9]])
    counts = Counts(np.array([5, 3]), np.array([3, 6]), np.array([True, False]), stated)
    task = counting_polygons.make(variant, classify=lambda images: counts)
    found = jax.device_get(task.score(jnp.zeros((2, 128, 128, 3))))
    assert task.describe(found) == [f"says 3, 5: 5 x 3 {corners}", "says 1, 9: 3 x 6, unequal"]


@both
def test_scores_take_the_classifier_of_the_variant(variant):
    def score(images):
        model = PolygonClassifier(variant.counts, rngs=nnx.Rngs(0))
        return counting_polygons.scores(images, lambda x: read_counts(model(x), variant.counts))

    shapes = nnx.eval_shape(score, jax.ShapeDtypeStruct((7, 128, 128, 3), jnp.float32))
    assert {name: (value.shape, str(value.dtype)) for name, value in shapes.items()} == {
        "consistent": ((7,), "bool"),
        "uniform": ((7,), "bool"),
        "num_polygons": ((7,), "int32"),
        "num_vertices": ((7,), "int32"),
        "stated": ((7, 2), "int32"),
    }
