"""The buffer against a plain Python model of it, in every storage."""

from unittest import mock

import numpy as np
import pytest
import torch
from helpers.replay import HeldBack, acted, counts, seen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worldflux.errors import BufferError
from worldflux.replay import ring as row_store
from worldflux.replay.buffer import ReplayBuffer


class PlainBuffer:
    """What `ReplayBuffer` should hold: a list of rows for each stream, counted by `n` from the stream's beginning."""

    def __init__(self, capacity, n_envs, spare):
        self.limits = [capacity // n_envs + (env < capacity % n_envs) for env in range(n_envs)]
        self.ring = self.limits[0] + min(self.limits[0], spare)
        self.streams = [[] for _ in range(n_envs)]
        self.written = [0] * n_envs
        self.open = [False] * n_envs

    def row(self, env, obs, *, action=0.0, reward=0.0, term=False, trunc=False, final=False, seen=True, mark=0.0):
        first = not self.open[env] and not final
        self.open[env] = not (term or trunc or final)
        self.written[env] += 1
        return dict(
            n=self.written[env] - 1, obs=obs, action=action, reward=reward, term=term, trunc=trunc,
            first=first, final=final, seen=seen, mark=mark,
        )  # fmt: skip

    def extend(self, env, rows):
        """Appends; then the oldest rows go until everything fits, and no final row is left without a step."""
        stream = self.streams[env] + rows
        while self.steps(stream) > self.limits[env] or len(stream) > self.ring or (stream and stream[0]["final"]):
            stream.pop(0)
        self.streams[env] = stream

    @staticmethod
    def steps(stream):
        return sum(not row["final"] for row in stream)

    def add(self, env, obs, action, reward, term, trunc, mark):
        rows = [self.row(env, obs, action=action, reward=reward, term=term, trunc=trunc, mark=mark)]
        if term or trunc:
            rows.append(self.row(env, obs + 1, final=True))
        self.extend(env, rows)

    def add_episode(self, lengths, first_episode, truncated, last_known):
        free = [env for env in range(len(self.streams)) if not self.open[env]]
        env = min(free, key=lambda env: self.steps(self.streams[env]))
        rows = []
        for i, length in enumerate(lengths):
            obs, actions, rewards = counts(first_episode + i, length)
            for t in range(length):
                ends = t == length - 1
                rows.append(
                    self.row(
                        env, obs[t, 0], action=actions[t, 0], reward=rewards[t],
                        term=ends and not truncated, trunc=ends and truncated,
                    )
                )  # fmt: skip
            known = last_known and i == len(lengths) - 1
            rows.append(self.row(env, obs[-1, 0] if known else 0.0, final=True, seen=known))
        self.extend(env, rows)

    def end_episodes(self, env, final_obs):
        if self.open[env]:
            self.streams[env][-1]["trunc"] = True
            known = final_obs is not None
            self.extend(env, [self.row(env, final_obs[env][0] if known else 0.0, final=True, seen=known)])

    def by_id(self):
        return {row["n"] * len(self.streams) + env: row for env, rows in enumerate(self.streams) for row in rows}

    def windows(self, seq_len):
        """The ids of the rows of every window."""
        ids = [[row["n"] * len(self.streams) + env for row in rows] for env, rows in enumerate(self.streams)]
        return {tuple(rows[i : i + seq_len]) for rows in ids for i in range(len(rows) - seq_len + 1)}

    def episodes(self):
        """The ids of the rows of every episode."""
        found = []
        for env, rows in enumerate(self.streams):
            for i, row in enumerate(rows):
                if i == 0 or row["first"]:
                    found.append([])
                found[-1].append(row["n"] * len(self.streams) + env)
        return found


def assert_gives_all_of(source, windows, seq_len, known):
    """Far more draws than windows: each of them has come up, and no other, with the rows that the model knows."""
    assert source.num_windows(seq_len) == len(windows)
    batch = source.sample(25 * len(windows), seq_len)
    drawn, at = np.unique(batch.row_ids.numpy(), axis=0, return_index=True)
    assert {tuple(window) for window in drawn.tolist()} == windows
    expected = [[known[i] for i in window] for window in drawn.tolist()]

    def column(name):
        return [[row[name] for row in window] for window in expected]

    assert batch.obs[at, :, 0].tolist() == column("obs")
    assert batch.actions[at, :, 0].tolist() == column("action")
    assert batch.rewards[at].tolist() == column("reward")
    assert batch.terminations[at].tolist() == column("term")
    assert batch.truncations[at].tolist() == column("trunc")
    assert batch.is_first[at].tolist() == column("first")
    assert seen(batch)[at].tolist() == column("seen")
    assert batch.extras["mark"][at].tolist() == column("mark")


class Replay(RuleBasedStateMachine):
    """Does the same to a buffer and to a plain one."""

    @initialize(
        capacity=st.integers(3, 24),
        n_envs=st.integers(1, 3),
        spare=st.sampled_from([1, 2, 50]),
        storage=st.sampled_from(["memory", "disk", "cpu"]),
        seed=st.integers(0, 99),
    )
    def create(self, capacity, n_envs, spare, storage, seed):
        self.patch = mock.patch.multiple(
            row_store, spare_rows=lambda transitions, n_envs: min(transitions, spare), _CHUNK_BYTES=50
        )
        self.patch.start()
        self.path = self.folder / "buffer.npz"
        self.capacity, self.n_envs, self.spare, self.seed = capacity, n_envs, spare, seed
        self.storage = self.folder if storage == "disk" else storage
        self.rng = np.random.default_rng(seed)
        self.buffer = ReplayBuffer(
            capacity, (1,), 1, n_envs=n_envs, extras={"mark": ((), np.float32)}, seed=seed, storage=self.storage
        )
        self.held = HeldBack(self.buffer)
        self.plain = PlainBuffer(capacity, n_envs, spare)
        self.episode, self.now, self.old_batches = n_envs, [(env, 0) for env in range(n_envs)], []

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.stop()

    def new_episode(self, env):
        self.now[env] = (self.episode, 0)
        self.episode += 1

    @rule(
        steps=st.integers(1, 12),
        end_rate=st.sampled_from([0.05, 0.3, 0.9]),
        active_rate=st.sampled_from([1.0, 0.6]),
        held_back=st.booleans(),
    )
    def add_steps(self, steps, end_rate, active_rate, held_back):
        if self.held is None and not any(self.plain.open):
            self.held = HeldBack(self.buffer)
        held = self.held if held_back else None
        for _ in range(steps):
            obs = np.array([[1000.0 * e + t] for e, t in self.now])
            term, trunc = self.rng.random((2, self.n_envs)) < end_rate / 2
            on = self.rng.random(self.n_envs) < active_rate
            if held is not None:
                held.add(obs, term, trunc, on)
            else:
                # Of the environments that make no step nothing is read.
                given = np.where(on[:, None], obs, np.nan)
                self.buffer.add(
                    given, acted(given), given[:, 0] + 0.5, np.where(on, term, 7), np.where(on, trunc, 7),
                    final_obs=given + 1, extras={"mark": obs[:, 0] / 2}, active=None if on.all() else on,
                )  # fmt: skip
            for env in np.flatnonzero(on):
                e, t = self.now[env]
                count = 1000.0 * e + t
                mark = 0.0 if held is not None else count / 2
                self.plain.add(env, count, acted(count), count + 0.5, term[env], trunc[env], mark)
                self.now[env] = (e, t + 1)
                if term[env] or trunc[env]:
                    self.new_episode(env)
        if held is not None:
            held.hand_over()

    @rule(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), truncated=st.booleans(), last_known=st.booleans()
    )
    def add_episodes(self, lengths, truncated, last_known):
        parts = [counts(self.episode + i, length) for i, length in enumerate(lengths)]
        obs = np.concatenate([part[0][:-1] for part in parts] + ([parts[-1][0][-1:]] if last_known else []))
        ends = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
        flags = {"truncations": ends} if truncated else {"dones": ends}
        arrays = obs, np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])
        if all(self.plain.open):
            with pytest.raises(BufferError, match="end_episodes"):
                self.buffer.add_episode(*arrays, **flags)
        else:
            self.buffer.add_episode(*arrays, **flags)
            self.plain.add_episode(lengths, self.episode, truncated, last_known)
        self.episode += len(lengths)

    @rule(env=st.sampled_from([None, 0]), known=st.booleans())
    def end_episodes(self, env, known):
        final_obs = [[1000.0 * e + t] for e, t in self.now] if known else None
        self.buffer.end_episodes(env, final_obs=final_obs)
        for closed in range(self.n_envs) if env is None else [env]:
            self.plain.end_episodes(closed, final_obs)
            self.new_episode(closed)

    @rule(seq_len=st.integers(1, 5), as_tensor=st.booleans())
    def update_extras(self, seq_len, as_tensor):
        if self.buffer.num_windows(seq_len):
            self.old_batches.append(self.buffer.sample(4, seq_len))
        # Batches from before may hold rows that are gone by now; those are left out.
        for number, batch in enumerate(self.old_batches):
            values = 1e6 + 100 * number + torch.arange(batch.row_ids.numel()).reshape(batch.row_ids.shape)
            self.buffer.update_extras(batch.row_ids, {"mark": values if as_tensor else values.numpy()})
            known = self.plain.by_id()
            for i, value in zip(batch.row_ids.flatten().tolist(), values.flatten().tolist(), strict=True):
                if i in known:
                    known[i]["mark"] = value
        for batch in self.old_batches:
            known = self.plain.by_id()
            marks = [[known[i]["mark"] if i in known else 0.0 for i in window] for window in batch.row_ids.tolist()]
            assert self.buffer.extras_of(batch.row_ids)["mark"].tolist() == marks

    @rule(more=st.integers(0, 5))
    def grow(self, more):
        self.capacity += more
        self.buffer.grow(self.capacity)
        larger = PlainBuffer(self.capacity, self.n_envs, self.spare)
        self.plain.limits, self.plain.ring = larger.limits, larger.ring

    @rule()
    def save_and_load(self):
        self.buffer.save(self.path)
        self.buffer = ReplayBuffer.load(self.path, extras=self.buffer.extras, seed=self.seed, storage=self.storage)
        self.held = None  # a recorder that begins now would end what is in flight
        # The file has no extras, and rows are counted anew.
        self.old_batches.clear()
        for env, stream in enumerate(self.plain.streams):
            self.plain.written[env] = len(stream)
            for n, row in enumerate(stream):
                row.update(n=n, mark=0.0)

    @precondition(lambda self: len(self.plain.episodes()) > 1)
    @rule(fraction=st.sampled_from([0.01, 0.4, 0.99]), seq_len=st.integers(1, 4), seed=st.integers(0, 9))
    def split(self, fraction, seq_len, seed):
        known, parts = self.plain.by_id(), self.buffer.split(fraction, seed=seed)
        episodes = self.plain.episodes()
        drawn = [set(part.sample(25 * part.num_windows(1), 1).row_ids.flatten().tolist()) for part in parts]
        assert not drawn[0] & drawn[1] and drawn[0] | drawn[1] == known.keys()
        for part, ids in zip(parts, drawn, strict=True):
            mine = [episode for episode in episodes if ids & set(episode)]
            assert ids == {i for episode in mine for i in episode}
            assert part.num_transitions == sum(not known[i]["final"] for i in ids)
            assert part.num_episodes == sum(known[i]["final"] for i in ids)
            # The windows of a stream that has these episodes and no others.
            only = PlainBuffer(self.capacity, self.n_envs, self.spare)
            rows = [[row for row in self.plain.streams[env] if row["n"] * self.n_envs + env in ids]
                    for env in range(self.n_envs)]  # fmt: skip
            only.streams = rows
            windows = only.windows(seq_len)
            if windows:
                assert_gives_all_of(part, windows, seq_len, known)
            else:
                with pytest.raises(BufferError, match=f"seq_len is {seq_len}"):
                    part.sample(1, seq_len)

    @invariant()
    def holds_the_same(self):
        if not hasattr(self, "plain"):
            return
        known = self.plain.by_id()
        assert len(self.buffer) == sum(not row["final"] for row in known.values())
        assert self.buffer.num_episodes == sum(row["final"] for row in known.values())
        for seq_len in (1, 3, 7):
            windows = self.plain.windows(seq_len)
            if windows:
                assert_gives_all_of(self.buffer, windows, seq_len, known)
            else:
                with pytest.raises(BufferError, match=f"seq_len is {seq_len}"):
                    self.buffer.sample(1, seq_len)


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    Replay.folder = tmp_path_factory.mktemp("replay")


TestReplay = Replay.TestCase
TestReplay.settings = settings(max_examples=100, stateful_step_count=12, deadline=None, derandomize=True)
