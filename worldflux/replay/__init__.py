"""What was experienced: batches, the replay buffer and its files."""
