import numpy as np
import pytest
import torch

from worldflux.errors import ConfigurationError
from worldflux.replay.provider import sample_from
from worldflux.training import BatchRequest, create_random_buffer


def a_batch(size=2, length=5):
    return create_random_buffer(100, (3,), 2, num_episodes=2, episode_length=20, seed=0).sample(size, length)


class ByNumbers:
    def sample(self, batch_size, seq_len=None, device="cpu"):
        self.got = (batch_size, seq_len, device)
        return a_batch()


class ByOtherNames:
    def sample(self, n, length, where):
        self.got = (n, length, where)
        return a_batch()


class ByRequest:
    def sample(self, request: BatchRequest):
        self.got = (request.batch_size, request.seq_len, request.device)
        return a_batch()


class ByRequestWithOptions(ByRequest):
    def sample(self, wanted: BatchRequest, shuffle=True, weights=None):
        assert shuffle is True and weights is None
        return super().sample(wanted)


class ByAnnotationInText(ByRequest):
    def sample(self, wanted: "BatchRequest", other: "int" = 3, third=None):
        assert other == 3
        return super().sample(wanted)


class ByNameAlone(ByRequest):
    def sample(self, request=None, shuffle=True, weights=None):
        return super().sample(request)


class ByTheOnlyOneRequired(ByRequest):
    def sample(self, wanted, shuffle=True, weights=None):
        assert shuffle is True and weights is None
        return super().sample(wanted)


class ByNumbersWithOptions(ByNumbers):
    def sample(self, batch_size, seq_len=None, device="cpu", shuffle=True):
        return super().sample(batch_size, seq_len, device)


class ByOtherNamesWithDefaults(ByNumbers):
    def sample(self, n: int, length=None, where="cpu"):
        return super().sample(n, length, where)


class ByHalfOfTheNames(ByNumbers):
    def sample(self, n, seq_len=None, device="cpu"):
        return super().sample(n, seq_len, device)


PROVIDERS = (
    ByNumbers, ByNumbersWithOptions, ByOtherNames, ByOtherNamesWithDefaults, ByHalfOfTheNames,
    ByRequest, ByRequestWithOptions, ByAnnotationInText, ByNameAlone, ByTheOnlyOneRequired,
)  # fmt: skip


@pytest.mark.parametrize("provider", [kind() for kind in PROVIDERS], ids=[kind.__name__ for kind in PROVIDERS])
def test_a_provider_is_asked_in_its_own_form(provider):
    assert sample_from(provider, 2, 5, "cpu").rewards.shape == (2, 5)
    assert provider.got == (2, 5, "cpu")


def test_the_buffer_is_a_provider():
    buffer = create_random_buffer(100, (3,), 2, num_episodes=2, episode_length=20, seed=0)
    assert sample_from(buffer, 4, 6).obs.shape == (4, 6, 3)


def test_an_error_inside_a_provider_is_the_one_that_is_seen():
    class Broken:
        calls = 0

        def sample(self, request):
            self.calls += 1
            raise TypeError("sample() got an unexpected keyword argument 'seq_len'")

    provider = Broken()
    with pytest.raises(TypeError, match="unexpected keyword argument 'seq_len'"):
        sample_from(provider, 2, 5)
    assert provider.calls == 1


def test_what_is_no_provider_is_told_the_two_forms():
    class Short:
        def sample(self, batch_size):
            raise AssertionError("is not called")

    class Wrong:
        def sample(self, request):
            return {"obs": torch.zeros(2, 5, 3)}

    with pytest.raises(ConfigurationError, match="list has no method sample"):
        sample_from([], 2)
    with pytest.raises(ConfigurationError, match=r"Short.sample\(batch_size\) is of neither form: expected sample\("):
        sample_from(Short(), 2)
    with pytest.raises(ConfigurationError, match=r"Wrong\.sample returned dict, expected a Batch"):
        sample_from(Wrong(), 2)


def test_a_random_buffer_is_as_large_as_asked_and_the_same_for_one_seed():
    arguments = dict(capacity=1000, obs_shape=(4,), action_dim=2, num_episodes=10, episode_length=30)
    buffer = create_random_buffer(**arguments, seed=42)
    assert (buffer.capacity, len(buffer), buffer.num_episodes) == (1000, 300, 10)
    batch, again = buffer.sample(8, 31), create_random_buffer(**arguments, seed=42).sample(8, 31)
    other = create_random_buffer(**arguments, seed=43).sample(8, 31)
    assert torch.equal(batch.obs, again.obs) and not torch.equal(batch.obs, other.obs)
    assert batch.terminations.sum(1).tolist() == [1] * 8  # of any 31 rows in episodes of 31, one ends its episode
    assert -1 <= batch.actions.min() and batch.actions.max() <= 1


def test_a_random_buffer_of_images_and_dictionaries():
    buffer = create_random_buffer(
        50, {"camera": (3, 8, 8), "speed": (2,)}, 1, num_episodes=1, episode_length=20, seed=0
    )
    batch = buffer.sample(1, 21)
    assert batch.obs["camera"].dtype == torch.uint8
    assert len(np.unique(batch.obs["camera"])) > 200
    assert batch.obs["speed"].dtype == torch.float32
    with pytest.raises(ConfigurationError, match="episode_length is 0"):
        create_random_buffer(50, (2,), 1, 1, episode_length=0)
    with pytest.raises(ConfigurationError, match=r"num_episodes is 1\.5, expected a whole number from 1"):
        create_random_buffer(50, (2,), 1, 1.5)
