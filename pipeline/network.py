"""The network of a plan in one worker process: loaded once, one pass at a time, and what its device waits for."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from segpipe.tasks.errors import RunError, TooLargeError, WorkerError
from segpipe.tasks.grid import Window
from segpipe.tasks.predict import predict_core, reach

from .plan import Plan, model_file

if TYPE_CHECKING:
    from torch import Tensor

    from segpipe.models.predictor import Predictor, Uploaded
    from segpipe.models.strips import Core

WAITS = {"read": "for a block's chunks", "write": "for the last block to be stored", "block": "for a block to predict"}
"""What a device waits for, in words. The last: tiles are still being decoded, or the scheduler has sent nothing."""


@dataclass(frozen=True)
class Passed:
    """A core's probabilities, prob_HW; pixels of the windows that the network saw; seconds: `network`, and of WAITS."""

    prob_HW: NDArray[np.uint8]
    seen_px: int
    seconds: dict[str, float]


class LoadedNetwork:
    """The network of a plan on this process's device, loaded when it is first needed.

    One thread of its own runs it: each that did would keep a heap of activations, and a pool of OpenMP threads. The
    tasks around it read the next block and write the last one meanwhile, in other threads.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._predictor: Predictor | None = None
        self._thread = ThreadPoolExecutor(1, "network")
        self._too_large_px = math.inf
        self._free: float | None = None
        self._written = 0.0

    @property
    def predictor(self) -> Predictor:
        """What runs it. RunError if this process cannot honour the recipe."""
        with self._lock:
            if self._predictor is None:
                self._predictor = self._thread.submit(load_predictor, self._plan).result()
            return self._predictor

    def predict_core(
        self, image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], core: Window, begun: float
    ) -> Passed:
        """Predict a core from its reach, as tasks.predict does. begun: when the task began, by time.perf_counter.

        A window that the GPU has no memory for goes through it in halves, and so do all as large from then on; RunError
        where that would change what comes out, since the halo is not the exact one.
        """
        recipe, card = self._plan.recipe, self._plan.card
        seconds = dict.fromkeys(("network", *WAITS), 0.0)
        refused: list[int] = []

        def predict(image_CHW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], asked: Core) -> NDArray[np.uint8]:
            try:
                return self._predict(image_CHW, valid_HW, asked, begun, seconds)
            except TooLargeError as error:
                if not card.is_exact(recipe.halo_px):
                    raise RunError(str(error)) from None
                refused.append(error.pixels)
                raise

        _ = self.predictor  # loaded before the device's time begins
        prob_HW, seen_px = predict_core(image_CHW, valid_HW, core, recipe.halo_px, card.stride, predict)
        self._too_large_px = min([self._too_large_px, *refused])
        return Passed(prob_HW, seen_px, seconds)

    def written(self) -> None:
        """To be told when what a pass gave is stored."""
        self._written = time.perf_counter()

    def _predict(
        self,
        image_CHW: NDArray[np.uint8],
        valid_HW: NDArray[np.bool_],
        asked: Core,
        begun: float,
        seconds: dict[str, float],
    ) -> NDArray[np.uint8]:
        """Probabilities of a part of a window, prob_HW; TooLargeError where the GPU has no memory for it."""
        if valid_HW.size >= self._too_large_px:
            raise TooLargeError(valid_HW.size, "no less than one that did not fit")
        try:
            window = self.predictor.upload(image_CHW, valid_HW, asked)
            return self.predictor.download(self._thread.submit(self._pass, window, begun, seconds).result())
        except RuntimeError as error:
            # torch's own kind, told apart by its name: where another predictor is at work, torch is not there.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            told = str(error)
        # Only now: the error holds all that the pass had on the GPU, where a part is to have room.
        raise TooLargeError(valid_HW.size, told)

    def _pass(self, window: Uploaded, begun: float, seconds: dict[str, float]) -> Tensor:
        """One pass; its seconds, and those since the one before, are added."""
        start = time.perf_counter()
        if self._free is not None:
            had_task = max(self._free, min(begun, start))
            writing = max(0.0, min(self._written, had_task) - self._free)
            waited = {"read": start - had_task, "write": writing, "block": had_task - self._free - writing}
            for what, duration in waited.items():
                seconds[what] += duration
        try:
            return self.predictor.run(window)
        finally:
            self._free = time.perf_counter()
            seconds["network"] += self._free - start


def load_predictor(plan: Plan) -> Predictor:
    """The network of a plan on this process's device. WorkerError if it cannot honour the recipe."""
    from segpipe.models.predictor import Predictor, device_recipe, resolve_device
    from segpipe.models.weights import file_digest, load_bundle

    device = resolve_device()
    kind = device_recipe(device)
    if (kind["device"], kind["torch"]) != (plan.recipe.device, plan.recipe.torch):
        raise WorkerError(
            f"a worker has {kind['device']} and torch {kind['torch']}; expected {plan.recipe.device} and torch"
            f" {plan.recipe.torch}, which the plan has settled"
        )
    model = model_file(plan)
    if file_digest(model) != plan.model_digest:
        raise RunError(f"{plan.model_url or model}: changed since the run began; expected the weights of the plan")
    # The plan has checked that the YAML names the card's own module, if it has one.
    bundle = load_bundle(model, allowed_module=plan.card.module)
    recipe, block = plan.recipe, Window.cell(0, 0, plan.block_px)
    largest_px = reach(block, recipe.halo_px, plan.card.stride).pixels
    return Predictor(bundle, device, recipe.precision, recipe.threads, recipe.tta, largest_px)
