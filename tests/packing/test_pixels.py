"""Image input: the same numbers as transformers' image processor for Qwen-VL models."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from coordexp.errors import DataError
from coordexp.packing.pixels import PixelSpec, load_rgb, patchify, resized_size
from helpers import tiny_pixels

QWEN3_VL = PixelSpec(patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=65_536, max_pixels=1_048_576)


def processor(spec: PixelSpec) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        temporal_patch_size=spec.temporal_patch_size,
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("spec", [tiny_pixels(), QWEN3_VL], ids=["tiny", "qwen3-vl"])
@pytest.mark.parametrize(("columns", "rows"), [(9, 8), (8, 8), (8, 10)])
def test_patches_equal_those_of_transformers(spec, columns, rows):
    rgb = noise(columns * spec.factor, rows * spec.factor)
    expected = processor(spec)(Image.fromarray(rgb), do_resize=False, return_tensors="np")
    patches = patchify(rgb, spec)
    assert expected["image_grid_thw"].tolist() == [
        [1, rgb.shape[0] // spec.patch_size, rgb.shape[1] // spec.patch_size]
    ]
    assert patches.shape == expected["pixel_values"].shape
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, expected["pixel_values"], atol=1e-6)
    assert len(patches) == spec.tokens(rgb.shape[1], rgb.shape[0]) * spec.merge_size**2


def test_reading_and_resizing_equal_those_of_transformers(tmp_path):
    Image.fromarray(noise(101, 75)).save(tmp_path / "a.png")
    spec = tiny_pixels()
    rgb = load_rgb(tmp_path / "a.png", *resized_size(101, 75, spec))
    expected = processor(spec)(Image.open(tmp_path / "a.png"), return_tensors="np")
    np.testing.assert_allclose(patchify(rgb, spec), expected["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("spec", [tiny_pixels(), QWEN3_VL], ids=["tiny", "qwen3-vl"])
def test_sizes_equal_those_of_transformers(spec):
    limits = {"factor": spec.factor, "min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    for width, height in (
        np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(6000), (2000, 2))).astype(int).tolist()
    ):
        if max(width, height) > 200 * min(width, height):
            continue
        new_width, new_height = resized_size(width, height, spec)
        assert (new_height, new_width) == smart_resize(height, width, **limits), (width, height)
        assert new_width % spec.factor == new_height % spec.factor == 0
        assert new_width * new_height >= spec.min_pixels


def test_ten_thousand_sizes_of_any_shape_equal_those_of_transformers():
    """From 1 px to 20,000 px and aspect ratios up to 200, with the areas that profiles use."""
    rng = np.random.default_rng(1)
    areas = [(65_536, 16_777_216), (65_536, 1_048_576), (4096, 9216), (262_144, 262_144)]
    for trial in range(10_000):
        low, high = areas[trial % len(areas)]
        longer, ratio = np.exp(rng.uniform(0, np.log(20_000))), np.exp(rng.uniform(0, np.log(200)))
        sides = sorted([max(1, int(longer)), max(1, int(longer / ratio))])
        width, height = sides if trial % 2 else sides[::-1]
        if max(sides) > 200 * min(sides):
            continue
        spec = PixelSpec(16, 2, 2, low, high)
        new_width, new_height = resized_size(width, height, spec)
        expected = smart_resize(height, width, factor=32, min_pixels=low, max_pixels=high)
        assert (new_height, new_width) == expected, (width, height, low, high)
        assert spec.tokens(new_width, new_height) == new_width * new_height // 1024 > 0


def test_a_resized_image_keeps_its_size():
    for width, height in ((64, 128), (96, 96), (128, 96)):
        assert resized_size(width, height, tiny_pixels()) == (width, height)


def test_extreme_aspect_ratios_are_refused():
    assert resized_size(2000, 10, tiny_pixels())[0] > 0
    with pytest.raises(DataError, match="2001x10 px: aspect ratio above 200"):
        resized_size(2001, 10, tiny_pixels())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_color_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(noise(32, 16)).convert(mode).save(path)
    rgb = load_rgb(path, 32, 16)
    assert rgb.shape == (16, 32, 3)
    assert rgb.dtype == np.uint8


def test_an_image_of_the_correct_size_is_not_resampled(tmp_path):
    Image.fromarray(noise(32, 16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_rgb(tmp_path / "a.png", 32, 16), noise(32, 16))


def test_errors_name_the_damaged_image(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no image")
    problems = {
        "cut.jpg": "cannot be read as an image",
        "text.jpg": "its content is none of",
        "missing.jpg": "no such file",
    }
    for name, problem in problems.items():
        with pytest.raises(DataError, match=f"{name}: .*{problem}"):
            load_rgb(tmp_path / name, 64, 64)
