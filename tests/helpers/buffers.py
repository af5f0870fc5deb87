"""A buffer of images and vectors whose numbers identify their rows, and its checkpoints."""

import json

import numpy as np
import torch

from helpers.replay import assert_same_batch
from worldflux.files import atomic_directory
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.checkpoint import ReplaySegments

EXTRAS = {"mark": ((2,), np.float16)}


def make(capacity=40, n_envs=2, seed=0):
    shapes = {"camera": (1, 2, 2), "speed": (1,)}
    return ReplayBuffer(capacity, shapes, 2, n_envs=n_envs, extras=EXTRAS, seed=seed)


def observed(count):
    """The observations at `[n_envs]` counts."""
    count = np.asarray(count, np.float64)
    camera = np.broadcast_to(count[:, None, None, None] % 251, (len(count), 1, 2, 2)).astype(np.uint8)
    return {"camera": camera, "speed": count[:, None]}


def step(buffer, count, terminations=0, truncations=0, active=None):
    """Adds a step of every environment, from the observation of `count` to that of `count + 1`."""
    count = np.broadcast_to(np.asarray(count, np.float64), (buffer.n_envs,))
    ends = [np.broadcast_to(flags, count.shape) for flags in (terminations, truncations)]
    extras = {"mark": np.stack([count, -count], 1)}
    actions, final_obs = np.stack([count, count + 0.25], 1), observed(count + 1)
    buffer.add(observed(count), actions, count + 0.5, *ends, final_obs=final_obs, extras=extras, active=active)


def filled(steps=30, **arguments):
    """A buffer that has wrapped around, with terminated, truncated and interrupted episodes and two in flight."""
    buffer = make(**arguments)
    for t in range(steps):
        step(buffer, 1000 * np.arange(buffer.n_envs) + t, terminations=t % 7 == 3, truncations=t % 7 == 6)
        if t == 12:
            buffer.end_episodes(0)
    return buffer


def save(log, path, **arguments):
    with atomic_directory(path) as directory:
        log.write(directory, **arguments)
    log.moved_to(path)


def read(path, **arguments):
    buffer = make(**arguments)
    return buffer, ReplaySegments.read(path, buffer)


def names(path):
    return sorted(file.name for file in (path / "replay").iterdir())


def segment_names(path):
    return [segment["file"] for segment in state_of(path)["segments"]]


def state_of(path):
    return json.loads((path / "replay" / "replay.json").read_text())


def content(buffer):
    """The whole content of a buffer: counters, sampler, and each row of each array."""
    store, fresh = buffer.stored()
    found = {name: getattr(store, name).tolist() for name in ("begin", "end", "transitions", "episodes", "in_flight")}
    found |= {"fresh": fresh.tolist(), "sampler": buffer.rng_state(), "capacity": buffer.capacity}
    columns = {**store.obs, "actions": store.actions, "rewards": store.rewards, "flags": store.flags, **store.extras}
    for stream in range(buffer.n_envs):
        at = store.at(stream, np.arange(store.begin[stream], store.end[stream]))
        found |= {f"{name} of {stream}": column[at].tolist() for name, column in columns.items()}
    return found


def assert_same_batches(buffer, other):
    for fresh in (False, True):
        one, two = (each.sample(20, 3, fresh=fresh) for each in (buffer, other))
        assert torch.equal(one.row_ids, two.row_ids)
        assert_same_batch(one, two)


def two_segments(path):
    buffer = make()
    log = ReplaySegments(buffer)
    for name, steps in (("before", 9), ("a", 8)):
        for t in range(steps):
            step(buffer, t, terminations=t == 4)
        save(log, path / name, final_obs=observed([1, 1]))
    return path / "a" / "replay"
