"""Looking at a model: open-loop predictions, calibration, health and plots."""
