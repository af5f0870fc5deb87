"""What several tests use: environments, buffers, fakes, golden arrays."""
