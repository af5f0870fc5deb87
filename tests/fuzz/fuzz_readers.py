"""Feeds readers with damaged and hostile files, and reports the outcomes.

    python tests/fuzz/fuzz_readers.py --reader official-dreamerv3 --minutes 10 --seed 0

Input n of a seed is always the same: `--first n --count 1` makes it again. Inputs are read in processes that may take a
bounded amount of memory and of CPU time for each input, and whose death is noticed. A reader passes if it returns, or
raises one of the errors that it may raise, for another reason than a lack of memory.

To add a reader, add an entry to `READERS`.
"""

from __future__ import annotations

import argparse
import copy
import json
import mmap
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from worldflux import WorldFluxAgent, create_world_model
from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.curves import read_run
from worldflux.cli.options import from_json
from worldflux.cli.runs import CONFIG_FILE, RunConfig
from worldflux.errors import BufferError, CheckpointError, WorldFluxError
from worldflux.interop import load_official_dreamerv3, load_official_tdmpc2
from worldflux.training import ReplayBuffer

GOLDEN = Path(__file__).parent.parent / "golden"
SECONDS = 20
"""CPU time that one input may take."""
MEMORY = 2**30
"""Bytes that a process may take while it reads, above what it had before."""
BATCH = 500
"""Number of inputs that one process reads."""
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Directory of the inputs; in memory where that is possible."""


@dataclass(frozen=True)
class Reader:
    """A reader of files, with valid inputs and their damage."""

    make: Callable[[Path], Path]
    """Writes a valid input into an empty directory and returns the path that `read` takes."""
    mutate: Callable[[random.Random, Path], None]
    """Damages a copy of the input, in place."""
    read: Callable[[Path], Any]
    allowed: tuple[type[BaseException], ...] = (CheckpointError,)


# Damage to bytes

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def some_number(rng: random.Random, size: int) -> bytes:
    """A number in `size` bytes, often one that is a common source of errors."""
    number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(8 * size)
    return (number % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "little", "big")))  # type: ignore[arg-type]


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to eight places overwritten, doubled, left out or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        # Headers are at the beginning of files and, of archives, at their end.
        where = rng.choice((rng.randrange(len(changed) + 1), rng.randrange(min(len(changed), 500) + 1)))
        where = len(changed) - where if rng.random() < 0.2 else where
        length = rng.choice((1, 2, 4, 8, 16, 100))
        kind = rng.randrange(6)
        if kind == 0 and where < len(changed):
            changed[where] ^= 1 << rng.randrange(8)
        elif kind in (1, 2):
            number = some_number(rng, rng.choice((1, 2, 4, 8)))
            changed[where : where + len(number)] = number
        elif kind == 3:
            del changed[where : where + length]
        elif kind == 4:
            changed[where:where] = changed[where : where + length]
        elif rng.random() < 0.2:
            del changed[where:]
    return bytes(changed)


def damage_file(rng: random.Random, path: Path) -> None:
    """Damages the bytes of a file."""
    path.write_bytes(damaged_bytes(rng, path.read_bytes()))


# Damage to pickles

WORDS = (
    "numpy dtype ndarray numpy._core.multiarray numpy.core.multiarray numpy._core.numeric _reconstruct scalar "
    "_frombuffer builtins eval os system torch Size collections OrderedDict FloatStorage torch._utils "
    "_rebuild_tensor_v2 storage f4 O8 V8 U4 c8 < | C F K params a.b"
).split(" ")


def split_pickle(data: bytes) -> list[bytes]:
    """The opcodes of a pickle, each with its argument."""
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def some_opcode(rng: random.Random) -> bytes:
    """A random opcode with a random argument."""
    opcode = rng.choice(pickletools.opcodes)
    code = opcode.code.encode("latin-1")
    if opcode.arg is None:
        return code
    word = rng.choice(WORDS).encode()
    size = opcode.arg.n
    if size == pickletools.UP_TO_NEWLINE:
        return code + word + b"\n" + (rng.choice(WORDS).encode() + b"\n" if "pair" in opcode.arg.name else b"")
    if size >= 0:
        return code + some_number(rng, size)
    width = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }[size]
    length = len(word).to_bytes(width, "little") if rng.random() < 0.8 else some_number(rng, width)
    return code + length + word


def damaged_pickle(rng: random.Random, data: bytes) -> bytes:
    """A pickle with one to six opcodes added, removed, moved, or with other arguments."""
    try:
        opcodes = split_pickle(data)
    except ValueError:  # damaged before
        return damaged_bytes(rng, data)
    for _ in range(rng.randint(1, 6)):
        where, other = rng.randrange(len(opcodes)), rng.randrange(len(opcodes))
        kind = rng.randrange(8)
        if kind == 0:
            del opcodes[where : where + rng.choice((1, 1, 1, 2, 10))]
        elif kind == 1:
            opcodes.insert(where, some_opcode(rng))
        elif kind == 2:
            opcodes[where] = some_opcode(rng)
        elif kind == 3:
            opcodes[where:where] = opcodes[other : other + rng.choice((1, 2, 5, 30))]
        elif kind == 4:
            opcodes[where], opcodes[other] = opcodes[other], opcodes[where]
        elif kind == 5:  # another argument, as long as the old one
            head, argument = opcodes[where][:1], opcodes[where][1:]
            size = min(len(argument), 8)
            opcodes[where] = head + some_number(rng, size) + argument[size:] if size else head
        elif kind == 6:  # the argument of another opcode of its kind
            alike = [
                opcode for opcode in rng.sample(opcodes, min(len(opcodes), 200)) if opcode[:1] == opcodes[where][:1]
            ]
            opcodes[where] = rng.choice(alike) if alike else opcodes[where]
        else:  # a whole number, where shapes and sizes are
            numbers = [i for i in range(where, min(where + 60, len(opcodes))) if opcodes[i][:1] in b"KMJ"]
            if numbers:
                value = rng.choice(NUMBERS) * rng.choice((1, -1))
                opcodes[rng.choice(numbers)] = pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)
        if not opcodes:
            return b"."
    return b"".join(opcodes)


# Damage to JSON

TEXTS = ("", "x", "nan", "inf", "/tmp/x", "../../x", "cuda:7", "\udc80")
CONTAINERS: tuple[Any, ...] = ([], {}, [1], {"a": 1}, [[[]]], [None], [[1, 2], [3]])
FLOATS = (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"))
COUNTS = (0, 1, -1, 2, 3, 255, 2**20, 2**31, 2**48, 2**53, 2**62, 2**63, 10**30)
VALUES: tuple[Any, ...] = (None, True, False, *TEXTS, *CONTAINERS, *FLOATS, *COUNTS)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every list and object in a value with each of its keys or indices; of long lists only the beginning."""
    if not isinstance(value, dict | list):
        return []
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(min(len(value), 20)))
    return [(value, key) for key in keys] + [place for key in keys for place in places_in(value[key])]


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """JSON with one to three values replaced, removed or moved; sometimes deep, long or with a key twice."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # damaged before
        return damaged_bytes(rng, data)
    if rng.random() < 0.15:
        return damaged_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = places_in(value)
        if not places:
            break
        holder, key = rng.choice(places)
        old, kind = holder[key], rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "type", "\udc80"))] = holder.pop(key)
        elif kind == 2 and type(old) in (int, float):
            holder[key] = rng.choice((old + 1, -old, old * 1000, str(old), [old]))
        elif kind == 3 and isinstance(old, list):
            holder[key] = old * rng.choice((2, 1000))
        elif kind == 4:
            other, name = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(value)
    for old, new in (
        ("1", "1" * rng.choice((30, 400, 5000))),
        ("[", "[" * rng.choice((70, 900, 100_000))),
        ("{", '{"step": 1, "step": 2, '),
    ):
        if rng.random() < 0.03:
            text = text.replace(old, new, 1)
    return text.encode()


# Damage to archives


def damage_archive(rng: random.Random, path: Path, inner: dict[str, Callable[[random.Random, bytes], bytes]]) -> None:
    """A zip with damaged, renamed, doubled, missing or compressed members, or with damage to its own structure.

    `inner` damages members in a way of their own, by the end of their names.
    """
    if rng.random() < 0.3:
        damage_file(rng, path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # damaged before; zipfile raises much
        damage_file(rng, path)
        return
    for _ in range(rng.randint(1, 3)):
        where = rng.randrange(len(members))
        chosen = [i for i, (name, _) in enumerate(members) if name.endswith(tuple(inner))]
        if chosen and rng.random() < 0.7:
            where = rng.choice(chosen)
        name, data = members[where]
        special = next((damage for ending, damage in inner.items() if name.endswith(ending)), None)
        kind = rng.randrange(8)
        if kind < 5 and special is not None:
            members[where] = name, special(rng, data)
        elif kind in (4, 5):
            members[where] = name, damaged_bytes(rng, data)
        elif kind == 6:
            members[where] = rng.choice(members)[0] + rng.choice(("", "", "x", "/../x")), data
        elif len(members) > 1:
            del members[where]
    compression = zipfile.ZIP_STORED if rng.random() < 0.9 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    if rng.random() < 0.1:
        damage_file(rng, path)


# The papers' checkpoints

OBS_SHAPES = {"height": (1,), "position": (5,), "velocity": (5,)}


def make_agent_pkl(directory: Path) -> Path:
    """DreamerV3's reference checkpoint without its optimiser."""
    with np.load(GOLDEN / "dreamerv3_proprio.npz") as file:
        params = {name[2:]: file[name] for name in file.files if name.startswith("p/")}
    content = {"params": params, "counters": {"updates": 3, "batches": 4}}
    for protocol in (3, 4, 5):
        (directory / f"agent{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))
    shutil.copy(directory / "agent4.pkl", directory / "agent.pkl")
    return directory / "agent.pkl"


def damage_agent_pkl(rng: random.Random, path: Path) -> None:
    """Damages opcodes in three of four cases, bytes in the others."""
    data = path.with_name(f"agent{rng.choice((3, 4, 5))}.pkl").read_bytes()
    damage = damaged_pickle if rng.random() < 0.75 else damaged_bytes
    path.write_bytes(damage(rng, data))


def make_pt(directory: Path) -> Path:
    """TD-MPC2's reference checkpoint."""
    return Path(shutil.copy(GOLDEN / "tdmpc2_state_official.pt", directory / "model.pt"))


# Files of worldflux


class Walk(gym.Env[Any, Any]):
    """An environment with episodes of ten steps."""

    def __init__(self, family: str) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        discrete = family == "dreamerv3"
        self.action_space = gym.spaces.Discrete(2) if discrete else gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Takes the next of ten steps."""
        self.steps += 1
        return np.full(4, self.steps / 10, np.float32), 1.0, False, self.steps >= 10, {}


SIZES: dict[str, dict[str, Any]] = {
    "dreamerv3": dict(deter_dim=32, hidden_dim=8, stoch_discrete=4, stoch_classes=4, units=8, imagination_horizon=3),
    "tdmpc2": dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2),
}


def make_agent(family: str) -> WorldFluxAgent:
    """A small agent that has learned a little."""
    search = dict(num_samples=16, num_elites=4, num_pi_trajs=4, iterations=2) if family == "tdmpc2" else None
    agent = WorldFluxAgent(
        f"{family}:tiny",
        Walk(family),
        **dict(batch_size=4, seq_len=4, train_ratio=8, buffer_size=500, learning_starts=20, seed=0, device="cpu"),
        planner_kwargs=search,
        model_kwargs=SIZES[family],
    )
    return agent.learn(30)


def make_saved(directory: Path, family: str, kind: str) -> Path:
    """An agent's zip, its checkpoint or its model."""
    agent = make_agent(family)
    if kind == "agent":
        agent.save(directory / "agent.zip")
        return directory / "agent.zip"
    if kind == "checkpoint":
        agent.save_checkpoint(directory / "checkpoint")
    else:
        agent.model.save_pretrained(directory / "model")
    return directory / kind


def damage_directory(rng: random.Random, path: Path) -> None:
    """Damages one or two of the files in a directory according to their kind, removes one, or makes it a pipe."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
        chance = rng.random()
        if chance > 0.97:
            file.unlink()
            if chance > 0.99:
                os.mkfifo(file)
        elif file.suffix == ".json":
            file.write_bytes(damaged_json(rng, file.read_bytes()))
        elif file.suffix in (".pt", ".npz"):
            damage_archive(rng, file, {"data.pkl": damaged_pickle})
        else:
            damage_file(rng, file)


def damage_agent(rng: random.Random, path: Path) -> None:
    """Damages the zip of an agent, the JSON in it, or the pickle in the archive in it."""

    def damaged_archive(rng: random.Random, data: bytes) -> bytes:
        inner = path.with_name("inner")
        inner.write_bytes(data)
        damage_archive(rng, inner, {"data.pkl": damaged_pickle})
        return inner.read_bytes()

    damage_archive(rng, path, {".json": damaged_json, "optimizer.pt": damaged_archive})


def load_agent(path: Path, family: str, *, resume: bool) -> None:
    """Loads an agent, acts, and takes a gradient step, whatever number the settings ask for."""
    refused = ""
    try:
        agent = WorldFluxAgent.load(path, Walk(family), device="cpu", resume=resume)
    except BufferError as error:  # a buffer's size is a setting, and what it reserves is no memory yet
        refused = str(error)
    except ValueError as error:
        if "spaces do not match" not in str(error):  # which is SB3's
            raise
        refused = str(error)
    if refused:
        raise CheckpointError(refused)
    agent.predict(np.zeros(4, np.float32))
    if agent.replay_buffer is not None and len(agent.replay_buffer) >= 8:
        agent.trainer.step(agent.replay_buffer.sample(2, 5), agent.replay_buffer)


def load_model(path: Path) -> None:
    """Loads a model and asks it for actions."""
    model = create_world_model(path)
    model.policy(model.encode(torch.zeros(1, 4)))


def make_buffer(directory: Path) -> Path:
    """The `.npz` of a replay buffer."""
    make_agent("tdmpc2").save_replay_buffer(directory / "buffer.npz")
    return directory / "buffer.npz"


def make_run(directory: Path) -> Path:
    """The directory of a run of the command line, without its checkpoints."""
    run = directory / "run"
    (run / "logs").mkdir(parents=True)
    settings = {"steps": 100, "seed": 3, "learning_rate": 0.1, "set": ["units=8"], "planner": "auto"}
    RunConfig("train", "tdmpc2:tiny", "Pendulum-v1", settings, versions={"torch": "2"}).write(run)
    (run / "evaluations.csv").write_text("step,score,std,length,episodes,seconds,seed\n3,1.5,0.1,10,5,1.0,3\n")
    (run / "logs" / "progress.csv").write_text(
        "time/total_timesteps,time/time_elapsed,rollout/ep_rew_mean\n10,1,0.5\n20,2,0.7\n"
    )
    return run


def load_run(path: Path) -> None:
    """Reads what `worldflux train --resume` and `worldflux plot` read of a run."""
    from_json(TrainSettings, RunConfig.read(path).settings, path / CONFIG_FILE)
    run = read_run(path)
    if run is not None:
        assert all(len(score) == 3 for score in run.evaluation + run.training) and isinstance(run.task, str)


OURS = (WorldFluxError, FileNotFoundError)


def saved(family: str, kind: str) -> Reader:
    """An entry of `READERS`."""
    make = partial(make_saved, family=family, kind=kind)
    if kind == "model":
        return Reader(make, damage_directory, load_model, OURS)
    resume = kind == "checkpoint"
    damage = damage_directory if resume else damage_agent
    return Reader(make, damage, partial(load_agent, family=family, resume=resume), OURS)


READERS = {
    **{f"{kind}-{family}": saved(family, kind) for kind in ("agent", "checkpoint", "model") for family in SIZES},
    "npz": Reader(
        make_buffer,
        lambda rng, path: damage_archive(rng, path, {}),
        lambda path: ReplayBuffer.load(path).sample(2, 3),
        OURS,
    ),
    "run": Reader(make_run, damage_directory, load_run, OURS),
    "official-dreamerv3": Reader(
        make_agent_pkl,
        damage_agent_pkl,
        lambda path: load_official_dreamerv3(path, obs_shape=OBS_SHAPES, action_dim=3),
    ),
    "official-tdmpc2": Reader(
        make_pt,
        lambda rng, path: damage_archive(rng, path, {"data.pkl": damaged_pickle}),
        lambda path: load_official_tdmpc2(path, obs_shape=(9,), action_dim=3),
    ),
}


# Running


def lacked_memory(error: BaseException | None) -> bool:
    """Whether an error stands for a failed allocation."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_one(reader: Reader, good: Path, target: str, seed: str) -> str:
    """The outcome of an input: `read`, `refused`, or a description of the failure."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        shutil.copytree(good, directory, dirs_exist_ok=True)
        path = Path(directory, target)
        reader.mutate(random.Random(seed), path)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reader.read(path)
        except reader.allowed as error:
            return f"wanted more than {MEMORY:,} bytes: {error}" if lacked_memory(error) else "refused"
        except BaseException:
            return "".join(traceback.format_exc(limit=-3))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return "read"


def read_batch(
    reader: Reader, good: Path, target: str, seed: int, numbers: range, until: float, state: mmap.mmap
) -> None:
    """Reads inputs in a process of its own; `state` holds the number of the present input, and counts."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        if time.monotonic() > until:
            break
        struct.pack_into("<q", state, 0, number)
        outcome = read_one(reader, good, target, f"{seed}/{number}")
        place = {"read": 8, "refused": 16}.get(outcome, 24)
        struct.pack_into("<q", state, place, struct.unpack_from("<q", state, place)[0] + 1)
        if place == 24:
            print(f"input {number} of seed {seed}: {outcome}", flush=True)
    rows = np.arange(4.0)
    assert (pickle.loads(pickle.dumps(rows, 5)) == rows).all() and np.dtype("f4").itemsize == 4, "NumPy was changed"


def fuzz(name: str, minutes: float, seed: int, first: int, count: int) -> bool:
    """Reads inputs until the time is over or none is left; returns True if all passed."""
    reader = READERS[name]
    state = mmap.mmap(-1, 32)
    number, deaths = first, 0
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        good = Path(directory)
        target = str(reader.make(good).relative_to(good))
        reader.read(good / target)  # the good one; and imports what it needs
        started = time.monotonic()
        until = started + 60 * minutes
        while number < first + count and time.monotonic() < until:
            numbers = range(number, min(number + BATCH, first + count))
            struct.pack_into("<q", state, 0, number)
            child = os.fork()
            if child == 0:
                try:
                    read_batch(reader, good, target, seed, numbers, until, state)
                    sys.stdout.flush()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            status = os.waitpid(child, 0)[1]
            number = struct.unpack_from("<q", state, 0)[0] + 1
            if status:
                deaths += 1
                cause = signal.Signals(status & 127).name if status & 127 else "an error"
                print(f"input {number - 1} of seed {seed}: the process ended with {cause}", flush=True)
    good_ones, refused, wrong = struct.unpack_from("<3q", state, 8)
    print(
        f"{name}, seed {seed}: {good_ones + refused + wrong + deaths:,} inputs in {time.monotonic() - started:.0f} s; "
        f"{good_ones:,} read, {refused:,} refused, {wrong:,} wrong, {deaths:,} processes ended."
    )
    return not wrong and not deaths


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Feeds readers with damaged and hostile files.")
    parser.add_argument("--reader", choices=READERS, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, default=2**40, help="how many inputs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Duplicate name")  # of members that are there twice on purpose
    good = fuzz(arguments.reader, arguments.minutes, arguments.seed, arguments.first, arguments.count)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
