from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from unlabel import duplicates
from unlabel.cache import ImageCache, load_cache
from unlabel.duplicates import _near_hashes, clusters, content_split
from unlabel.sources import open_source


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLABEL_CACHE", str(tmp_path / "cache"))


def scene(seed: int, size: int = 160) -> Image.Image:
    """Something like a photo: power at all scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3))
    for grid in (3, 6, 12, 24, 48):
        layer = Image.fromarray(rng.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
        total += (np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC), float) - 127.5) * 3 / grid**0.5
    return Image.fromarray(np.clip(total / 2 + 127.5, 0, 255).astype(np.uint8))


def packed(folder: Path, images: dict[str, Image.Image], image_size: int = 64) -> ImageCache:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return load_cache(open_source(str(folder)), image_size, progress=False)


def groups(caches: list[ImageCache]) -> set[frozenset[str]]:
    members: dict[int, set[str]] = {}
    for k, (cache, ids) in enumerate(zip(caches, clusters(caches), strict=True)):
        for name, i in zip(cache.names, ids.tolist(), strict=True):
            members.setdefault(i, set()).add(f"{k}/{name}")
    return {frozenset(names) for names in members.values() if len(names) > 1}


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same": lambda image: image,
    "mirror": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "small": lambda image: image.resize((110, 110), Image.Resampling.LANCZOS),
    "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "grey": lambda image: image.convert("L"),
}
OTHER: dict[str, Callable[[Image.Image], Image.Image]] = {
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "upside_down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "negative": lambda image: image.point(lambda value: 255 - value),
}


def test_copies_within_and_between_sources_are_found_and_nothing_else(tmp_path: Path) -> None:
    here = {f"{i}.png": scene(i) for i in range(40)}
    there = {f"{i}{name}.png": change(scene(i)) for i, (name, change) in enumerate((CHANGES | OTHER).items())}
    here["10.jpg"] = there["11.jpg"] = scene(10)  # saved as JPEG, whose pixels differ
    expected = {frozenset({f"0/{i}.png", f"1/{i}{name}.png"}) for i, name in enumerate(CHANGES)}
    expected |= {frozenset({"0/10.png", "0/10.jpg", "1/11.jpg"})}
    caches = [packed(tmp_path / "a", here), packed(tmp_path / "b", there)]
    assert groups(caches) == expected
    swapped = groups([caches[1], caches[0]])
    assert {frozenset(f"{1 - int(name[0])}{name[1:]}" for name in group) for group in swapped} == expected


def test_pairs_of_near_hashes_are_those_of_a_search_through_all() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(200):  # neighbours at 0 to 6 bits
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        first[i + 100] = first[i % 100] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    second = np.concatenate([first[50:], first[:50]])
    for other in (first, second):
        i, j = np.nonzero(np.bitwise_count(first[:, None] ^ other[None]) <= 4)
        expected = np.stack([i, j], 1)[i < j]
        assert len(expected) > 30
        found = np.concatenate(list(_near_hashes(first, other)))
        np.testing.assert_array_equal(found[np.lexsort(found.T[::-1])], expected)


def test_many_frames_of_one_scene_are_compared_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed camera's 10,000 frames are fifty million pairs."""
    cache = packed(tmp_path / "f", {f"{q}.jpg": scene(3) for q in range(60)} | {"other.png": scene(4)})
    for q in range(60):
        scene(3).save(tmp_path / "f" / f"{q}.jpg", quality=40 + q)
    cache = load_cache(open_source(str(tmp_path / "f")), 64, progress=False)
    assert len(set(cache.hashes)) == 61
    looked_at, real = [], duplicates._agree
    monkeypatch.setattr(duplicates, "_CONFIRM", 16)
    monkeypatch.setattr(duplicates, "_THUMBS", 7)
    monkeypatch.setattr(duplicates, "_agree", lambda *args: (looked_at.append(len(args[1])), real(*args))[1])
    assert groups([cache]) == {frozenset(f"0/{q}.jpg" for q in range(60))}
    assert sum(looked_at) < 4 * 60
    assert max(looked_at) == 16


def test_pictures_of_one_colour_are_copies_only_of_themselves(tmp_path: Path) -> None:
    plain = {f"{value}.png": Image.new("RGB", (50, 50), (value, value, value)) for value in range(0, 256, 15)}
    cache = packed(tmp_path / "f", plain | {"again.png": Image.new("RGB", (50, 50), (15, 15, 15))})
    assert groups([cache]) == {frozenset({"0/15.png", "0/again.png"})}


def test_simple_pictures_do_not_chain_into_one_cluster() -> None:
    cache = load_cache(open_source("digits"), 32, progress=False)
    sizes = np.bincount(clusters([cache])[0])
    assert sizes.max() <= 5
    assert sizes[sizes > 1].sum() < 0.03 * len(cache)


def test_the_split_is_stratified_by_content_and_keeps_clusters_whole(tmp_path: Path) -> None:
    images = {}
    for i in range(60):
        images[f"{'cat' if i < 40 else 'dog'}/{i:02d}.png"] = scene(i, 40)
    for i in range(0, 60, 4):
        images[f"{'cat' if i < 40 else 'dog'}/{i:02d}m.png"] = CHANGES["mirror"](scene(i, 40))
    cache = packed(tmp_path / "f", images)
    ids = clusters([cache])[0]
    assert len(set(ids.tolist())) == 60
    test = content_split(cache, ids)
    assert test.sum() == 15
    labels = np.array(cache.labels)
    assert test[labels == "cat"].sum() == 10
    assert test[labels == "dog"].sum() == 5
    for group in set(ids.tolist()):
        assert len(set(test[ids == group].tolist())) == 1

    # The same images elsewhere, in another order and under other names, are split in the same way.
    order = np.random.default_rng(0).permutation(len(cache))
    shuffled = cache.subset(order)
    np.testing.assert_array_equal(content_split(shuffled, 1000 - ids[order]), test[order])
    renamed = {f"{name[:4]}{99 - int(name[4:6])}{name[6:]}": image for name, image in images.items()}
    other = packed(tmp_path / "g", renamed)
    other_test = content_split(other, clusters([other])[0])
    assert set(np.array(other.hashes)[other_test]) == set(np.array(cache.hashes)[test])
    unlabelled = content_split(packed(tmp_path / "h", {f"{i}.png": scene(i, 40) for i in range(20)}), np.arange(20))
    assert unlabelled.sum() == 4


def test_every_class_keeps_images_for_training_and_gets_some_for_testing(tmp_path: Path) -> None:
    images = {f"a/{i}.png": scene(i, 40) for i in range(2)} | {"b/0.png": scene(5, 40)}
    images |= {f"c/{i}.png": scene(10 + i // 5, 40) for i in range(10)}  # two pictures, five times each
    cache = packed(tmp_path / "f", images)
    test = content_split(cache, clusters([cache])[0])
    labels = np.array(cache.labels)
    assert [int(test[labels == label].sum()) for label in "abc"] == [1, 0, 5]
