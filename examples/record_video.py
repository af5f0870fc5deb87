"""Records a video of a saved agent.

    python examples/record_video.py cartpole.zip CartPole-v1 --out cartpole.mp4

The environment must support rendering to an array (`render_mode="rgb_array"`). Gymnasium's classic control tasks
require pygame for this: `pip install "gymnasium[classic-control]"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tyro

from worldflux import WorldFluxAgent
from worldflux.envs import make_env


def main(
    agent: Annotated[Path, tyro.conf.Positional],
    env: Annotated[str, tyro.conf.Positional],
    out: Path = Path("agent.mp4"),
    seed: int = 0,
) -> int:
    """Records a video of one episode.

    Args:
        agent: File written by `agent.save`, or a directory of checkpoints.
        env: Name of its environment, as in `make_env`.
        out: File for the video.
        seed: Seed of the episode.

    Returns:
        Number of frames.
    """
    loaded = WorldFluxAgent.load(agent)
    stage = make_env(env, render_mode="rgb_array")
    obs, _ = stage.reset(seed=seed)
    frames = [stage.render()]
    memory, over, total = None, False, 0.0
    while not over:
        action, memory = loaded.predict(obs, memory, deterministic=True)
        obs, reward, terminated, truncated, _ = stage.step(action)
        frames.append(stage.render())
        total, over = total + float(reward), terminated or truncated
    stage.close()
    write_video(out, np.array(frames, np.uint8), fps=float(stage.metadata.get("render_fps", 30)))
    print(f"{out}: {len(frames)} frames, return {total:.1f}")
    return len(frames)


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames to an MP4 file.

    Args:
        path: File for the video.
        frames: RGB images `[T, H, W, 3]`, uint8. Their sides are cropped to even lengths, as the codec requires.
        fps: Frames per second.
    """
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise SystemExit(f"{path} cannot be written as a video.")
    for frame in frames[:, :height, :width]:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))  # OpenCV expects BGR
    writer.release()


if __name__ == "__main__":
    tyro.cli(main)
