"""Calibration: texts, the walk through the float model, input statistics."""
