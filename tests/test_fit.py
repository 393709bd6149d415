import csv
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import get_worker_info

from segpipe.models.augment import Batch
from segpipe.models.fit import FitError, FitSettings, first_process, fit
from segpipe.models.losses import bce_jaccard
from segpipe.models.metrics import Scores, score
from segpipe.models.networks import Network

SIDE = 16


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tiny(Network):
    """An encoder with batch statistics, and a decoder that draws."""

    stride = 2
    encoder_prefix = "encoder."

    def __init__(self, dropout=0.2):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.decoder = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.ConvTranspose2d(4, 1, 2, 2)

    def forward(self, image_BCHW):
        return self.head(self.decoder(self.encoder(image_BCHW)))


def make_network(**arguments):
    torch.manual_seed(0)
    return Tiny(**arguments)


@dataclass(frozen=True)
class Squares:
    """Batches of bright squares on dark ground, and what happens to the process that is asked for one of them.

    parts: of how many batches, one below the other, each is made.
    """

    batch: int = 2
    parts: int = 1
    killed_at: int = -1
    stopped_at: int = -1
    broken_at: int = -1
    loader_killed_at: int = -1

    def __getitem__(self, index):
        if index == self.killed_at or (index == self.loader_killed_at and get_worker_info() is not None):
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.stopped_at:
            raise KeyboardInterrupt
        if index == self.broken_at:
            raise OSError(f"chunk {index} is damaged")
        drawn = [draw(self.batch, index * self.parts + part) for part in range(self.parts)]
        image, label, valid = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
        return {"image_BCHW": image, "label_BHW": label, "valid_BHW": valid, "seed": index}


def draw(batch, seed):
    rng = np.random.default_rng(seed)
    label = np.zeros((batch, SIDE, SIDE), np.uint8)
    for one in label:
        row, col = rng.integers(0, SIDE - 6, 2)
        one[row : row + 6, col : col + 6] = 1
    image = np.where(label[:, None] == 1, 200, 60) + rng.integers(-30, 30, (batch, 3, SIDE, SIDE))
    valid = (rng.random(label.shape) < 0.9).astype(np.uint8)
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(label), torch.from_numpy(valid)


def prepare(raw, device):
    image = raw["image_BCHW"].to(device) / 255 - 0.5
    return Batch(image, raw["label_BHW"][:, None].float(), raw["valid_BHW"].bool())


def prepare_with_a_number_that_is_none(raw, device):
    batch = prepare(raw, device)
    if raw["seed"] == 5:
        batch.image_BCHW[0, 0, 0, 0] = math.nan
    return batch


def validate(network):
    batch = prepare(Squares(batch=4)[999_999], torch.device("cpu"))
    logits = network(batch.image_BCHW.to(next(network.parameters()).dtype))
    loss = bce_jaccard(logits, batch.target_BKHW, batch.valid_BHW)
    return score(torch.sigmoid(logits), batch.target_BKHW, batch.valid_BHW, loss)


SETTINGS = FitSettings(
    epochs=3, steps_per_epoch=4, learning_rate=0.01, average="ema", schedule="cosine", log_every=2, checkpoint_s=0
)


def run(
    folder, crops=None, settings=SETTINGS, network=None, prepare=prepare, validate=validate, loss=bce_jaccard, **more
):
    network = make_network() if network is None else network
    return fit(network, loss, crops or Squares(), prepare, validate, settings, folder, **more)


def run_elsewhere(folder, crops, settings):
    """As a process of its own runs it: to be killed."""
    torch.set_num_threads(1)
    run(folder, crops, settings)


def checkpoint(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def assert_same_end(one, other, folder, other_folder):
    """All weights, all records but for how long they took, the curve of the loss, and the log."""
    for name in ("last.ckpt", "best.ckpt"):
        key = "state_dict" if name == "last.ckpt" else "network"
        ours, theirs = checkpoint(folder, name)[key], checkpoint(other_folder, name)[key]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert one.losses == other.losses
    timeless = [[replace(r, train_seconds=0, validation_seconds=0) for r in fitted.records] for fitted in (one, other)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True))
    rows = [list(csv.DictReader((place / "logs" / "metrics.csv").open())) for place in (folder, other_folder)]
    assert rows[0] == rows[1]


def test_a_fit_that_is_killed_again_and_again_ends_as_one_that_was_not_bit_for_bit(tmp_path):
    settings = replace(SETTINGS, accumulate=2)
    whole = run(tmp_path / "whole", settings=settings)
    context = multiprocessing.get_context("fork")  # as quick as it is safe with one thread
    # Batches 2 s and 2 s + 1 make step s, one is read ahead, and a checkpoint is written every other step.
    for killed_at, left_at in ((7, 2), (9, 4), (20, 8)):
        process = context.Process(target=run_elsewhere, args=(tmp_path / "cut", Squares(killed_at=killed_at), settings))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert checkpoint(tmp_path / "cut")["global_step"] == left_at
    cut = run(tmp_path / "cut", settings=settings)
    assert_same_end(whole, cut, tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("stopped_at", [0, 1, 4, 5, 11])
def test_a_fit_that_is_stopped_at_any_step_goes_on_as_if_it_had_not_been(tmp_path, stopped_at):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Squares(stopped_at=stopped_at))
    assert signal.getsignal(signal.SIGINT) == handler
    reported = []
    cut = run(tmp_path / "cut", report=reported.append)
    done = max(stopped_at - 1, 0) // 2 * 2  # one batch is read ahead
    assert [r.epoch for r in reported] == [epoch for epoch in (1, 2, 3) if epoch * 4 > done]
    assert_same_end(run(tmp_path / "whole"), cut, tmp_path / "whole", tmp_path / "cut")


def test_a_fit_that_is_done_is_not_done_again(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, Squares(broken_at=0))
    assert again.records == first.records and again.best == first.best
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True))


def test_a_fit_learns_and_is_logged_for_tables_and_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(SETTINGS, epochs=5, steps_per_epoch=20, learning_rate=0.02, schedule="one-cycle")
    fitted = run(tmp_path, settings=settings, network=make_network(dropout=0.0))
    assert fitted.best.validation.iou > 0.7 > fitted.records[0].validation.iou
    assert fitted.records[-1].train.loss < fitted.records[0].train.loss
    assert not fitted.network.training
    assert [step for step, _ in fitted.losses] == list(range(2, 101, 2))
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = [(int(row["step"]), float(row["train/loss"])) for row in rows if row["train/loss"]]
    assert table == list(fitted.losses)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("validation/iou")]
    assert curve == [(r.step, pytest.approx(r.validation.iou, rel=1e-6)) for r in fitted.records]


def test_two_processes_give_the_gradients_of_one_with_the_batches_of_both(tmp_path):
    settings = FitSettings(
        epochs=1,
        steps_per_epoch=2,
        optimiser="sgd",
        learning_rate=0.1,
        precision="float64",
        devices=2,
        frozen_statistics=True,
    )
    reported = []
    run(tmp_path / "two", Squares(), settings, frozen_network(), report=reported.append)
    run(tmp_path / "one", Squares(parts=2), replace(settings, devices=1), frozen_network())
    two, one = (checkpoint(tmp_path / name)["state_dict"] for name in ("two", "one"))
    before = frozen_network().double().state_dict()
    for name in before:
        torch.testing.assert_close(two[f"network.{name}"], one[f"network.{name}"], rtol=1e-12, atol=1e-14)
    assert not torch.equal(one["network.head.weight"], before["head.weight"])
    assert [r.epoch for r in reported] == [1]
    # Both saw all pixels of both, though each process counted its own.
    ours, theirs = (checkpoint(tmp_path / name)["segpipe"]["records"][0]["train"] for name in ("two", "one"))
    assert [ours[key] for key in ("iou", "dice", "accuracy")] == [theirs[key] for key in ("iou", "dice", "accuracy")]


def frozen_network():
    """Without dropout, and whose only batch statistics are in the encoder."""
    network = make_network(dropout=0.0)
    network.decoder[2] = nn.Identity()
    return network


def test_a_loss_that_is_no_number_stops_at_its_batch_and_leaves_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FitError, match=r"loss is nan at step 6, batch 5; .*`output:`.* go on from step 4") as caught:
        run(tmp_path, prepare=prepare_with_a_number_that_is_none)
    assert caught.value.batch == 5
    kept = checkpoint(tmp_path)
    assert kept["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(tmp_path):
    def steep(logits, target, valid):
        return (logits * 0).clamp(min=0).sqrt().mean()

    with pytest.raises(FitError, match=r"the gradient is (nan|inf) at step 1, batch 0; .* no checkpoint"):
        run(tmp_path, loss=steep)


def test_a_loader_that_dies_is_told_in_one_line_and_the_fit_goes_on_afterwards(tmp_path):
    settings = replace(SETTINGS, epochs=2, loaders=1)
    with pytest.raises(
        FitError, match=r"a process that reads crops has died.*fewer loaders.*, or, in another `output:`"
    ) as caught:
        run(tmp_path / "cut", Squares(loader_killed_at=6), settings)
    assert "\n" not in str(caught.value)
    settings = replace(settings, loaders=0)
    cut, whole = (run(tmp_path / name, settings=settings) for name in ("cut", "whole"))
    assert_same_end(whole, cut, tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_loader_that_dies_while_it_hands_over_a_crop_is_told_and_none_is_left(tmp_path, monkeypatch, error):
    def hung_up(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", hung_up)
    with pytest.raises(FitError, match=r"has died: loader hung up: .*(reset|EOFError).*fewer loaders") as caught:
        run(tmp_path, Squares(), replace(SETTINGS, loaders=1))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_a_loader_that_dies_while_something_is_logged_is_told_in_one_line(tmp_path, monkeypatch):
    def in_vain(*arguments: object, **options: object) -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nSee above.")
        except RuntimeError as error:
            raise ValueError("you tried to log 1.0") from error

    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger.log_metrics", in_vain)
    with pytest.raises(FitError, match=r"has died: loader \(pid 7\) is killed by signal: Killed; cure") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)


def test_crops_that_cannot_be_read_are_told_in_one_line(tmp_path):
    with pytest.raises(FitError, match=r"batch 5 of crops cannot be read: OSError: chunk 5 is damaged; run again"):
        run(tmp_path, Squares(broken_at=5))


def test_a_checkpoint_of_another_network_is_refused_with_the_first_differences(tmp_path):
    run(tmp_path, settings=replace(SETTINGS, epochs=1))
    other = make_network()
    other.head, other.extra = nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(1, 1, 1)
    message = r"of another network than Tiny: 4 tensors differ \(extra.bias is missing; .*; head.bias is \(1,\)"
    with pytest.raises(FitError, match=message):
        run(tmp_path, network=other)
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"half")
    with pytest.raises(FitError, match=r"last\.ckpt: no checkpoint that can be read"):
        run(tmp_path)


@pytest.mark.parametrize("freeze", [False, True])
def test_encoder_statistics_never_change_and_a_frozen_encoder_not_at_all(tmp_path, freeze):
    network = make_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    settings = replace(SETTINGS, epochs=1, average="none", frozen_statistics=not freeze, freeze_encoder=freeze)
    after = run(tmp_path, settings=settings, network=network).network.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    encoder = {name for name in before if name.startswith("encoder.")}
    statistics = {name for name in before if "running" in name or "tracked" in name}
    assert encoder & statistics <= same
    assert encoder <= same if freeze else encoder & same <= statistics
    assert not same - encoder
    assert all(parameter.requires_grad is False for parameter in network.parameters())


def test_a_network_without_an_encoder_cannot_have_it_frozen(tmp_path):
    network = make_network()
    network.encoder_prefix = "backbone."
    with pytest.raises(FitError, match="has no encoder"):
        run(tmp_path, settings=replace(SETTINGS, freeze_encoder=True), network=network)


def seen_weights(folder, average, **settings):
    """What validation was shown after every step."""
    shown = []

    def remember(network):
        shown.append(torch.cat([t.flatten().double() for t in network.state_dict().values()]))
        return validate(network)

    changes = {"epochs": 8, "steps_per_epoch": 1, "average": average} | settings
    run(folder, settings=replace(SETTINGS, **changes), validate=remember)
    return torch.stack(shown)


def test_averaged_weights_and_statistics_are_the_mean_or_the_moving_average_of_the_steps(tmp_path):
    kinds = ("none", "swa", "ema")
    plain, swa, ema = (seen_weights(tmp_path / kind, kind, ema_steps=4, swa_start=0.5) for kind in kinds)
    state = list(make_network().state_dict().values())
    whole = torch.cat([torch.full((t.numel(),), not t.is_floating_point()) for t in state])
    assert torch.equal(swa[:5], plain[:5])
    for step in (5, 6, 7):
        torch.testing.assert_close(swa[step][~whole], plain[4 : step + 1].mean(0)[~whole], rtol=1e-5, atol=1e-6)
    expected = torch.cat([t.flatten().double() for t in state])
    for step, new in enumerate(plain):
        keep = min(3 / 4, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * new
        torch.testing.assert_close(ema[step][~whole], expected[~whole], rtol=1e-5, atol=1e-6)
    assert torch.equal(ema[:, whole], plain[:, whole])


def scripted(values):
    """A validation with these IoU, one after another; the higher it is, the lower are soft Dice and loss."""
    left = iter(values)

    def validate(network):
        share = next(left)
        hits = round(1000 * share)
        scores = Scores.empty()
        scores.histogram.positive[250] = hits
        scores.histogram.positive[0] = 1000 - hits
        scores.sums.copy_(torch.tensor([1 - share, 0, 0, 1 - share, 0, 1]))
        return scores

    return validate


@pytest.mark.parametrize(
    ("best_by", "values", "best", "epochs"),
    [
        ("iou", (0.1, 0.3, 0.2, 0.9, 0.8, 0.7, 0.6), 4, 6),
        ("dice", (0.1, 0.3, 0.3, 0.2, 0.1, 0.9), 3, 5),
        ("soft_dice", (0.8, 0.4, 0.5, 0.6, 0.1), 2, 4),
        ("loss", (0.2, 0.4, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9), 8, 8),
    ],
)
def test_the_best_epoch_is_kept_and_patience_ends_a_fit_that_gets_no_better(tmp_path, best_by, values, best, epochs):
    settings = replace(SETTINGS, epochs=8, steps_per_epoch=1, best_by=best_by, patience=2)
    shown, script = [], scripted(values)

    def remember(network):
        shown.append(network.head.weight.clone())
        return script(network)

    fitted = run(tmp_path, settings=settings, validate=remember)
    assert [r.epoch for r in fitted.records] == list(range(1, epochs + 1))
    assert fitted.best.epoch == best
    assert torch.equal(fitted.network.head.weight, shown[best - 1])
    assert len(run(tmp_path, settings=settings, validate=remember).records) == epochs


def test_schedules_are_those_of_torch_after_a_linear_rise():
    def torch_rates(make, steps):
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = make(optimiser)
        rates = []
        for _ in range(steps):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        return rates

    cycle = FitSettings(epochs=4, steps_per_epoch=25, schedule="one-cycle")
    oracle = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=100, cycle_momentum=False), 99
    )
    assert [cycle.rate(step) for step in range(99)] == pytest.approx(oracle, abs=1e-9)
    cosine = FitSettings(epochs=4, steps_per_epoch=25, schedule="cosine", warmup_steps=10)
    oracle = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=90), 90)
    assert [cosine.rate(step) for step in range(10)] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert [cosine.rate(step) for step in range(10, 100)] == pytest.approx(oracle)
    assert {FitSettings(epochs=1, steps_per_epoch=9).rate(step) for step in range(9)} == {1.0}
    short = [FitSettings(epochs=1, steps_per_epoch=n, schedule="one-cycle") for n in (1, 2, 3, 4, 10)]
    assert all(0 < settings.rate(step) <= 1 for settings in short for step in range(settings.steps))


def test_learning_rates_follow_the_schedule_with_one_of_its_own_for_the_encoder(tmp_path):
    from segpipe.models.loop import make_optimiser

    settings = replace(SETTINGS, optimiser="adamw", encoder_learning_rate=1e-4, weight_decay=0.1)
    groups = make_optimiser(make_network(), settings).param_groups
    found = {(group["lr"], group["weight_decay"]): [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found == {
        (1e-4, 0.1): [(6, 3, 3, 3)],
        (1e-4, 0.0): [(6,), (6,), (6,)],
        (0.01, 0.1): [(4, 6, 3, 3), (4, 1, 2, 2)],
        (0.01, 0.0): [(4,), (4,), (4,), (1,)],
    }
    fitted = run(tmp_path, settings=replace(settings, schedule="cosine"))
    assert [r.learning_rate for r in fitted.records] == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * (4 * epoch - 1) / 12)) / 2 for epoch in (1, 2, 3)]
    )


def test_optimisers_with_the_settings_of_the_papers_move_a_weight_as_their_formulas_say():
    from segpipe.models.loop import make_optimiser

    gradients = (0.5, -2.0, 0.25)

    def moved(**settings):
        network = make_network()
        optimiser = make_optimiser(network, replace(SETTINGS, learning_rate=0.1, **settings))
        weight, places = network.head.bias, []
        start = weight.item()
        for gradient in gradients:
            weight.grad = torch.full_like(weight, gradient)
            optimiser.step()
            places.append(weight.item() - start)
        return places

    place, square, expected = 0.0, 0.0, []
    for gradient in gradients:
        square = 0.9 * square + 0.1 * gradient**2
        place -= 0.1 * gradient / (math.sqrt(square) + 1e-7)
        expected.append(place)
    assert moved(optimiser="rmsprop", alpha=0.9, eps=1e-7) == pytest.approx(expected, rel=1e-5)
    place, speed, expected = 0.0, 0.0, []
    for gradient in gradients:
        speed = 0.99 * speed + gradient
        place -= 0.1 * speed
        expected.append(place)
    assert moved(optimiser="sgd", momentum=0.99) == pytest.approx(expected, rel=1e-5)
    assert moved(optimiser="adam")[0] == pytest.approx(-0.1, rel=1e-5)


def test_gradients_are_clipped_to_one_length_and_accumulated_as_a_mean(tmp_path):
    def step(name, **changes):
        settings = FitSettings(epochs=1, steps_per_epoch=1, optimiser="sgd", learning_rate=1.0, **changes)
        network = frozen_network().requires_grad_(requires_grad=True)
        start = torch.cat([p.detach().clone().flatten() for p in network.parameters()])
        settings = replace(settings, frozen_statistics=True)
        fitted = run(tmp_path / name, settings=settings, network=network)
        return start - torch.cat([p.flatten() for p in fitted.network.parameters()])

    whole = step("whole")
    assert whole.norm() > 0.2
    clipped = step("clipped", clip_norm=0.1)
    assert clipped.norm().item() == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), whole / whole.norm(), rtol=1e-3, atol=1e-5)
    both = step("both", accumulate=2)
    second = []
    for index in (0, 1):
        network = frozen_network().eval()
        batch = prepare(Squares()[index], torch.device("cpu"))
        bce_jaccard(network(batch.image_BCHW), batch.target_BKHW, batch.valid_BHW).backward()
        second.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(both, (second[0] + second[1]) / 2, rtol=1e-4, atol=1e-5)


def test_settings_that_make_no_sense_are_refused():
    wrongs = {
        "epochs": 0,
        "warmup_steps": 12,
        "patience": 0,
        "swa_start": 1.0,
        "optimiser": "lamb",
        "precision": "int8",
    }
    for wrong in ({key: value} for key, value in wrongs.items()):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(SETTINGS, **wrong)


def test_several_nodes_are_not_started_from_one(tmp_path):
    with pytest.raises(FitError, match="torchrun --nnodes 2 --nproc-per-node 1"):
        run(tmp_path, settings=replace(SETTINGS, nodes=2))


def test_a_fit_alone_in_a_batch_job_of_many_takes_no_notice_of_the_others(tmp_path, monkeypatch):
    for name, value in {
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert first_process()
    assert len(run(tmp_path, settings=replace(SETTINGS, epochs=1)).records) == 1


def test_nothing_but_training_imports_lightning():
    code = (
        "import sys; import segpipe.models.fit, segpipe.models.predictor, segpipe.pipeline.run, segpipe.pipeline.train;"
        " print([name for name in ('lightning', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
