"""Predict single images: the same pixels give the same masks however they are stored, and nothing is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from torch import Tensor, nn

from segpipe.models.networks import build_network
from segpipe.models.weights import Card, Reach, save_bundle
from segpipe.pipeline.cli import main
from segpipe.pipeline.predict import GAP_PX, plan_predictions, predict_images
from segpipe.tasks.errors import UserError

OWN = "test_predict:Bright"
Save = Callable[[Path, NDArray[np.uint8]], None]

pytestmark = pytest.mark.usefixtures("signals")


class Bright(nn.Module):
    """The logit of a pixel is its brightness, from -10 to 10: what it gives can be worked out without it."""

    stride = 1

    def __init__(self, bands: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bands, 1, 1)
        nn.init.constant_(self.conv.weight, 20 / bands)
        nn.init.constant_(self.conv.bias, -10)

    def forward(self, image: Tensor) -> Tensor:
        """Same H and W."""
        logits: Tensor = self.conv(image)
        return logits


def write_bundle(path: Path, bands: int = 3, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "architecture": OWN,
        "module": OWN,
        "arguments": {"bands": bands, "classes": 1},
        "bands": ("red", "green", "blue") if bands == 3 else tuple(f"band {k}" for k in range(1, bands + 1)),
        "mean": (0.0,) * bands,
        "std": (1.0,) * bands,
        "stride": 1,
        "halo_px": 0,
        "receptive_field_px": Reach(0, 0, 0, 0),
        "resolution_m": 0.3,
        "resolution_range_m": (0.2, 0.5),
    }
    save_bundle(path, build_network(OWN, bands=bands), Card(**values | changes))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bright.safetensors")


def scene(height: int, width: int, bands: int = 3) -> NDArray[np.uint8]:
    """Patches of all brightnesses, image_HWC."""
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (height, width, bands), np.uint8)


def expected(image_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Probabilities of 0 to 250, not rounded."""
    found: NDArray[np.float64] = 250 / (1 + np.exp(10 - 20 * image_HWC.astype(np.float64).mean(axis=2) / 255))
    return found


def predict(images: list[Path], model: Path, output: Path, **options: Any) -> None:
    list(predict_images(plan_predictions(images, str(model), output, module=OWN, **options)))


def read(output: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Mask, probability and panel."""
    mask, probability, panel = (
        np.asarray(Image.open(output / f"{name}_{kind}.png")) for kind in ("mask", "probability", "panel")
    )
    return mask, probability, panel


@pytest.mark.parametrize("shape", [(37, 53), (1, 1), (1030, 7)])
def test_an_image_of_any_size_gets_mask_probability_and_panel_of_that_size(
    tmp_path: Path, model: Path, shape: tuple[int, int]
) -> None:
    image = scene(*shape)
    Image.fromarray(image).save(tmp_path / "a.png")
    predict([tmp_path / "a.png"], model, tmp_path / "out")
    mask, probability, panel = read(tmp_path / "out", "a")
    assert mask.shape == probability.shape == shape
    assert np.abs(probability - expected(image)).max() <= 0.51
    assert np.array_equal(mask, np.where(probability >= 125, 255, 0))
    parts = np.split(panel, [shape[1], shape[1] + GAP_PX, 2 * shape[1] + GAP_PX, 2 * (shape[1] + GAP_PX)], axis=1)
    assert np.array_equal(parts[0], image)
    assert np.array_equal(parts[2], np.repeat(mask[..., None], 3, axis=2))
    assert np.array_equal(parts[4], np.where(mask[..., None] == 255, image, 0))
    assert (parts[1] == 255).all() and (parts[3] == 255).all()


@pytest.mark.parametrize(("threshold", "level"), [(None, 75), (0.5, 125), (0.301, 76), (0.998, 250)])
def test_the_mask_is_where_the_stored_probability_reaches_the_threshold(
    tmp_path: Path, threshold: float | None, level: int
) -> None:
    model = write_bundle(tmp_path / "bright.safetensors", threshold=0.3)
    Image.fromarray(scene(60, 70)).save(tmp_path / "a.png")
    predict([tmp_path / "a.png"], model, tmp_path / "out", threshold=threshold)
    mask, probability, _ = read(tmp_path / "out", "a")
    assert np.array_equal(mask == 255, probability >= level)


def tiff(path: Path, image_HWC: NDArray[np.uint8], **options: Any) -> None:
    height, width, count = image_HWC.shape
    colours = options.pop("colorinterp", None)
    colormap = options.pop("colormap", None)
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype="uint8", **options
    ) as file:
        if colours is not None:
            file.colorinterp = colours
        if colormap is not None:
            file.write_colormap(1, colormap)
        file.write(np.moveaxis(image_HWC, 2, 0))


RGBA = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
KINDS: dict[str, Save] = {
    "tif": lambda path, image: Image.fromarray(image).save(path, "TIFF"),
    "planar": lambda path, image: tiff(path, image, interleave="band", compress="deflate", tiled=True),
    "rgba-png": lambda path, image: Image.fromarray(image).convert("RGBA").save(path, "PNG"),
    "rgba-tif": lambda path, image: tiff(
        path, np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]), colorinterp=RGBA, alpha="yes"
    ),
    "webp": lambda path, image: Image.fromarray(image).save(path, "WEBP", lossless=True),
    "five bands": lambda path, image: tiff(path, np.dstack([image, image[..., ::-1]])[..., :5], photometric="rgb"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_pixels_give_the_same_masks_however_they_are_stored(tmp_path: Path, model: Path, kind: str) -> None:
    image = scene(40, 50)
    Image.fromarray(image).save(tmp_path / "plain.png")
    KINDS[kind](tmp_path / "other", image)
    predict([tmp_path / "plain.png", tmp_path / "other"], model, tmp_path / "out")
    for one, other in zip(read(tmp_path / "out", "plain"), read(tmp_path / "out", "other"), strict=True):
        assert np.array_equal(one, other)


def palette_png(path: Path, grey: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(255 - grey).convert("P")
    picture.putpalette(np.repeat(np.arange(255, -1, -1), 3).astype(np.uint8).tobytes())
    picture.save(path, "PNG")


GREYS: dict[str, Save] = {
    "grey png": lambda path, grey: Image.fromarray(grey).save(path, "PNG"),
    "grey tif": lambda path, grey: tiff(path, grey[..., None]),
    "palette png": palette_png,
    "palette tif": lambda path, grey: tiff(
        path, 255 - grey[..., None], colormap={k: (255 - k, 255 - k, 255 - k, 255) for k in range(256)}
    ),
    "white is zero": lambda path, grey: tiff(path, 255 - grey[..., None], photometric="miniswhite"),
    "one bit": lambda path, grey: Image.fromarray(grey).convert("1").save(path, "TIFF"),
    "cmyk": lambda path, grey: Image.merge(
        "CMYK", [Image.new("L", grey.shape[::-1])] * 3 + [Image.fromarray(255 - grey)]
    ).save(path, "TIFF"),
}


@pytest.mark.parametrize("kind", list(GREYS))
def test_grey_is_repeated_and_palettes_are_expanded(tmp_path: Path, model: Path, kind: str) -> None:
    grey = np.where(scene(30, 40, 1)[..., 0] > 127, 255, 0).astype(np.uint8)
    if kind != "one bit":
        grey[::2] = scene(15, 40, 1)[..., 0]
    GREYS[kind](tmp_path / "a", grey)
    predict([tmp_path / "a"], model, tmp_path / "out")
    mask, probability, _ = read(tmp_path / "out", "a")
    assert np.abs(probability - expected(grey[..., None])).max() <= 0.51
    assert np.array_equal(mask == 255, probability >= 125)


VALIDITIES: dict[str, Save] = {
    "alpha png": lambda path, image: Image.fromarray(image).save(path, "PNG"),
    "alpha tif": lambda path, image: tiff(path, image, colorinterp=RGBA, alpha="yes"),
    "nodata": lambda path, image: tiff(
        path, np.where(image[..., 3:] != 0, np.maximum(image[..., :3], 1), 0), nodata=0, photometric="rgb"
    ),
}


@pytest.mark.parametrize("kind", list(VALIDITIES))
def test_what_has_no_pixel_has_no_probability_and_is_never_a_building(tmp_path: Path, kind: str) -> None:
    # Where nothing is, this network would see a building: fill is white.
    model = write_bundle(tmp_path / "bright.safetensors", fill=1.0)
    image = np.dstack([np.maximum(scene(40, 50), 1), np.full((40, 50), 255, np.uint8)])
    image[10:20, 5:45, 3] = 0
    VALIDITIES[kind](tmp_path / "a", image)
    predict([tmp_path / "a"], model, tmp_path / "out")
    mask, probability, panel = read(tmp_path / "out", "a")
    assert np.array_equal(probability == 255, image[..., 3] == 0)
    assert not mask[image[..., 3] == 0].any() and mask.any()
    assert not panel[:, :50][image[..., 3] == 0].any()


def test_a_bundle_of_resized_images_sees_images_at_its_own_size(tmp_path: Path) -> None:
    model = write_bundle(tmp_path / "bright.safetensors", resize_px=(16, 24))
    image = np.repeat(np.repeat(scene(8, 8), 11, axis=0), 9, axis=1)
    Image.fromarray(image).save(tmp_path / "a.png")
    predict([tmp_path / "a.png"], model, tmp_path / "out")
    mask, probability, _ = read(tmp_path / "out", "a")
    small = np.asarray(Image.fromarray(image).resize((24, 16), Image.Resampling.BILINEAR))
    prob = Image.fromarray(expected(small).astype(np.float32)).resize((72, 88), Image.Resampling.BILINEAR)
    assert mask.shape == (88, 72)
    assert np.abs(probability - np.asarray(prob)).max() <= 0.51


@pytest.mark.parametrize("bands", [1, 4])
def test_a_bundle_of_other_bands_gets_those_that_it_was_trained_on(tmp_path: Path, bands: int) -> None:
    model = write_bundle(tmp_path / "bright.safetensors", bands=bands)
    image = scene(30, 40, 4)
    tiff(tmp_path / "a.tif", image, photometric="rgb", alpha="unspecified")
    predict([tmp_path / "a.tif"], model, tmp_path / "out")
    assert np.abs(read(tmp_path / "out", "a")[1] - expected(image[..., :bands])).max() <= 0.51
    Image.fromarray(image[..., :3]).save(tmp_path / "b.png")
    if bands == 4:
        with pytest.raises(UserError, match=r"b\.png: bands"):
            predict([tmp_path / "b.png"], model, tmp_path / "out")
        return
    predict([tmp_path / "b.png"], model, tmp_path / "out")
    assert np.array_equal(*(read(tmp_path / "out", name)[1] for name in "ab"))


def test_the_mask_of_a_georeferenced_image_lies_where_the_image_does(tmp_path: Path, model: Path) -> None:
    place = from_origin(500_000.1, 4_000_000.2, 0.3, 0.3)
    tiff(tmp_path / "a.tif", scene(30, 40), crs="EPSG:32633", transform=place, photometric="rgb")
    found = segpipe("predict", tmp_path / "a.tif", "--model", model, "--module", OWN, "--output", tmp_path / "out")
    assert found.exit_code == 0 and "segpipe run" in found.stdout
    for kind in ("mask", "probability"):
        with rasterio.open(tmp_path / "out" / f"a_{kind}.png") as file:
            assert file.transform.almost_equals(place, 1e-6)


def segpipe(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_every_image_is_told_of_and_predicted_again_over_its_own_files(tmp_path: Path, model: Path) -> None:
    Image.fromarray(np.full((30, 40, 3), 255, np.uint8)).save(tmp_path / "white.png")
    Image.fromarray(np.zeros((20, 10, 3), np.uint8)).save(tmp_path / "black.jpg")
    arguments = ("predict", *tmp_path.glob("*.[jp]*g"), "--model", model, "--module", OWN, "--output", tmp_path / "out")
    for _ in range(2):
        found = segpipe(*arguments)
        assert found.exit_code == 0, found.stderr
        assert "white.png: 40 x 30 px, 100.0% in the mask" in found.stdout
        assert "black.jpg: 10 x 20 px, 0.0% in the mask" in found.stdout
        assert "segpipe run" not in found.stdout
    assert len(list((tmp_path / "out").iterdir())) == 6


def cut_short(folder: Path) -> list[Path]:
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:900])
    return [folder / "bad.png"]


def cut_short_tiff(folder: Path) -> list[Path]:
    tiff(folder / "whole.tif", scene(200, 200), compress="deflate")
    (folder / "bad.tif").write_bytes((folder / "whole.tif").read_bytes()[:50_000])
    return [folder / "bad.tif"]


def sixteen_bits(folder: Path) -> list[Path]:
    with rasterio.open(folder / "deep.tif", "w", driver="GTiff", height=9, width=9, count=3, dtype="uint16") as file:
        file.write(np.ones((3, 9, 9), np.uint16))
    return [folder / "deep.tif"]


def two_bands(folder: Path) -> list[Path]:
    tiff(folder / "two.tif", scene(9, 9, 2))
    return [folder / "two.tif"]


def text(folder: Path) -> list[Path]:
    (folder / "notes.png").write_text("no image")
    return [folder / "notes.png"]


def same_name(folder: Path) -> list[Path]:
    Image.fromarray(scene(9, 9)).save(folder / "good.jpg")
    return [folder / "good.jpg"]


def truth_beside(folder: Path) -> list[Path]:
    Image.fromarray(scene(9, 9)).save(folder / "pet.png")
    (folder / "out").mkdir()
    Image.fromarray(scene(9, 9)).save(folder / "out" / "pet_mask.png")
    return [folder / "pet.png"]


BAD: list[tuple[Callable[[Path], list[Path]], str]] = [
    (cut_short, "bad.png"),
    (cut_short_tiff, "bad.tif"),
    (sixteen_bits, "8 bits"),
    (two_bands, "2 bands"),
    (text, "notes.png"),
    (same_name, "different names"),
    (truth_beside, "another --output"),
    (lambda folder: [folder / "none.png"], "none.png: cannot be read"),
    (lambda folder: [folder], "expected images, such as"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_anything_is_written(
    tmp_path: Path, model: Path, make: Callable[[Path], list[Path]], words: str
) -> None:
    Image.fromarray(scene(30, 40)).save(tmp_path / "good.png")
    images = [tmp_path / "good.png", *make(tmp_path)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = segpipe("predict", *images, "--model", model, "--module", OWN, "--output", tmp_path / "out")
    assert found.exit_code == 2, found.stderr
    assert len(found.stderr.splitlines()) == 1 and words in found.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_input_is_never_overwritten(tmp_path: Path, model: Path) -> None:
    for name in ("a", "a_mask"):
        Image.fromarray(scene(9, 9)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"a_mask\.png: is there"):
        predict([tmp_path / "a.png", tmp_path / "a_mask.png"], model, tmp_path)


def test_code_of_a_users_own_network_runs_only_where_it_is_named(tmp_path: Path, model: Path) -> None:
    Image.fromarray(scene(9, 9)).save(tmp_path / "a.png")
    found = segpipe("predict", tmp_path / "a.png", "--model", model, "--output", tmp_path / "out")
    assert found.exit_code == 2 and f"--module {OWN}" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_and_a_threshold_out_of_range_are_refused(tmp_path: Path, model: Path) -> None:
    Image.fromarray(scene(9, 9)).save(tmp_path / "a.png")
    arguments = ("predict", tmp_path / "a.png", "--output", tmp_path / "out", "--module", OWN)
    assert "no file" in segpipe(*arguments, "--model", "absent").stderr
    found = segpipe(*arguments, "--model", model, "--threshold", "1")
    assert found.exit_code == 2 and "--threshold" in found.stderr


def test_the_packaged_bundle_predicts_a_photograph(tmp_path: Path) -> None:
    Image.fromarray(scene(70, 90)).save(tmp_path / "a.jpg")
    bundle = "buildings-mobilenetv2"
    found = segpipe("predict", tmp_path / "a.jpg", "--model", bundle, "--output", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    mask, probability, panel = read(tmp_path / "out", "a")
    assert mask.shape == probability.shape == (70, 90) and panel.shape == (70, 3 * 90 + 2 * GAP_PX, 3)
