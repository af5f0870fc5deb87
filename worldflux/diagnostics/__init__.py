"""Diagnostics of a model: open-loop predictions, calibration, health metrics and plots."""
