import itertools

import numpy as np
import pytest
import torch

from segpipe.models.augment import Augmentation, Normalisation, augment
from segpipe.models.fit import FitSettings, fit, lecun_uniform
from segpipe.models.metrics import histogram
from segpipe.models.networks import build_network

PLAIN = Augmentation(
    scale=(1, 1), tilt=0, brightness=0, contrast=(1, 1), saturation=(1, 1), gain=(1, 1), degraded=0, borders=0, holes=0
)
NORMAL = Normalisation()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_crops(batch, side, seed=0):
    """Bright squares on dark ground: the label is where the image is bright."""
    rng = np.random.default_rng(seed)
    label = np.zeros((batch, side, side), np.uint8)
    for one in label:
        for row, col in rng.integers(0, side - 12, (6, 2)):
            one[row : row + 12, col : col + 12] = 1
    image = np.where(label[:, None] == 1, 200, 60) + rng.integers(-30, 30, (batch, 3, side, side))
    valid = np.ones_like(label)
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(label), torch.from_numpy(valid)


def batches(step):
    rng = np.random.default_rng((5, step))
    return augment(*make_crops(2, 96, seed=step), 64, Augmentation(), NORMAL, rng)


def validate(network):
    batch = augment(*make_crops(2, 64, seed=999), 64, PLAIN, NORMAL, np.random.default_rng(0))
    stored = torch.round(torch.sigmoid(network(batch.image_BCHW).float()) * 250).to(torch.uint8)
    return histogram(stored[:, 0], batch.target_BKHW[:, 0], batch.valid_BHW)


def make_network():
    torch.manual_seed(0)
    return build_network("unet-mobilenetv2")


def test_a_fit_learns_stops_and_goes_on_as_if_it_had_not_stopped(tmp_path):
    settings = FitSettings(steps=6, warmup_steps=1, decay_steps=3, ema_steps=3, validate_every=3, checkpoint_every=2)

    def stops(step):
        if step == 5:
            raise KeyboardInterrupt
        return batches(step)

    whole = fit(make_network(), batches, validate, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(make_network(), stops, validate, settings, tmp_path / "cut")
    asked = []
    cut = fit(make_network(), lambda step: asked.append(step) or batches(step), validate, settings, tmp_path / "cut")
    assert asked == [4, 5]
    assert [(r.step, r.iou, r.threshold) for r in cut.records] == [(r.step, r.iou, r.threshold) for r in whole.records]
    state, again = whole.network.state_dict(), cut.network.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert whole.records[-1].loss < whole.records[0].loss
    assert not whole.network.training


def test_the_best_weights_by_validation_are_given_not_the_last(tmp_path):
    seen, ious = [], iter((0.2, 0.9, 0.1))

    def scripted(network):
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        true, false, share = torch.zeros(251, dtype=torch.int64), torch.zeros(251, dtype=torch.int64), next(ious)
        true[250], true[0] = round(1000 * share), 1000 - round(1000 * share)
        return type(validate(network))(true, false)

    settings = FitSettings(steps=3, warmup_steps=0, validate_every=1, ema_steps=2)
    fitted = fit(make_network(), batches, scripted, settings, tmp_path)
    assert [r.iou for r in fitted.records] == [0.2, 0.9, 0.1]
    state = fitted.network.state_dict()
    assert all(torch.equal(state[name], seen[1][name]) for name in state)
    assert not torch.equal(state["head.weight"], seen[2]["head.weight"])


@pytest.mark.parametrize("freeze", [False, True])
def test_encoder_statistics_never_change_and_a_frozen_encoder_not_at_all(tmp_path, freeze):
    network = make_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    settings = FitSettings(steps=2, warmup_steps=0, validate_every=2, freeze_encoder=freeze)
    fit(network, batches, validate, settings, tmp_path)
    after = network.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    encoder = {name for name in before if name.startswith("features.")}
    statistics = {name for name in encoder if "running" in name}
    assert statistics <= same
    assert (encoder <= same) if freeze else not ((encoder - statistics) & {n for n in same if n.endswith("weight")})
    assert not torch.equal(before["decoder.0.up.weight"], after["decoder.0.up.weight"])


def test_learning_rate_rises_stays_and_falls_to_nothing():
    settings = FitSettings(steps=100, warmup_steps=10, decay_steps=40)
    rates = [settings.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:60] == pytest.approx([1.0] * 51)
    assert rates[80] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    network = make_network()
    torch.nn.init.constant_(network.head.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(network, batches, validate, FitSettings(steps=2, warmup_steps=0), tmp_path)


def test_without_any_change_a_variant_is_a_turned_or_mirrored_crop():
    image, label, valid = make_crops(16, 40)
    batch = augment(image, label, valid, 24, PLAIN, NORMAL, np.random.default_rng(0))
    mean, std = torch.tensor(NORMAL.mean).view(3, 1, 1), torch.tensor(NORMAL.std).view(3, 1, 1)
    kinds = set()
    for index in range(16):
        pixels = torch.round((batch.image_BCHW[index] * std + mean) * 255)
        inner, marked = image[index, :, 8:32, 8:32].float(), label[index, 8:32, 8:32]
        variants = [
            (turn, flip)
            for turn in range(4)
            for flip in (False, True)
            if torch.equal(pixels, _turned(inner, turn, flip))
        ]
        assert len(variants) == 1
        assert torch.equal(batch.target_BKHW[index, 0], _turned(marked, *variants[0]).float())
        kinds.add(variants[0])
    assert len(kinds) > 4


def _turned(pixels, turn, flip):
    turned = torch.rot90(pixels, turn, (-2, -1))
    return turned.flip(-1) if flip else turned


def test_what_lies_under_invalid_pixels_never_reaches_the_network():
    image, label, valid = make_crops(8, 96)
    valid[:, 20:50, 30:60] = 0
    junk = torch.where(valid[:, None] == 1, image, 255)
    clean, other = (
        augment(pixels, label, valid, 64, Augmentation(degraded=1.0), NORMAL, np.random.default_rng(3))
        for pixels in (image, junk)
    )
    assert torch.equal(clean.image_BCHW, other.image_BCHW)
    hidden = ~clean.valid_BHW[:, None].expand_as(clean.image_BCHW)
    assert hidden.any() and torch.count_nonzero(clean.image_BCHW[hidden]) == 0
    assert not (clean.target_BKHW[:, 0].bool() & ~clean.valid_BHW).any()


def test_borders_and_holes_are_filled_in_about_the_share_of_crops_that_was_asked_for():
    image, label, valid = make_crops(400, 16)
    settings = Augmentation(scale=(1, 1), tilt=0, borders=0.3, holes=0)
    batch = augment(image, label, valid, 16, settings, NORMAL, np.random.default_rng(0))
    filled = (~batch.valid_BHW).flatten(1).any(1).float().mean().item()
    assert 0.22 < filled < 0.38


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (torch.nn.Conv2d(64, 64, 3, padding=1), 32),
        (torch.nn.ConvTranspose2d(64, 64, 3, 2, 1, 1), 32),
        (torch.nn.ConvTranspose2d(64, 64, 2, 2), 32),
    ],
)
def test_lecun_initialisation_keeps_the_variance_of_what_goes_through_a_layer(layer, side):
    torch.manual_seed(0)
    lecun_uniform(layer)
    with torch.no_grad():
        inside = layer(torch.randn(4, 64, side, side))[:, :, 4:-4, 4:-4]
    assert inside.var().item() == pytest.approx(1, abs=0.08)
    assert not layer.bias.any()
