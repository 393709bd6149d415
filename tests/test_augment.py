from dataclasses import replace

import numpy as np
import pytest
import torch

from segpipe.models.augment import Augmentation, Framing, Normalisation, augment, plain, prepare

PLAIN = Augmentation(
    scale=(1, 1), tilt=0, brightness=0, contrast=(1, 1), saturation=(1, 1), gain=(1, 1), degraded=0, borders=0, holes=0
)
NORMAL = Normalisation()
CPU = torch.device("cpu")


def make_crops(batch, height, width=None, seed=0):
    """Bright squares on dark ground: the label is where the image is bright."""
    rng = np.random.default_rng(seed)
    width = width or height
    label = np.zeros((batch, height, width), np.uint8)
    for one in label:
        for row, col in rng.integers(0, (height - 12, width - 12), (6, 2)):
            one[row : row + 12, col : col + 12] = 1
    image = np.where(label[:, None] == 1, 200, 60) + rng.integers(-30, 30, (batch, 3, height, width))
    valid = np.ones_like(label)
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(label), torch.from_numpy(valid)


def raw(image, label, valid, seed=0):
    return {"image_BCHW": image, "label_BHW": label, "valid_BHW": valid, "seed": seed}


def pixels_of(batch):
    mean, std = torch.tensor(NORMAL.mean).view(3, 1, 1), torch.tensor(NORMAL.std).view(3, 1, 1)
    return torch.round((batch.image_BCHW * std + mean) * 255)


def test_without_any_change_a_variant_is_a_turned_or_mirrored_crop():
    image, label, valid = make_crops(16, 40)
    batch = augment(image, label, valid, (24, 24), PLAIN, NORMAL, np.random.default_rng(0))
    kinds = set()
    for index, pixels in enumerate(pixels_of(batch)):
        inner, marked = image[index, :, 8:32, 8:32].float(), label[index, 8:32, 8:32]
        variants = [
            (turn, flip)
            for turn in range(4)
            for flip in (False, True)
            if torch.equal(pixels, turned(inner, turn, flip))
        ]
        assert len(variants) == 1
        assert torch.equal(batch.target_BKHW[index, 0], turned(marked, *variants[0]).float())
        kinds.add(variants[0])
    assert len(kinds) > 4
    assert batch.valid_BHW.all()


def turned(pixels, turn, flip):
    turned = torch.rot90(pixels, turn, (-2, -1))
    return turned.flip(-1) if flip else turned


def test_crops_that_are_not_square_are_turned_around_their_centre():
    image, label, valid = make_crops(16, 48, 48)
    batch = augment(image, label, valid, (16, 32), PLAIN, NORMAL, np.random.default_rng(0))
    assert batch.image_BCHW.shape == (16, 3, 16, 32)
    for index, pixels in enumerate(pixels_of(batch)):
        wide, high = image[index, :, 16:32, 8:40].float(), image[index, :, 8:40, 16:32].float()
        variants = [turned(wide, t, f) for t in (0, 2) for f in (False, True)]
        variants += [turned(high, t, f) for t in (1, 3) for f in (False, True)]
        assert sum(torch.equal(pixels, variant) for variant in variants) == 1


def test_the_same_seed_gives_the_same_variant_and_another_seed_another():
    crops = make_crops(4, 96)
    framing = Framing((64, 64))
    one, same, other = (prepare(raw(*crops, seed), CPU, framing, NORMAL, Augmentation()) for seed in (7, 7, 8))
    assert torch.equal(one.image_BCHW, same.image_BCHW) and torch.equal(one.valid_BHW, same.valid_BHW)
    assert not torch.equal(one.image_BCHW, other.image_BCHW)


def test_what_lies_under_invalid_pixels_never_reaches_the_network():
    image, label, valid = make_crops(8, 96)
    valid[:, 20:50, 30:60] = 0
    junk = torch.where(valid[:, None] == 1, image, 255)
    for change in (Augmentation(degraded=1.0), None):
        clean, other = (
            prepare(raw(pixels, label, valid, 3), CPU, Framing((64, 64)), NORMAL, change) for pixels in (image, junk)
        )
        assert torch.equal(clean.image_BCHW, other.image_BCHW)
        hidden = ~clean.valid_BHW[:, None].expand_as(clean.image_BCHW)
        assert hidden.any() and torch.count_nonzero(clean.image_BCHW[hidden]) == 0
        assert not (clean.target_BKHW[:, 0].bool() & ~clean.valid_BHW).any()


def test_borders_and_holes_are_filled_in_about_the_share_of_crops_that_was_asked_for():
    image, label, valid = make_crops(400, 16)
    for part in ("borders", "holes"):
        settings = replace(PLAIN, **{part: 0.3})
        batch = augment(image, label, valid, (16, 16), settings, NORMAL, np.random.default_rng(0))
        filled = (~batch.valid_BHW).flatten(1).any(1).float().mean().item()
        assert 0.22 < filled < 0.38


def test_a_turned_and_shrunken_crop_finds_all_it_needs_within_the_margin():
    settings = Augmentation(scale=(0.7, 0.7), tilt=1.0, borders=0, holes=0)
    side = 32 + 2 * settings.margin_px(32)
    image, label, valid = make_crops(32, side)
    assert augment(image, label, valid, (32, 32), settings, NORMAL, np.random.default_rng(0)).valid_BHW.all()
    small = [tensor[..., 6:-6, 6:-6] for tensor in (image, label, valid)]
    assert not augment(*small, (32, 32), settings, NORMAL, np.random.default_rng(0)).valid_BHW.all()


@pytest.mark.parametrize("side", [48, 40, 33])
def test_without_augmentation_a_crop_is_its_centre_as_it_is(side):
    image, label, valid = make_crops(2, side)
    valid[0, :, :5] = 0
    batch = plain(image, label, valid, (40, 40), NORMAL)
    cut = (side - 40) // 2 if side > 40 else 0
    place = slice((40 - side) // 2, (40 - side) // 2 + side) if side < 40 else slice(0, 40)
    inside = (slice(None), slice(cut, cut + 40), slice(cut, cut + 40))
    assert torch.equal(batch.valid_BHW[:, place, place], valid[inside].bool())
    seen = torch.where(valid[:, None].bool(), image, 0)[:, :, cut : cut + 40, cut : cut + 40].float()
    shown = torch.where(batch.valid_BHW[:, None], pixels_of(batch), 0)[:, :, place, place]
    assert torch.equal(shown, seen)
    assert int(batch.valid_BHW.sum()) == int(valid[inside].sum())


def test_a_crop_off_the_stride_is_padded_with_fill_and_scored_on_its_own_pixels():
    image, label, valid = make_crops(2, 50)
    batch = prepare(raw(image, label, valid), CPU, Framing((50, 44), stride=32), NORMAL, None)
    assert batch.image_BCHW.shape == (2, 3, 64, 64) and batch.target_BKHW.shape == (2, 1, 64, 64)
    assert batch.valid_BHW[:, :50, :44].all() and int(batch.valid_BHW.sum()) == 2 * 50 * 44
    assert not batch.image_BCHW[:, :, 50:].any() and not batch.image_BCHW[:, :, :, 44:].any()
    assert torch.equal(batch.target_BKHW[:, 0, :50, :44], label[:, :, 3:47].float())


def test_a_network_that_answers_for_less_than_it_sees_gets_real_context_around_the_crop():
    # As unet-valid: 92 px of border, input 12 more than a multiple of 16.
    image, label, valid = make_crops(1, 300)
    framing = Framing((60, 60), border_px=92, stride=16, remainder_px=12)
    batch = prepare(raw(image, label, valid), CPU, framing, NORMAL, None)
    side = batch.image_BCHW.shape[-1]
    assert side % 16 == 12 and batch.target_BKHW.shape[-1] == side - 184 == 68
    assert torch.equal(pixels_of(batch)[0, :, :244, :244], image[0, :, 28:272, 28:272].float())
    assert torch.equal(batch.target_BKHW[0, 0, :60, :60], label[0, 120:180, 120:180].float())
    assert int(batch.valid_BHW.sum()) == 3600


def test_one_band_is_augmented_without_colour():
    image, label, valid = make_crops(2, 64)
    one = Normalisation(mean=(0.5,), std=(0.25,))
    batch = augment(image[:, :1], label, valid, (32, 32), Augmentation(), one, np.random.default_rng(0))
    assert batch.image_BCHW.shape == (2, 1, 32, 32) and batch.image_BCHW.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0.4, 1.0)},
        {"scale": (1.4, 0.7)},
        {"scale": (1.0, float("inf"))},
        {"gain": (0, 1.1)},
        {"gain": (1.2, 1.1)},
        {"contrast": (-0.1, 1)},
        {"saturation": (1.5, 0.5)},
        {"blur_sigma_px": (0, 0)},
        {"blur_sigma_px": (1.1, 0.4)},
        {"brightness": -0.1},
        {"noise": float("nan")},
        {"tilt": 1.5},
        {"degraded": -1},
        {"borders": 7},
        {"holes": -3},
    ],
)
def test_what_no_variant_could_be_made_with_is_refused_by_its_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"^{name} .*: expected"):
        Augmentation(**wrong)


@pytest.mark.parametrize("scale", [(1.6, 2.0), (1.42, 1.42)])
def test_a_crop_that_is_only_magnified_needs_no_margin_or_a_small_one(scale):
    settings = replace(PLAIN, scale=scale, tilt=1)
    margin = settings.margin_px(64)
    assert 0 <= margin <= 1
    image, label, valid = make_crops(8, 64 + 2 * margin)
    batch = augment(image, label, valid, (64, 64), settings, NORMAL, np.random.default_rng(0))
    assert batch.valid_BHW.all()
