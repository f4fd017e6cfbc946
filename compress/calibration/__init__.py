"""Calibration: texts, the walk through the float model, statistics of inputs."""
