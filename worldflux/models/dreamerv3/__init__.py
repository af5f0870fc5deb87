"""DreamerV3, arXiv:2301.04104, equal to its reference implementation."""
