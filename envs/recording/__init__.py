"""Recording episodes into a replay buffer."""
