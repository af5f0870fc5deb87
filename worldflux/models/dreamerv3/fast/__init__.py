"""Hand-written forms of DreamerV3's recurrence, for CPUs."""
