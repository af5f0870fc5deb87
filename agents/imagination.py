"""Pictures in TensorBoard of what an agent imagines while it learns."""

from __future__ import annotations

from dataclasses import replace

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, TensorBoardOutputFormat

from worldflux.agents.agent import WorldFluxAgent
from worldflux.agents.learning import normalized
from worldflux.diagnostics.calibration import check_finite
from worldflux.diagnostics.open_loop import OpenLoop, open_loop
from worldflux.diagnostics.plots import figures, picture_name
from worldflux.diagnostics.plots.frames import FPS, as_animated_png, film, image_keys, longest_windows
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.replay.batch import Batch
from worldflux.replay.views import newest_rows
from worldflux.validation import whole_number

WINDOWS, IMAGE_WINDOWS = 64, 16
"""Default numbers of windows; windows of images take much memory."""
TAG = "imagination"
"""Prefix of the names of all pictures."""


class ImaginationCallback(BaseCallback):
    """Draws what the model predicts for episodes that were just recorded, at an interval, for TensorBoard.

        agent = WorldFluxAgent("dreamerv3:size12m", env, tensorboard_log="logs")
        agent.learn(1_000_000, ImaginationCallback(10_000))

    Under `imagination/` it shows the pictures of `worldflux imagine`: time series of vectors, a strip and a film of
    each image, errors over the horizon, and the calibration of rewards and terminations. The windows come from the
    steps since the last pictures, which the model has seldom been trained on.

    Training is the same with this callback and without it: it has random numbers of its own, and leaves the model, its
    mode and the other entries of the log alone. Without a TensorBoard output it does nothing. Films are animated PNGs,
    which need OpenCV 4.11.

    Args:
        interval: Environment steps between two sets of pictures, over all environments.
        context: Rows of each window that the model sees.
        horizon: Rows after them that it predicts.
        windows: Windows that the errors are measured on; None takes 64, or 16 of images.
        shown: Windows that are drawn: those in which most can be seen.
        seed: Seed of the choice of windows.
        verbose: 1 prints when pictures are drawn.

    Raises:
        ConfigurationError: If a number is below 1, or the callback is given to another algorithm of SB3.
    """

    model: WorldFluxAgent

    def __init__(
        self,
        interval: int = 10_000,
        *,
        context: int = 5,
        horizon: int = 45,
        windows: int | None = None,
        shown: int = 4,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.interval = whole_number("interval", interval, 1)
        self.context = whole_number("context", context, 1)
        self.horizon = whole_number("horizon", horizon, 1)
        self.windows = None if windows is None else whole_number("windows", windows, 1)
        self.shown = whole_number("shown", shown, 1)
        self.seed = whole_number("seed", seed, 0)
        self._drawn_at = 0

    def _init_callback(self) -> None:
        if not isinstance(self.model, WorldFluxAgent):
            raise ConfigurationError(
                f"ImaginationCallback draws what a WorldFluxAgent imagines, got {type(self.model).__name__}."
            )

    def _on_training_start(self) -> None:
        self._drawn_at = self.num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps // self.interval > self._drawn_at // self.interval and self._outputs():
            batch = self._newest_windows()
            if batch is not None:
                self._draw(batch)
                self._drawn_at = self.num_timesteps
        return True

    def _outputs(self) -> list[TensorBoardOutputFormat]:
        return [output for output in self.logger.output_formats if isinstance(output, TensorBoardOutputFormat)]

    def _newest_windows(self) -> Batch | None:
        """Windows of the steps since the last pictures; None if no window fits."""
        agent, length = self.model, self.context + self.horizon
        assert agent.replay_buffer is not None
        has_images = any(len(shape) == 3 for shape in agent.model.config.obs_shapes.values())
        count = self.windows or (IMAGE_WINDOWS if has_images else WINDOWS)
        since = max(self.num_timesteps - self._drawn_at, count * length) // agent.n_envs
        newest = newest_rows(agent.replay_buffer, max(since, 2 * length), self.seed + self.num_timesteps)
        if not newest.num_windows(length):
            return None
        batch = newest.sample(count, length)
        normalize = agent.get_vec_normalize_env()
        if normalize is not None and normalize.norm_obs:
            batch = replace(batch, obs=normalized(batch.obs, normalize))
        return batch

    def _draw(self, batch: Batch) -> None:
        found = open_loop(self.model.model, batch, self.context, seed=self.seed)
        try:
            check_finite(found)
        except TrainingError:  # `learn` raises it itself, with the name of the loss
            return
        title = f"{self.model.model.config.model_type} after {self.num_timesteps} steps; the newest replay data"
        pictures = figures(found, found.errors(), shown=self.shown, title=title)
        films = self._films(found)
        for output in self._outputs():
            # Recorded in SB3's logger, they would be written at its next dump, with that step's number.
            entries = {f"{TAG}/{name}": Figure(figure, close=True) for name, figure in pictures.items()}
            output.write(entries, dict.fromkeys(entries, ()), self.num_timesteps)
            for name, (data, height, width) in films.items():
                _write_film(output, f"{TAG}/{name}", data, height, width, self.num_timesteps)
        if self.verbose:
            print(f"drew what the model imagines at step {self.num_timesteps}")

    def _films(self, found: OpenLoop) -> dict[str, tuple[bytes, int, int]]:
        """Animated PNGs with their height and width, by name."""
        made = {}
        images = image_keys(found)
        for key in images:
            frames = film(found, key, longest_windows(found, self.shown))
            data = as_animated_png(frames, FPS)
            if data is not None:
                made[picture_name("film", key, images)] = data, frames.shape[1], frames.shape[2]
        return made


def _write_film(output: TensorBoardOutputFormat, tag: str, data: bytes, height: int, width: int, step: int) -> None:
    """Writes an animation among the images, as torch's `add_video` writes GIFs, for which it needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    assert output.writer.file_writer is not None
    output.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    output.writer.flush()
