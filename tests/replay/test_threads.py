"""One thread adds rows to a replay buffer while another one learns from them."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.envs import CountingEnv
from helpers.recorded import assert_belongs_together, buffer_for_counting

from worldflux.envs import RecordEpisodes
from worldflux.training import ReplayBuffer


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Lets Python change between threads after nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextmanager
def meanwhile(repeat: Callable[[], object]) -> Iterator[None]:
    """Calls a function repeatedly in another thread, whose errors are raised at the end."""
    over, errors = threading.Event(), []

    def run() -> None:
        try:
            while not over.is_set():
                repeat()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]


def test_what_is_sampled_while_another_thread_records_belongs_together() -> None:
    buffer = buffer_for_counting(capacity=40)
    env = RecordEpisodes(CountingEnv(lengths=(3, 1, 4), ends=("terminate", "truncate", "both")), buffer)
    env.reset()

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(np.array([5.0], np.float32))
        if terminated or truncated:
            env.reset()

    for _ in range(40):
        step()
    with meanwhile(step):
        compared, begun = 0, env.unwrapped.total
        while compared < 1000 or env.unwrapped.total < begun + 2_000:
            compared += assert_belongs_together(buffer.sample(8, 4))


def test_latents_are_never_stored_with_rows_that_have_taken_the_place_of_theirs() -> None:
    """Each row's latent is the number of its step, and twice that once it was written back."""
    buffer = ReplayBuffer(30, (1,), 1, extras={"latent": ((64,), np.float32)}, seed=0)
    added = 0

    def add() -> None:
        nonlocal added
        added += 1
        n = float(added)
        latent = np.full((1, 64), n, np.float32)
        buffer.add([[n]], [[0.0]], [0.0], [False], [False], extras={"latent": latent})

    for _ in range(30):
        add()
    written = 0
    with meanwhile(add):
        while written < 100 or added < 2_000:
            batch = buffer.sample(4, 5)
            numbers, latents = batch.obs.numpy(), batch.extras["latent"].numpy()
            assert ((latents == numbers) | (latents == 2 * numbers)).all(), (numbers[..., 0], latents[..., 0])
            written += int((latents[..., 0] == 2 * numbers[..., 0]).sum())
            buffer.update_extras(batch.row_ids, {"latent": 2 * batch.obs.expand(-1, -1, 64)})


def test_a_copy_of_a_buffer_has_a_lock_of_its_own() -> None:
    buffer = buffer_for_counting()
    with buffer.lock:
        for other in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
            thread = threading.Thread(target=other.end_episodes, daemon=True)
            thread.start()
            thread.join(timeout=10)
            assert not thread.is_alive()
