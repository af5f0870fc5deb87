"""The planner over discrete actions: all sequences of small problems, and draws from categorical distributions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from worldflux.config import PlannerConfig, WorldModelConfig
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.mppi import PartialReturn
from worldflux.models.planning import PlanDraws, Planner, PlanTrace

PLACES = 5


class TableModel(WorldModel):
    """A small decision process in tables: where each action leads, and what it earns."""

    discount = 0.9

    def __init__(self, *classes: int) -> None:
        kind = "discrete" if len(classes) == 1 else "multi_discrete"
        super().__init__(
            WorldModelConfig(obs_shape=(1,), action_dim=sum(classes), action_type=kind, action_classes=classes)
        )
        rng = torch.Generator().manual_seed(0)
        self.leads_to = torch.randint(PLACES, (PLACES, *classes), generator=rng)
        self.earns = torch.randn(PLACES, *classes, generator=rng)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def numbers(self, actions: Tensor) -> tuple[Tensor, ...]:
        """The class of each part. `[..., A]` → `[...]` each"""
        return tuple(part.argmax(-1) for part in actions.split(self.config.action_classes, -1))

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        place, places, rewards = state["place"], [], []
        for action in actions:
            at = (place, *self.numbers(action))
            rewards.append(self.earns[at])
            place = self.leads_to[at]
            places.append(place)
        reward = torch.stack(rewards)
        return Trajectory(State({"place": torch.stack(places)}), reward, torch.ones_like(reward))

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        classes = self.config.action_classes
        drawn = [torch.zeros(len(state["place"]), n) if deterministic else torch.rand(len(state["place"]), n)
                 for n in classes]  # fmt: skip
        return torch.cat([torch.eye(n)[part.argmax(-1)] for n, part in zip(classes, drawn, strict=True)], -1)

    def value(self, state: State) -> Tensor:
        return state["place"].float()

    def sequences(self, horizon: int) -> Tensor:
        """All sequences of actions. `[H, S, A]`"""
        classes = self.config.action_classes
        actions = [
            torch.cat([torch.eye(n)[i] for i, n in zip(index, classes, strict=True)])
            for index in product(*map(range, classes))
        ]
        return torch.stack([torch.stack(sequence) for sequence in product(actions, repeat=horizon)], 1)

    def values(self, state: State, actions: Tensor) -> Tensor:
        """Values of sequences `[H, S, A]` from each place. `[N, S]`"""
        found = []
        for place in state["place"]:
            run = self.rollout(State({"place": place.expand(actions.shape[1])}), actions)
            discounts = self.discount ** torch.arange(len(actions) + 1)
            last = run.states[-1]
            found.append((discounts[:-1, None] * run.rewards).sum(0) + discounts[-1] * self.value(last))
        return torch.stack(found)


class MaskedTableModel(TableModel):
    """Even rows lack the last class of the first part and the whole last part."""

    def action_mask(self, state: State) -> Tensor:
        mask = torch.ones(len(state["place"]), self.config.action_dim)
        mask[::2, self.config.action_classes[0] - 1] = 0.0
        mask[::2, -self.config.action_classes[-1] :] = 0.0
        return mask

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        mask = torch.ones(self.config.action_dim)
        mask[self.config.action_classes[0] - 1] = 0.0
        parts = (noise + 99.0 * mask).split(self.config.action_classes, -1)
        return torch.cat([torch.eye(part.shape[-1])[part.argmax(-1)] for part in parts], -1)

    def partial_return(self, state, actions, *, discount, deterministic) -> PartialReturn:
        N, S = actions.shape[1:3]
        place = state["place"].unsqueeze(1).expand(N, S)
        self.seen.append(actions)
        earned = sum(self.earns[(place, *self.numbers(action))] for action in actions)
        return PartialReturn(earned, torch.zeros(N, S), State({"place": place}))

    def estimated_return(self, partial, *, deterministic, noise=None, members=None) -> Tensor:
        return partial.earned


EVERYWHERE = State({"place": torch.arange(PLACES)})
DRAWN = dict(num_samples=64, num_elites=8, num_pi_trajs=4)
ALL = dict(num_samples=8192, num_elites=64)


def planner(model: WorldModel, **fields) -> Planner:
    return Planner(model, PlannerConfig(**fields))


def plan(model: WorldModel, previous: Tensor | None = None, *, deterministic: bool = True, **fields):
    """The actions, the next plan and the traces of a plan from every place."""
    search, traces = planner(model, **fields), list[PlanTrace]()
    previous = search.start(PLACES) if previous is None else previous
    actions, after = search.plan(EVERYWHERE, previous, deterministic=deterministic, trace=traces.append)
    return actions, after, traces


# Results of the search


@pytest.mark.parametrize("classes", [(3,), (2, 3), (2, 2, 2)])
def test_the_best_of_all_sequences_is_found(classes):
    model = TableModel(*classes)
    sequences = model.sequences(3)
    values = model.values(EVERYWHERE, sequences)

    actions, _, [trace] = plan(model, horizon=3, **ALL)

    best = values.argmax(-1)
    assert torch.equal(actions, sequences[0, best])
    torch.testing.assert_close(trace.values.sort().values, values.sort().values)
    # The elites are the same share of all sequences as of the samples.
    assert trace.elites.shape[1] == max(1, round(sequences.shape[1] * 64 / 8192))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("classes", [(3,), (2, 3), (2, 2, 2)])
def test_draws_find_the_best_sequence(classes, deterministic):
    """Each step leads to the next place, whatever the action. Fixed noise may miss the best sequence, but rarely."""
    model = TableModel(*classes)
    model.leads_to[:] = ((torch.arange(PLACES) + 1) % PLACES).view(-1, *[1] * len(classes))
    model.earns *= 3.0
    sequences = model.sequences(4)
    best = sequences[:, model.values(EVERYWHERE, sequences).argmax(-1)].transpose(0, 1)  # [N, H, A]
    samples = min(192, sequences.shape[1] - 1)
    torch.manual_seed(0)

    actions, after, traces = plan(
        model, horizon=4, num_samples=samples, num_elites=24, num_pi_trajs=12, deterministic=deterministic
    )

    assert len(traces) == 6
    parts = after.split(classes, -1)
    likeliest = torch.cat([torch.eye(n)[part.argmax(-1)] for n, part in zip(classes, parts, strict=True)], -1)
    found = (likeliest == best).all(-1).all(-1)
    assert found.sum() >= 3 if deterministic else found.all()
    assert (actions == best[:, 0]).all(-1).sum() >= (4 if deterministic else 5)
    for first, last in zip(traces[0].mean.transpose(0, 1), traces[-1].mean.transpose(0, 1), strict=True):
        assert (last * (1.0 - last)).sum() < (first * (1.0 - first)).sum()  # the distribution becomes narrower


@pytest.mark.parametrize("fields", [DRAWN, ALL])
@pytest.mark.parametrize("classes", [(4,), (3, 2), (2, 1, 3)])
def test_probabilities_sum_to_one_in_each_part_and_keep_their_uniform_share(classes, fields):
    _, after, traces = plan(TableModel(*classes), horizon=4, uniform_share=0.1, **fields)
    for probs in (after, *(trace.mean for trace in traces)):
        for part in probs.split(classes, -1):
            torch.testing.assert_close(part.sum(-1), torch.ones(PLACES, 4))
            assert part.min() >= 0.1 / part.shape[-1] - 1e-6
    for trace in traces:
        torch.testing.assert_close(trace.weights.sum(-1), torch.ones(PLACES))
        torch.testing.assert_close(trace.std, (trace.mean * (1.0 - trace.mean)).clamp(min=0.0).sqrt())


def test_start_is_uniform():
    torch.testing.assert_close(
        planner(TableModel(2, 3)).start(1)[0, 0], torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    )


# One iteration


def drawn_as(*classes: int) -> Tensor:
    """Noise with which each candidate of one step takes the given class of two."""
    return 50.0 * torch.eye(2)[list(classes)].reshape(1, 1, 1, len(classes), 2)


@pytest.mark.parametrize(("gumbel", "chosen"), [(0.3, 0), (0.5, 1)])
def test_one_iteration_worked_by_hand(gumbel, chosen):
    """Two candidates, one of each class in both steps; class 0 earns 0.4 each time, and class 1 nothing."""
    model = TableModel(2)
    model.earns[0] = torch.tensor([0.4, 0.0])
    model.leads_to[:] = 0
    draws = PlanDraws(
        policy=torch.zeros(1, 1, 0, 2), actions=drawn_as(1, 0), gumbel=torch.tensor([[0.0, gumbel]]), final=None
    )
    search, traces = planner(model, horizon=2, num_samples=2, num_elites=2, num_pi_trajs=0, iterations=1,
                             temperature=0.5, uniform_share=0.1, momentum=0.2), list[PlanTrace]()  # fmt: skip
    draws = PlanDraws(draws.policy, draws.actions.expand(1, 2, 1, 2, 2), draws.gumbel, None)
    previous = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])

    actions, after = search.plan(State({"place": torch.tensor([0])}), previous, draws=draws, trace=traces.append)

    # Values 0 and 0.4 + 0.9 * 0.4 = 0.76: weights softmax(0.38, 0) = 0.593874, 0.406126, the better one first.
    [trace] = traces
    torch.testing.assert_close(trace.values, torch.tensor([[0.0, 0.76]]))
    assert trace.elites.tolist() == [[1, 0]]
    torch.testing.assert_close(trace.weights, torch.tensor([[0.593874, 0.406126]]))
    # The start is the shifted plan, halfway to uniform: 0.7, 0.3. Momentum keeps 0.2 of it, and 0.1 is uniform:
    # 0.9 * (0.2 * 0.7 + 0.8 * 0.593874) + 0.05.
    torch.testing.assert_close(after[0, 0], torch.tensor([0.603589, 0.396411]))
    # The last step starts from a uniform distribution: 0.9 * (0.2 * 0.5 + 0.8 * 0.593874) + 0.05.
    torch.testing.assert_close(after[0, 1], torch.tensor([0.567589, 0.432411]))
    assert actions.argmax(-1).tolist() == [chosen]


def test_a_higher_temperature_prefers_the_best_elites():
    weights = {}
    for temperature in (0.1, 10.0):
        _, _, traces = plan(TableModel(4), horizon=4, temperature=temperature, **DRAWN)
        weights[temperature] = traces[0].weights
        assert (weights[temperature].diff(dim=-1) <= 1e-6).all()  # the elites are sorted
    assert (weights[10.0][:, 0] > weights[0.1][:, 0] - 1e-6).all() and weights[0.1].max() < 0.25


def test_all_sequences_have_the_weights_of_their_values():
    model = TableModel(3)
    values = model.values(EVERYWHERE, model.sequences(2))
    _, after, _ = plan(
        model, horizon=2, num_samples=9, num_elites=9, num_pi_trajs=0, temperature=0.7, uniform_share=0.0
    )
    weights = torch.softmax(0.7 * values, -1)
    torch.testing.assert_close(after, torch.einsum("ns,hsa->nha", weights, model.sequences(2)))


# Several steps


def test_the_next_plan_starts_shifted_by_one_step_and_reset_with_each_episode():
    """Without noise the only candidate has the likeliest classes of the start."""
    search = planner(TableModel(2, 3), horizon=3, num_samples=1, num_elites=1, num_pi_trajs=0, iterations=1,
                     uniform_share=0.0)  # fmt: skip
    draws = PlanDraws(torch.zeros(3, 1, 0, 5), torch.zeros(1, 3, 1, 1, 5), torch.zeros(1, 1), None)
    step = torch.tensor([[0.5, 0.5, 1.0, 0.0, 0.0], [0.4, 0.6, 0.1, 0.2, 0.7], [0.3, 0.7, 0.2, 0.5, 0.3]])
    state = State({"place": torch.tensor([0, 0])})

    _, after = search.plan(state, step.expand(2, 3, 5), is_first=torch.tensor([False, True]), draws=draws)

    first = [1.0, 0.0, 1.0, 0.0, 0.0]  # of equal probabilities, the first
    assert after[0].tolist() == [[0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0], first]
    assert after[1].tolist() == [first] * 3


@pytest.mark.parametrize(("noise", "drawn"), [(1.0, 0), (1.2, 1)])
def test_a_start_is_halfway_to_uniform(noise, drawn):
    """A class that was certain has three times the probability of the other one, a difference of 1.1 in logarithms."""
    search = planner(TableModel(2), horizon=2, num_samples=1, num_elites=1, num_pi_trajs=0, iterations=1)
    gumbel = torch.tensor([0.0, noise]).expand(1, 2, 1, 1, 2)
    draws = PlanDraws(torch.zeros(2, 1, 0, 2), gumbel, torch.zeros(1, 1), None)
    certain = torch.tensor([[[1.0, 0.0]] * 2])
    actions, _ = search.plan(State({"place": torch.tensor([0])}), certain, draws=draws)
    assert actions.argmax(-1).tolist() == [drawn]


# Random and deterministic plans


@pytest.mark.parametrize("fields", [DRAWN, ALL])
def test_deterministic_plans_use_no_random_numbers_and_depend_on_their_row_alone(fields):
    model = TableModel(3, 2)
    before = torch.get_rng_state()
    actions, _, _ = plan(model, horizon=4, **fields)
    assert torch.equal(before, torch.get_rng_state())
    search = planner(model, horizon=4, **fields)
    alone, _ = search.plan(EVERYWHERE[2:3], search.start(1), deterministic=True)
    assert torch.equal(alone[0], actions[2])
    assert torch.equal(actions.sum(-1), torch.full((PLACES,), 2.0)) and set(actions.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_uniform_share_of_the_actions_is_random(share):
    """Class 1 is always better, so the others are carried out by chance."""
    model = TableModel(4)
    model.earns[:] = torch.tensor([0.0, 100.0, 0.0, 0.0])
    torch.manual_seed(0)
    search = planner(model, horizon=1, num_samples=32, num_elites=8, uniform_share=share)
    actions, _ = search.plan(State({"place": torch.zeros(4000, dtype=torch.long)}), search.start(4000))
    expected = torch.tensor([share / 4, 1 - 0.75 * share, share / 4, share / 4])
    torch.testing.assert_close(actions.mean(0), expected, atol=0.03, rtol=0.0)


def test_a_policy_is_followed_where_draws_alone_fail():
    """The reward is at the end of one of 4^6 sequences, which the policy knows."""

    class Lock(TableModel):
        def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
            places = state["place"] + (actions[..., 2] > 0).long().cumsum(0)
            return Trajectory(State({"place": places}), (places == 6).float(), torch.ones(places.shape))

        def value(self, state: State) -> Tensor:
            return torch.zeros(state["place"].shape)

        def policy(self, state: State, deterministic: bool = False) -> Tensor:
            return torch.eye(4)[torch.full(state["place"].shape, 2)]

    search = planner(Lock(4), horizon=6, **DRAWN)
    actions, _ = search.plan(State({"place": torch.zeros(3, dtype=torch.long)}), search.start(3), deterministic=True)
    assert actions.argmax(-1).tolist() == [2, 2, 2]


# Parts and masks


@pytest.mark.parametrize("fields", [DRAWN, ALL])
def test_parts_with_a_single_class_always_take_it(fields):
    for classes in [(1,), (1, 2, 1)]:
        actions, after, _ = plan(TableModel(*classes), horizon=7, deterministic=False, **fields)
        ends = [sum(classes[:i]) for i, n in enumerate(classes) if n == 1]
        assert (actions[:, ends] == 1.0).all() and (after[..., ends] == 1.0).all()
        assert (actions.sum(-1) == len(classes)).all()


@pytest.mark.parametrize("fields", [DRAWN | {"horizon": 4}, ALL | {"horizon": 2}])
@pytest.mark.parametrize("deterministic", [True, False])
def test_masked_classes_are_never_taken_and_masked_parts_stay_zero(fields, deterministic):
    model = MaskedTableModel(3, 2, 2)
    torch.manual_seed(0)
    actions, after, traces = plan(model, uniform_share=0.2, deterministic=deterministic, **fields)
    mask = model.action_mask(EVERYWHERE)
    for candidates in model.seen:
        assert (candidates * (1.0 - mask.unsqueeze(1)) == 0).all()
        assert (candidates.split((3, 2, 2), -1)[0].sum(-1) == 1).all()
    assert (actions * (1.0 - mask) == 0).all()
    assert actions.sum(-1).tolist() == [2.0, 3.0, 2.0, 3.0, 2.0]
    for probs in (after, *(trace.mean for trace in traces)):
        assert (probs * (1.0 - mask.unsqueeze(1)) == 0).all()
        first, second, third = (part.sum(-1) for part in probs.split((3, 2, 2), -1))
        torch.testing.assert_close(torch.stack([first, second]), torch.ones(2, *first.shape))
        torch.testing.assert_close(third[1::2], torch.ones(2, third.shape[1]))
    if deterministic:
        # The rewards are those of the action's place alone, and the class of a missing part counts as its first.
        earned = model.earns[0, :2, :, 0]
        assert earned[actions[0, :3].argmax(), actions[0, 3:5].argmax()] == earned.max()


# What is not a number


@pytest.mark.parametrize("fields", [DRAWN, ALL])
def test_actions_are_nan_if_all_values_are(fields):
    class Lost(TableModel):
        def value(self, state: State) -> Tensor:
            return super().value(state) + torch.nan

    actions, _, _ = plan(Lost(3), horizon=4, **fields)
    assert actions.isnan().all()


def test_actions_are_nan_if_the_policys_are():
    class Lost(TableModel):
        def policy(self, state: State, deterministic: bool = False) -> Tensor:
            return super().policy(state, deterministic) * torch.nan

    assert plan(Lost(4), horizon=4, **DRAWN)[0].isnan().all()
