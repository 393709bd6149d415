import math

import numpy as np
import pytest
import torch

from segpipe.models.losses import LOSSES, LossError, bce, bce_jaccard, dice, dice_bce, resolve_loss


def make_batch(seed=0, batch=3, side=16):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (batch, 1, side, side)))
    target = torch.from_numpy((rng.random((batch, 1, side, side)) < 0.3).astype(np.float64))
    valid = torch.from_numpy(rng.random((batch, side, side)) < 0.7)
    return logits, target, valid


def by_hand(logits, target, valid):
    """Probability and target of the valid pixels, and their mean cross entropy."""
    p, t = torch.sigmoid(logits)[:, 0][valid].numpy(), target[:, 0][valid].numpy()
    return p, t, -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()


def test_equation_4_of_ternausnet_is_mean_cross_entropy_minus_log_of_the_jaccard_index_of_the_batch():
    p, t, entropy = by_hand(*make_batch())
    jaccard = (t * p).sum() / (t.sum() + p.sum() - (t * p).sum())
    assert bce_jaccard(*make_batch()).item() == pytest.approx(entropy - math.log(jaccard), rel=1e-12)


def test_equation_2_of_ternausnet_as_printed_is_a_mean_over_pixels_bounded_by_the_share_of_buildings():
    p, t, entropy = by_hand(*make_batch())
    jaccard = np.mean([y * q / (y + q - y * q) for y, q in zip(t, p, strict=True)])
    loss = bce_jaccard(*make_batch(), jaccard="pixel").item()
    assert loss == pytest.approx(entropy - math.log(jaccard), rel=1e-12)
    _, target, valid = make_batch()
    perfect = bce_jaccard(80 * (2 * target - 1), target, valid, jaccard="pixel").item()
    assert perfect == pytest.approx(-math.log(t.mean()), rel=1e-9)


def test_other_losses_are_cross_entropy_and_the_soft_dice_index():
    p, t, entropy = by_hand(*make_batch())
    index = 2 * (t * p).sum() / (t.sum() + p.sum())
    assert bce(*make_batch()).item() == pytest.approx(entropy, rel=1e-12)
    assert dice(*make_batch()).item() == pytest.approx(-index, rel=1e-12)
    assert dice_bce(*make_batch()).item() == pytest.approx(entropy + 1 - index, rel=1e-12)


@pytest.mark.parametrize("loss", [*LOSSES.values(), resolve_loss("bce-jaccard", {"jaccard": "pixel"})])
def test_what_lies_under_invalid_pixels_changes_neither_loss_nor_gradient(loss):
    logits, target, valid = make_batch()
    results = []
    for junk in (0.0, 1e4, math.nan):
        x = torch.where(valid[:, None], logits, junk).requires_grad_()
        value = loss(x, torch.where(valid[:, None], target, junk), valid)
        value.backward()
        results.append((value.item(), x.grad))
    assert all(torch.equal(grad, results[0][1]) and value == results[0][0] for value, grad in results)
    assert torch.count_nonzero(results[0][1][~valid[:, None]]) == 0
    assert torch.count_nonzero(results[0][1]) == int(valid.sum())
    assert loss(logits, target, valid[:, None]) == loss(logits, target, valid)


@pytest.mark.parametrize("loss", [*LOSSES.values(), resolve_loss("bce-jaccard", {"jaccard": "pixel"})])
@pytest.mark.parametrize("case", ["no building", "no valid pixel", "sure and wrong", "sure and right"])
def test_loss_and_gradient_stay_finite_in_bfloat16_and_nothing_to_learn_from_teaches_nothing(loss, case):
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, :4] = 0 if case == "no building" else 1
    valid = torch.full((2, 8, 8), case != "no valid pixel")
    sign = -1 if case == "sure and wrong" else 1
    logits = (sign * 80 * (2 * target - 1)).to(torch.bfloat16).requires_grad_()
    value = loss(logits, target, valid)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite() and logits.grad.isfinite().all()
    if case == "no valid pixel":
        assert not logits.grad.any()
        assert value.item() == pytest.approx(-1 if loss is dice else 0, abs=1e-6)
    if case == "sure and right" and loss in (bce_jaccard, bce, dice_bce):
        assert value.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [bce_jaccard, bce, dice_bce])
def test_a_batch_without_buildings_still_teaches_that_there_are_none(loss):
    logits = torch.zeros(2, 1, 8, 8, requires_grad=True)
    loss(logits, torch.zeros(2, 1, 8, 8), torch.ones(2, 8, 8)).backward()
    assert (logits.grad > 0).all()


def own_loss(logits, target, valid, weight=1.0):
    return weight * (logits - target).square()[valid[:, None].bool()].mean()


def test_a_loss_is_found_by_name_with_its_arguments_or_in_a_module_of_the_user():
    logits, target, valid = make_batch()
    pixel = resolve_loss("bce-jaccard", {"jaccard": "pixel"})
    assert pixel(logits, target, valid) == bce_jaccard(logits, target, valid, jaccard="pixel")
    own = resolve_loss(f"{__name__}:own_loss", {"weight": 2.0})
    assert own(logits, target, valid) == 2 * own_loss(logits, target, valid)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("focal", {}, "no loss 'focal'; expected bce-jaccard, bce, dice, dice-bce, or package.module:name"),
        ("bce", {"weight": 2}, "loss bce with .*'weight'"),
        ("bce-jaccard", {"jaccard": "image"}, "jaccard is 'image'; expected batch or pixel"),
        ("not_there.at_all:loss", {}, "cannot be imported"),
        (":loss", {}, "cannot be imported"),
        (f"{__name__}:no_such_loss", {}, "has no function 'no_such_loss'"),
        (f"{__name__}:own_loss", {"gamma": 2}, "gamma"),
    ],
)
def test_a_loss_that_is_not_there_or_does_not_take_its_arguments_is_refused_in_one_line(name, args, message):
    with pytest.raises(LossError, match=message) as caught:
        resolve_loss(name, args)
    assert "\n" not in str(caught.value)
