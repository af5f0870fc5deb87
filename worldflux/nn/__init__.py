"""Neural-network parts without any reinforcement learning: layers, distributions, transforms."""
