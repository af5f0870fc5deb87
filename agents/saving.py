"""The files of an agent: saving, loading, and resuming a run."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info

from worldflux.accel import ranks
from worldflux.accel.device import resolve_device
from worldflux.accel.randomness import keeping_random_streams
from worldflux.agents.archive import (
    LOOP_COUNTERS,
    PLACES,
    AgentDescription,
    ArchivePath,
    RunState,
    episode_info,
    normalization_state,
    open_saved,
    path_to_read,
    path_to_write,
    restore_normalization,
    write_archive,
)
from worldflux.agents.base import AgentBase
from worldflux.agents.collecting import env_of, policy_for, spec_of_the_first
from worldflux.agents.habits import refuse_unknown
from worldflux.agents.settings import SETTINGS, rate_to_json
from worldflux.envs.vector import seed_envs
from worldflux.errors import ConfigurationError
from worldflux.factory import create_world_model, find_preset
from worldflux.files import checked_path
from worldflux.hub.cards import AgentRecord, Score
from worldflux.hub.description import env_options, shown_choices, shown_shapes
from worldflux.hub.pushing import push_agent
from worldflux.models.base import WEIGHTS_FILE
from worldflux.models.objective import Objective
from worldflux.models.weights import read_weights
from worldflux.reading import only_our_errors
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.checkpoint import REPLAY_FOLDER, ReplaySegments
from worldflux.replay.sampler import WindowSampler
from worldflux.training.checkpoint import (
    OPTIMIZER_FILE,
    check_target,
    directory_of_all_ranks,
    new_run,
    part_of_rank,
    ranks_of,
    writing_checkpoint,
)
from worldflux.validation import whole_number

logger = logging.getLogger("worldflux")

SelfAgent = TypeVar("SelfAgent", bound="SavedAgent")

_SAVED = ("model", "policy", "trainer", "lr_schedule", "_current_progress_remaining")
"""Attributes of an agent that are always in its file, beside those that its description names."""


class SavedAgent(AgentBase):
    """Base class of `WorldFluxAgent` that adds saving, loading and resuming."""

    _segments: ReplaySegments | None = None
    """The replay data's files, once a checkpoint holds some of them."""
    _continues_from: int | None = None
    """The step of the checkpoint that a resumed run continues, until `learn` is called."""

    def save(
        self, path: ArchivePath, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
    ) -> None:
        """Writes the agent to a zip file without a pickle; the replay buffer has a file of its own.

        Args:
            path: A path, to which `.zip` is appended if it has no suffix; or a binary file that is open for writing.
            exclude: Names of what is not in the file anyway, such as `"replay_buffer"` or `"env"`, as in SB3's
                signature.
            include: Names of what is always in the file, as in SB3's signature.

        Raises:
            ConfigurationError: If `exclude` names what is always in the file, or `include` what never is, or `path` is
                not a place for a file.
            TrainingError: If a loss or a weight is not finite; nothing is written then.
            CheckpointError: If `path` is a directory, or cannot be written; an older file is unchanged.
        """
        self.pause_learner()
        description = self._description()
        saved = {*_SAVED, *vars(description), *SETTINGS, *description.counters}
        for name in _names("exclude", exclude):
            if name.partition(".")[0] in saved:
                raise ConfigurationError(
                    f"exclude has '{name}', which is always in the file: an agent is loaded with all of it. Leave it "
                    "out, and pass load another value for it."
                )
        for name in _names("include", include):
            if name.partition(".")[0] not in saved:
                raise ConfigurationError(
                    f"include has '{name}', which is never in the file. save_replay_buffer writes the replay buffer, "
                    "save_checkpoint the whole run."
                )
        if ranks.is_first():  # all ranks have the same agent
            write_archive(path, lambda directory: self._write(directory, description))

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes everything that the run can be resumed from into one directory, which appears whole or not at all.

        It holds the agent, its random states and its replay data. Replay data lie in files that are written once and
        shared by the next checkpoints of this run (as hard links, where the file system has them): each costs only what
        is new, and any of them can be deleted, moved or copied by itself. `load(path, env, resume=True)` resumes the
        run. `AgentCheckpointCallback` saves checkpoints at an interval.

        Args:
            path: The directory. If it holds a checkpoint, that is replaced.

        Raises:
            TrainingError: If a loss or a weight is not finite; nothing is written then.
            CheckpointError: If `path` holds something else, or cannot be written; an older checkpoint is unchanged.
        """
        if self.replay_buffer is None:
            raise ConfigurationError("There is no run to save yet, only an agent: call save, or set_env first.")
        path = checked_path("path", path)
        ranks.on_first(partial(check_target, path))
        if self._segments is None or self._segments.buffer is not self.replay_buffer:
            self._segments = ReplaySegments(self.replay_buffer)
        self.pause_learner()
        run = RunState(
            collected=self._learner.collected,
            episode_infos=[episode_info(info) for info in self.ep_info_buffer or ()],
            episode_successes=[float(success) for success in self.ep_success_buffer or ()],
            normalization=normalization_state(self._vec_normalize_env),
        )
        with writing_checkpoint(path), directory_of_all_ranks(path) as directory:
            self.trainer.write_checkpoint(directory, of_all_ranks=True)
            if ranks.is_first():
                self._description().write(directory)
            own = part_of_rank(directory, ranks.rank())
            run.write(own)
            self._learner.write_recorded(own)
            self._segments.write(own, final_obs=None if self._collector is None else self._collector.obs)
        self._segments.moved_to(part_of_rank(path, ranks.rank()))

    def _write(self, directory: Path, description: AgentDescription) -> None:
        """Writes the entries that an agent is loaded from into an empty directory."""
        self.trainer.write_checkpoint(directory)
        description.write(directory)

    def _description(self) -> AgentDescription:
        return AgentDescription(
            observation_space=self.observation_space,
            action_space=self.action_space,
            n_envs=self.n_envs,
            settings=self._settings,
            elsewhere=[name for name in PLACES if getattr(self, name) not in (None, "memory")],
            counters={name: getattr(self, name) for name in LOOP_COUNTERS} | self._learner.counters(),
            progress_remaining=self._current_progress_remaining,
            schedule=self.schedule.state_dict(),
        )

    @classmethod
    def load(
        cls: type[SelfAgent],
        path: ArchivePath,
        env: GymEnv | str | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        resume: bool = False,
        buffer: WindowSampler | None = None,
        offline_share: float | None = None,
        objective: Objective | None = None,
        allow_nonfinite: bool = False,
        **kwargs: Any,
    ) -> SelfAgent:
        """Reads an agent that `save` or `save_checkpoint` wrote.

        It can act at once, and learn if it is given an environment. The random streams of Python, NumPy and torch stay
        as they are, so that a callback can load a rival without changing the training around it; pass `seed` to seed
        them.

        No file decides where this machine writes: `buffer_storage` and `tensorboard_log` are None unless they are
        passed here, whatever they were when the agent was saved.

        With `resume`, the run continues: `learn(..., reset_num_timesteps=False)` goes on with the replay data, counters
        and random streams of the checkpoint, and with the statistics of a `VecNormalize`. Episodes that were in flight
        end as truncated, and new ones begin, with seeds from the continued random streams: two resumes of one
        checkpoint give the same bits on a CPU.

        Args:
            path: As given to `save` or `save_checkpoint`; a directory of checkpoints, of which the newest is taken; the
                directory of a run of `worldflux train`, of which the agent with the best evaluation is taken, or with
                `resume` the newest checkpoint; the address of what `push_to_hub` has pushed, such as `hf://user/name`
                or `hf://user/name@revision`; or a binary file that is open for reading.
            env: An environment of the same spaces, with any number of copies. None suffices for `predict`, and until
                `set_env`.
            device: As for the constructor.
            custom_objects: Settings in place of those in the file, as in SB3's signature; other names are ignored.
            print_system_info: Print the versions of this machine, and those that the file was saved with.
            force_reset: Without effect (SB3's signature has it): environments are always reset before training.
            resume: Continue the run and not only the agent. Needs `env`, with as many copies as before. Replay data
                that lay on a disk or a device come into memory, if they fit there; pass `buffer_storage` for another
                place.
            buffer: Recorded data to learn from besides what is collected; see `learn_from`. A run that did so needs
                the same data to be resumed.
            offline_share: Share of the windows in each batch that come from `buffer`. None: that of the run which is
                resumed, otherwise 0.5.
            objective: As for the constructor; the file has none.
            allow_nonfinite: Take weights and optimiser states that are NaN or infinite, to look at them.
            **kwargs: Settings of the constructor that differ from the saved ones.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file is damaged or not an agent's, has weights that are not finite, or holds no run
                to resume.
            ConfigurationError: If a setting is unknown or out of its range, or the run cannot be resumed in `env`.
            BufferError: If there is no room for the replay data.
            HubError: If it cannot be downloaded.
        """
        if resume and env is None:
            raise ConfigurationError("resume=True continues in an environment. Pass env to load.")
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
        refuse_unknown(name for name in kwargs if name not in SETTINGS)
        kwargs = {name: value for name, value in (custom_objects or {}).items() if name in SETTINGS} | kwargs
        with open_saved(path, resume=resume) as (saved, checkpoint):
            if print_system_info:
                print("== SAVED MODEL SYSTEM INFO ==")
                print("".join(f"- {name}: {version}\n" for name, version in saved.system_info.items()))
            settings = replace(saved.settings, **kwargs)
            made: Any = None if env is None else env_of(env, like=saved)
            if made is not None:
                made = cls._wrap_env(made, settings.verbose)
                check_for_correct_spaces(made, saved.observation_space, saved.action_space)
                _warn_of_places([name for name in saved.elsewhere if name not in kwargs], checkpoint, resume)
            # Building draws and seeds, and loading a trainer's checkpoint sets the streams of its process.
            place = resolve_device(device, must_compute=True)
            with nullcontext() if resume else keeping_random_streams(place):
                with only_our_errors(path):
                    model = create_world_model(checkpoint, device=place, allow_nonfinite=allow_nonfinite)
                agent: Any = cls(model, made, device=place, _init_setup_model=False, **vars(settings))
                if made is None:
                    agent.observation_space, agent.action_space = saved.observation_space, saved.action_space
                    agent.n_envs = saved.n_envs
                with only_our_errors(path):
                    agent._setup_model()
                    agent.objective = objective
                    if (checkpoint / OPTIMIZER_FILE).is_file():
                        agent.trainer.load_checkpoint(checkpoint, allow_nonfinite=allow_nonfinite)
                    else:  # what push_to_hub shares, with the weights that the model has already
                        agent.trainer.step_count = saved.counters["_n_updates"]
            if "seed" in kwargs and not resume:
                agent.set_random_seed(settings.seed)
            for name in LOOP_COUNTERS:
                setattr(agent, name, saved.counters[name])
            agent._current_progress_remaining = saved.progress_remaining
            agent.schedule.load_state_dict(saved.schedule)
            agent._learner.load_counters(saved.counters, most_owed=agent.schedule.most_owed(agent.n_envs))
            agent.learn_from(buffer, 0.5 if offline_share is None else offline_share)
            # Learning goes on with the present streams; only an agent that was given a seed here starts them again.
            agent._random_started = "seed" not in kwargs
            if resume:
                with only_our_errors(path):
                    agent._resume(checkpoint, offline_share)
            else:
                agent.trainer.run = new_run()
        return agent

    def _resume(self, checkpoint: Path, offline_share: float | None) -> None:
        """Continues the run of a checkpoint, once the agent is as it was."""
        assert self.replay_buffer is not None and self.env is not None
        written_by = ranks_of(checkpoint)
        own = part_of_rank(checkpoint, ranks.rank())
        if written_by == ranks.size():
            run = RunState.read(own)
            self._segments = ReplaySegments.read(own, self.replay_buffer)
        else:
            run = RunState.read(checkpoint)
            for rank in range(written_by):
                part = self._make_buffer(written_by)
                ReplaySegments.read(part_of_rank(checkpoint, rank), part)
                self.replay_buffer.add_episodes_of(part, first=(ranks.rank() - rank) % ranks.size(), every=ranks.size())
        is_same = written_by == ranks.size()
        self._learner.resume_recorded(own if is_same else checkpoint, offline_share, exactly=is_same)
        self._learner.resume(self.replay_buffer, run.collected)
        restore_normalization(self._vec_normalize_env, run.normalization)
        window = self._stats_window_size
        self.ep_info_buffer = deque(run.episode_infos, maxlen=window)
        self.ep_success_buffer = deque(run.episode_successes, maxlen=window)
        if self._random_started:
            # The environments' own streams cannot be saved; their seeds follow from the streams that were.
            seed = int(np.random.randint(2**31 - 1))
            seed_envs(self.env, seed)
            self.action_space.seed(seed)
        self._continues_from = self.num_timesteps

    def push_to_hub(
        self,
        repo_id: str,
        *,
        eval_env: GymEnv | str | None = None,
        n_eval_episodes: int = 10,
        eval_seed: int = 0,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
    ) -> str:
        """Uploads the agent to the Hugging Face Hub, with a card that says what it is and how well it plays.

        `WorldFluxAgent.load("hf://user/name")` loads it. The files are JSON and safetensors; the states of the
        optimisers and the replay data are not among them. `worldflux push` also uploads the evaluations, the command
        and the versions of a run.

        Args:
            repo_id: The repository, `user/name`; it is created if there is none, and what it holds of an earlier agent
                is replaced.
            eval_env: An environment to evaluate the agent in, as for the constructor; the score stands in the card.
                None: the card has the mean return of the last episodes of the training.
            n_eval_episodes: Number of episodes of the evaluation, which are played with the most likely actions.
            eval_seed: Seed of `eval_env`.
            commit_message: Message of the commit.
            private: Whether a new repository is private; None: as the owner's settings say.
            token: Token of the Hub; None: the one that `hf auth login` has stored, or `HF_TOKEN`.
            branch: Branch to push to, created if there is none; None: the main branch.

        Returns:
            The address of the repository's page.

        Raises:
            ConfigurationError: If the name of the repository or `eval_env` is invalid.
            HubError: If the Hub cannot be reached, or refuses the upload.
            MissingDependencyError: If `huggingface_hub` is not installed.
            TrainingError: If a loss or a weight is not finite; nothing is uploaded then.
        """
        self.trainer.check_good()
        record = describe(self, None if eval_env is None else self._score(eval_env, n_eval_episodes, eval_seed))
        options: Any = dict(commit_message=commit_message, private=private, token=token, branch=branch)
        return ranks.on_first(lambda: push_agent(partial(write_shared, self), repo_id, record, **options))

    def _score(self, env: GymEnv | str, episodes: int, seed: int) -> Score:
        """Plays episodes with the most likely actions."""
        episodes, seed = whole_number("n_eval_episodes", episodes, 1), whole_number("eval_seed", seed, 0)
        with ExitStack() as stack:
            made: Any = self._wrap_env(env_of(env, like=self), verbose=0)
            if isinstance(env, str):
                stack.callback(made.close)
            check_for_correct_spaces(made, self.observation_space, self.action_space)
            seed_envs(made, seed)
            spec = spec_of_the_first(made)
            name = env if isinstance(env, str) else None if spec is None else spec.id
            returns, lengths = evaluate_policy(policy_for(self, made), made, episodes, return_episode_rewards=True)
        return replace(Score.of(returns, lengths, seed), env=name)  # type: ignore[arg-type]

    def save_replay_buffer(self, path: ArchivePath) -> None:
        """Writes the replay buffer to exactly this path, or into this binary file, as `.npz` whatever its suffix."""
        if self.replay_buffer is None:
            raise ConfigurationError("There is no replay buffer yet. It is created with the environment: call set_env.")
        with path_to_write(path) as target:
            self.replay_buffer.save(target)

    def load_replay_buffer(self, path: ArchivePath, truncate_last_traj: bool = True) -> None:
        """Replaces the replay buffer by one from a file; the next step of `learn` starts new episodes.

        Args:
            path: What `save_replay_buffer` or `ReplayBuffer.save` wrote, or a binary file that holds it. The newest
                `buffer_size` transitions are kept.
            truncate_last_traj: Without effect, because episodes in flight are always closed as truncated; SB3's
                signature has it.

        Raises:
            BufferError: If the file is damaged, of another format, or holds actions of another kind.
            ShapeMismatchError: If the buffer was made for other spaces.
        """
        with path_to_read(path) as source:
            buffer = ReplayBuffer.load(
                source,
                capacity=self.buffer_size,
                n_envs=self.n_envs,
                extras=self.stored_extras(),
                seed=self.seed,
                storage=self.buffer_storage,
            )
        self._check_buffer(buffer, str(path))
        buffer.end_episodes()
        self.replay_buffer = buffer

    def set_parameters(
        self,
        load_path_or_dict: str | Path | io.BufferedIOBase | TensorDict,
        exact_match: bool = True,
        device: torch.device | str = "auto",
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Takes over the model's parameters from a saved agent, or from what `get_parameters` returned.

        Args:
            load_path_or_dict: A saved agent as for `load`, or the parameters.
            exact_match: Whether every parameter has to be there, and no other.
            device: Without effect; SB3's signature has it.
            objective: As for the constructor; the file has none.
            allow_nonfinite: Take weights from a file that are NaN or infinite.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file is damaged or not an agent's, or its weights are of another model or not
                finite.
        """
        if isinstance(load_path_or_dict, dict):
            super().set_parameters(load_path_or_dict, exact_match, device)
            return
        with only_our_errors(load_path_or_dict), open_saved(load_path_or_dict) as (_, checkpoint):
            weights = read_weights(checkpoint / WEIGHTS_FILE, allow_nonfinite=allow_nonfinite)
            super().set_parameters({"policy": weights}, exact_match, device)  # type: ignore[dict-item]


def write_shared(agent: SavedAgent, directory: Path) -> None:
    """Writes what `push_to_hub` shares of an agent into an empty directory."""
    agent._description().write(directory)
    agent.model.save_pretrained(directory)


def describe(agent: SavedAgent, score: Score | None = None) -> AgentRecord:
    """What an agent knows about itself, for its card.

    Args:
        agent: The agent.
        score: Evaluation of the agent.
    """
    config, settings = agent.model.config, vars(agent._settings)
    infos = list(agent.ep_info_buffer or ())
    versions = {"worldflux": metadata.version("worldflux"), **agent._description().system_info}
    name = f"{config.model_type}:{config.model_name}"
    spec = None if agent.env is None else spec_of_the_first(agent.env)
    return AgentRecord(
        family=config.model_type,
        model=name if find_preset(name) else config.model_type,
        parameters=sum(weights.numel() for weights in agent.model.parameters() if weights.requires_grad),
        observations=shown_shapes(agent.obs_codec.obs_shape, agent.obs_codec.obs_dtype),
        actions=f"{config.action_type}, {shown_choices(agent.action_space)}",
        env=spec.id if spec is not None else None if score is None else score.env,
        env_options={} if spec is None else env_options(spec),
        wrappers=[] if spec is None else [item.name for item in spec.additional_wrappers if item.name != "Monitor"],
        timesteps=agent.num_timesteps,
        gradient_steps=agent._n_updates,
        settings={
            "n_envs": agent.n_envs,
            "planner": agent.planner or "none",
            **{name: settings[name] for name in _SHOWN},
            "learning_rate": rate_to_json(agent.learning_rate),
        },
        score=score,
        training=Score.of([info["r"] for info in infos], [info["l"] for info in infos]) if infos else None,
        versions={name: text for name, text in versions.items() if name not in ("Cloudpickle", "GPU Enabled")},
    )


_SHOWN = ("train_ratio", "batch_size", "seq_len", "buffer_size", "learning_starts", "seed")
"""Settings in the card of an agent."""


def _names(argument: str, given: Iterable[str] | None) -> list[str]:
    """The names in `exclude` or `include`."""
    names = [given] if isinstance(given, str) else list(given or ())
    for name in names:
        if not isinstance(name, str):
            raise ConfigurationError(f"{argument} has {name!r}, expected names of attributes.")
    return names


def _warn_of_places(missing: Sequence[str], checkpoint: Path, resume: bool) -> None:
    """Warns of places that were set when the agent was saved, and are not passed to `load`."""
    if "buffer_storage" in missing and (checkpoint / REPLAY_FOLDER).is_dir():
        logger.warning(
            "This agent kept its replay data in a directory or on a device; loaded, it keeps them in memory. "
            "To keep them on disk, pass buffer_storage=DIRECTORY to load."
        )
    if "tensorboard_log" in missing and resume:
        logger.warning(
            "This agent wrote a TensorBoard log; loaded, it writes none. To go on with it, pass "
            "tensorboard_log=DIRECTORY to load."
        )
