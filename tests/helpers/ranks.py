"""Starts the ranks of a training as processes of this machine, and the jobs that they do."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from torch.overrides import TorchFunctionMode

import worldflux.models.tdmpc2.world_model as tdmpc2
from helpers.agents import make_agent, make_planner
from helpers.fast import episodes
from helpers.processes import finish, start
from helpers.small_models import DREAMERV3, TDMPC2
from worldflux import WorldFluxAgent, create_world_model
from worldflux.accel import ranks
from worldflux.agents import AgentCheckpointCallback, progress
from worldflux.envs import make_vec_env
from worldflux.errors import ConfigurationError
from worldflux.replay.batch import Batch
from worldflux.training import Callback, CheckpointCallback, ReplayBuffer, Trainer, TrainingConfig

TESTS = Path(__file__).resolve().parent.parent
TIME_LIMIT = 120
"""Seconds after which ranks that have not ended are killed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def variables_of_ranks(count: int) -> list[dict[str, str]]:
    """The environment variables that `torchrun` sets for each rank."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]


def do(job: Callable[..., Any], out: Path, *arguments: Any) -> None:
    """Does the work of one rank, whose result goes to the directory `out`."""
    torch.set_num_threads(1)
    ranks.join()
    try:
        torch.save(job(*arguments), out / f"{ranks.rank()}.pt")
    finally:
        ranks.leave()


def do_in_fork(variables: dict[str, str], out: Path, job: Callable[..., Any], *arguments: Any) -> None:
    """The same in a process that was forked, whose output goes to a file."""
    os.environ.update(variables)
    said = os.open(out / f"{variables['RANK']}.txt", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(said, stream)
    do(job, out, *arguments)


def finished_ranks(
    count: int, job: Callable[..., Any], out: Path, *arguments: Any, limit: float = TIME_LIMIT
) -> list[tuple[int, str]]:
    """Exit status and output of ranks that each call a function; all are killed if one takes too long."""
    out.mkdir(parents=True, exist_ok=True)
    started = [start(do_in_fork, variables, out, job, *arguments) for variables in variables_of_ranks(count)]
    try:
        return [(finish(one, limit), (out / f"{rank}.txt").read_text()) for rank, one in enumerate(started)]
    finally:
        for one in started:
            one.kill()


def on_ranks(count: int, job: Callable[..., Any], out: Path, *arguments: Any) -> list[Any]:
    """What a function returns on each rank."""
    for rank, (status, output) in enumerate(finished_ranks(count, job, out, *arguments)):
        assert status == 0, f"rank {rank}:\n{output}"
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(count)]


# Jobs


class Draws(TorchFunctionMode):
    """Records random draws, or gives those that the ranks of a training have recorded, as for one batch of all."""

    SOURCES = (torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.randint, Tensor.exponential_)

    def __init__(self, recorded: list[list[Tensor]] | None = None) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self._recorded = recorded

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = function(*args, **(kwargs or {}))
        return self.take(value) if function in self.SOURCES else value

    def take(self, value: Tensor) -> Tensor:
        if self._recorded is not None:
            parts = [draws[len(self.drawn)] for draws in self._recorded]
            differs = [axis for axis in range(value.ndim) if value.shape[axis] != parts[0].shape[axis]]
            value.copy_(torch.cat(parts, differs[0]) if differs else parts[0])
        self.drawn.append(value.detach().clone())
        return value

    @contextmanager
    def of_dropout(self) -> Iterator[None]:
        """Counts a mask of dropout as one draw: its own draws do not belong to rows of the batch."""
        real = tdmpc2.dropout_factors

        def factors(*args: Any) -> Tensor:
            with torch._C.DisableTorchFunction():
                return self.take(real(*args))

        tdmpc2.dropout_factors = factors
        try:
            yield
        finally:
            tdmpc2.dropout_factors = real


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dreamerv3": ("dreamerv3:tiny", DREAMERV3),
    "dreamerv3 in plain form": ("dreamerv3:tiny", DREAMERV3),
    "dreamerv3 without a decoder": ("dreamerv3:tiny", DREAMERV3 | {"representation": "redundancy"}),
    "tdmpc2": ("tdmpc2:tiny", TDMPC2 | {"episodic": True, "use_decoder": True}),
}
STEPS, WINDOWS, LENGTH = 3, 8, 7


def part_of(batch: Batch, rank: int, size: int) -> Batch:
    """The windows of one rank, such as the first half of them."""
    share = len(batch.rewards) // size
    return batch.with_tensors(
        {name: value[rank * share : (rank + 1) * share] for name, value in batch.named_tensors().items()}
    )


def steps_of(case: str, finals: bool, recorded: list[list[Tensor]] | None) -> dict[str, Any]:
    """Takes gradient steps on this rank's part of each batch, and tells everything that they have changed."""
    preset, sizes = CASES[case]
    torch.manual_seed(0)
    model = create_world_model(preset, obs_shape=(3,), action_dim=2, **sizes)
    if "plain" in case:
        model.rssm.fast = False
    trainer = Trainer(model, TrainingConfig(learning_rate=1e-2, grad_clip=1.0, batch_size=WINDOWS, device="cpu"))
    buffer = episodes(finals=finals, model=model)
    torch.manual_seed(100 + ranks.rank())
    draws, losses = Draws(recorded), []
    with draws, draws.of_dropout():
        for _ in range(STEPS):
            with torch._C.DisableTorchFunction():
                batch = buffer.sample(WINDOWS, LENGTH)
                batch.terminations[1:] = False  # which all ranks but the first have to be told of
            losses.append({k: float(v) for k, v in trainer.step(part_of(batch, ranks.rank(), ranks.size())).items()})
    states = [
        value.clone()
        for optimizer in trainer.optimizers
        for entry in optimizer.state_dict()["state"].values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    return {"weights": model.state_dict(), "states": states, "losses": losses, "draws": draws.drawn}


def equality() -> dict[str, Any]:
    """Gradient steps of all cases on a share of each batch."""
    return {(case, finals): steps_of(case, finals, None) for case in CASES for finals in (True, False)}


def trainer_of(directory: Path, *callbacks: Callback) -> Trainer:
    """A trainer of a small DreamerV3 that evaluates on part of its data and saves every other step."""
    preset, sizes = CASES["dreamerv3"]
    torch.manual_seed(0)
    model = create_world_model(preset, obs_shape=(3,), action_dim=2, **sizes)
    config = TrainingConfig(
        total_steps=6, batch_size=WINDOWS, sequence_length=LENGTH, eval_interval=3, log_interval=1, device="cpu"
    )
    saving = CheckpointCallback(directory, save_interval=2)
    return Trainer(model, config, [*callbacks, saving], eval_data=0.25)


def stored(trainer: Trainer) -> ReplayBuffer:
    """The data of the training, with room for the latents that DreamerV3 stores beside its rows."""
    return episodes(finals=True, model=trainer.model)


class Seen(Callback):
    """Remembers what the callbacks of this rank are told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: list[float] = []
        self.windows: list[int] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_step_end(self, step: int, losses: Any) -> None:
        self.losses.append(losses["loss"])
        batch = self._trainer._last_batch
        self.windows.append(len(batch.rewards))

    def on_eval_end(self, step: int, metrics: Any) -> None:
        self.evaluations.append(metrics["loss"])


class FirstOnly(Seen):
    first_rank_only = True


def training(directory: Path, of_one: Path) -> dict[str, Any]:
    """Trains without an interruption; in two parts; and on from the checkpoint of a single process."""
    seen, first = Seen(), FirstOnly()
    whole = trainer_of(directory / "whole", seen, first)
    whole.train(stored(whole))
    part = trainer_of(directory / "parts")
    part.train(stored(part), num_steps=4)
    resumed = trainer_of(directory / "parts")
    resumed.train(stored(resumed), resume=True)
    grown = trainer_of(of_one)
    grown.train(stored(grown), num_steps=0, resume=True)
    grown_from = {name: weight.clone() for name, weight in grown.model.state_dict().items()}
    grown.train(stored(grown))
    refused = ""
    try:
        odd = Trainer(grown.model, replace(grown.config, batch_size=7))
        odd.train(stored(grown))
    except ConfigurationError as error:
        refused = str(error)
    return {
        "refused": refused,
        "seen": vars(seen) | {"_trainer": None},
        "first": len(first.losses),
        "whole": whole.model.state_dict(),
        "resumed": resumed.model.state_dict(),
        "resumed step": resumed.step_count,
        "grown from": grown_from,
        "grown": grown.model.state_dict(),
        "grown step": grown.step_count,
    }


def loading(whole_files: Path, uneven: Path, few: Path, copies: Path) -> dict[str, Any]:
    """Loads this rank's part of files, and says what is in it."""

    def load(path: Path, **options: Any) -> dict[str, Any]:
        buffer = ReplayBuffer.load(path, sharded=True, seed=0, **options)
        rows = buffer.stored()[0]
        at = rows.stored_at()
        (obs,) = rows.obs.values()
        part, held_out = buffer.split(0.3, seq_len=2)
        return {
            "counts": obs[at][:, 0].tolist(),
            "rewards": rows.rewards[at].tolist(),
            "windows": buffer.num_windows(3),
            "digests": [buffer.digest(), part.digest(), held_out.digest()],
        }

    def refused(path: Path) -> str:
        try:
            load(path)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "not refused"

    return {
        "refused": refused(few),
        "more files": refused(copies / "more" / str(ranks.rank())),
        "other files": refused(copies / "other" / str(ranks.rank())),
        "whole files": load(whole_files),
        "in place": load(whole_files, storage="in_place"),
        "divided": load(uneven),
        "divided in place": load(uneven, storage="in_place"),
        "everything": ReplayBuffer.load(uneven).num_transitions,
    }


def sharded_training(directory: Path, data: Path) -> dict[str, Any]:
    """Trains on this rank's part of files that are read in place: without an interruption, and in two parts."""

    def buffer(trainer: Trainer) -> ReplayBuffer:
        return ReplayBuffer.load(data, storage="in_place", sharded=True, extras=trainer.model.replay_extras())

    whole = trainer_of(directory / "whole")
    whole.train(buffer(whole))
    part = trainer_of(directory / "parts")
    part.train(buffer(part), num_steps=4)
    resumed = trainer_of(directory / "parts")
    resumed.train(buffer(resumed), resume=True)
    return {"whole": whole.model.state_dict(), "resumed": resumed.model.state_dict(), "step": resumed.step_count}


class Fails(Callback):
    """Ends a rank at a step, in one of several ways."""

    def __init__(self, how: str, rank: int, step: int) -> None:
        self.how, self.rank, self.step = how, rank, step

    def on_step_end(self, step: int, losses: Any) -> None:
        if step == self.step and ranks.rank() == self.rank:
            if self.how == "raise":
                raise ValueError("an error of its own")
            os.kill(os.getpid(), getattr(signal, self.how))


def failing(directory: Path, how: str) -> None:
    """Trains until rank 1 ends at the third step."""
    trainer = trainer_of(directory, Fails(how, 1, 3))
    trainer.train(stored(trainer))


class Slowly(Callback):
    """Takes its time for each step, and leaves a file that says that there is a checkpoint."""

    def __init__(self, begun: Path) -> None:
        self.begun = begun

    def on_step_end(self, step: int, losses: Any) -> None:
        time.sleep(0.1)
        if step == 4:
            self.begun.touch()


def long_training(directory: Path, steps: int) -> int:
    """Trains up to a step, going on from the newest checkpoint."""
    trainer = trainer_of(directory / "run", Slowly(directory / "begun"))
    trainer.config = replace(trainer.config, total_steps=steps)
    trainer.train(stored(trainer), resume=True)
    return trainer.step_count


def agent_of(family: str, **settings: Any) -> WorldFluxAgent:
    """A small agent in two environments of its rank."""
    if family == "dreamerv3":
        return make_agent(make_vec_env("CartPole-v1", 2), batch_size=4, seq_len=5, train_ratio=10, **settings)
    return make_planner(make_vec_env("Pendulum-v1", 2), **settings)


class Counts(BaseCallback):
    """Remembers the counts that callbacks of an agent see."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def _on_step(self) -> bool:
        self.steps.append(self.num_timesteps)
        return True


def learning(directory: Path) -> dict[str, Any]:
    """Learns without an interruption; then in two parts, of which the second is resumed twice."""
    if ranks.is_first():  # which alone estimates, and may take every call for a long one
        progress._SHORT = progress._LONG = 0.0
    found: dict[str, Any] = {}
    for family in ("dreamerv3", "tdmpc2"):
        place = directory / family
        counts = Counts()
        agent = agent_of(family)
        agent.learn(80, [counts, AgentCheckpointCallback(place)])
        agent.save(place / "agent.zip")
        buffer = agent.replay_buffer
        resumed = []
        for _ in range(2):
            again = type(agent).load(place, make_vec_env(agent_env(family), 2), device="cpu", resume=True)
            again.learn(20, reset_num_timesteps=False)
            resumed.append(again)
        found[family] = {
            "steps": counts.steps,
            "updates": agent._n_updates,
            "stored": buffer.num_transitions,
            "actions": np.array(buffer.stored()[0].actions[:40]),
            "weights": agent.model.state_dict(),
            "episodes": agent._episode_num,
            "returns": [float(info["r"]) for info in agent.ep_info_buffer],
            "resumed steps": [one.num_timesteps for one in resumed],
            "resumed stored": [one.replay_buffer.num_transitions for one in resumed],
            "resumed": [one.model.state_dict() for one in resumed],
        }
    return found


def agent_env(family: str) -> str:
    return "CartPole-v1" if family == "dreamerv3" else "Pendulum-v1"


if __name__ == "__main__":  # a rank on a host of its own
    out, steps = sys.argv[1:]
    do(long_training, Path(out), Path(out), int(steps))
