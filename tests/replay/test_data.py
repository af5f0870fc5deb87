from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldflux.errors import ConfigurationError
from worldflux.replay.provider import sample_from
from worldflux.training import BatchRequest, create_random_buffer


def a_batch(size=2, length=5):
    return create_random_buffer(100, (3,), 2, num_episodes=2, episode_length=20, seed=0).sample(size, length)


GOT = []


def asked(*got):
    GOT.append(got)
    return a_batch()


class Forms:
    """Signatures of `sample`, by numbers and by request."""

    def numbers(self, batch_size, seq_len=None, device="cpu"):
        return asked(batch_size, seq_len, device)

    def numbers_and_options(self, batch_size, seq_len=None, device="cpu", shuffle=True):
        return asked(batch_size, seq_len, device)

    def other_names(self, n, length, where):
        return asked(n, length, where)

    def other_names_with_defaults(self, n: int, length=None, where="cpu"):
        return asked(n, length, where)

    def half_of_the_names(self, n, seq_len=None, device="cpu"):
        return asked(n, seq_len, device)

    def request(self, request: BatchRequest):
        return asked(request.batch_size, request.seq_len, request.device)

    def annotated_with_options(self, wanted: BatchRequest, shuffle=True, weights=None):
        assert shuffle is True and weights is None
        return self.request(wanted)

    def annotated_in_text(self, wanted: "BatchRequest", other: "int" = 3, third=None):
        assert other == 3
        return self.request(wanted)

    def named_alone(self, request=None, shuffle=True, weights=None):
        return self.request(request)

    def the_only_one_required(self, wanted, shuffle=True, weights=None):
        assert shuffle is True and weights is None
        return self.request(wanted)


@pytest.mark.parametrize("form", [name for name in vars(Forms) if not name.startswith("_")])
def test_a_provider_is_asked_in_its_own_form(form):
    provider = SimpleNamespace(sample=getattr(Forms(), form))
    assert sample_from(provider, 2, 5, "cpu").rewards.shape == (2, 5)
    assert GOT.pop() == (2, 5, "cpu")


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
