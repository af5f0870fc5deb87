"""Building blocks of neural networks, independent of reinforcement learning: layers, distributions, transforms."""
