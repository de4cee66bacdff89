"""Tuning as a stage of `quantize`: what has to be computed before the model is changed, and the stage itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from spinquant.calibration.block_store import BlockStore
from spinquant.calibration.data import CalibrationText
from spinquant.entrypoints.result import Options
from spinquant.learning.tuning import Predictions, Tuned, TuneOptions, predictions, split_held_out, tune
from spinquant.models.modules import in_eval_mode
from spinquant.plan import Plan
from spinquant.quantization.scheme import Clips, Scheme
from spinquant.rotations.rotation import Rotation


@dataclass(frozen=True)
class Tuning:
    """A tuning whose 16-bit predictions are there.

    Attributes:
        trained: What the 16-bit model predicts on the samples to tune on.
        held_out: What it predicts on the windows that decide.
        tune: Options of tuning.
        options: For progress.
    """

    trained: Predictions
    held_out: Predictions
    tune: TuneOptions
    options: Options

    def run(
        self,
        model: Any,
        plan: Plan,
        online: Mapping[str, Rotation],
        scheme: Scheme,
        clips: Clips,
        *,
        format: str,
        store: BlockStore | None,
    ) -> Tuned:
        """Tune the model, rotated and quantized, with nothing attached. Runtimes of other formats have no clips."""
        with in_eval_mode(model):
            return tune(
                model,
                plan,
                online,
                scheme,
                clips,
                self.trained,
                self.held_out,
                self.tune,
                tune_clips=format == "native",
                pieces=None if store is None else store.pieces,
                progress=self.options.stage("tune"),
            )


def with_held_out(text: CalibrationText, tune: TuneOptions | None) -> CalibrationText:
    """The calibration text with as many samples more as tuning holds out, and the one between."""
    return text if tune is None else replace(text, samples=text.samples + tune.windows + 1)


def before_tuning(model: Any, tokens: Tensor, tune: TuneOptions, options: Options) -> tuple[Tensor, Tuning]:
    """The tokens to calibrate on, and the tuning with the predictions of the model, which is not changed yet."""
    calibrated, held_out = split_held_out(tokens, tune)
    used = calibrated[: tune.steps * tune.batch]  # no step sees more
    total, first = len(used) + len(held_out), len(used)
    report = options.stage("predict at 16 bits")
    with in_eval_mode(model):
        trained = predictions(model, used, tune, progress=lambda done, _: report(done, total))
        decides = predictions(model, held_out, tune, progress=lambda done, _: report(first + done, total))
    return calibrated, Tuning(trained, decides, tune, options)
