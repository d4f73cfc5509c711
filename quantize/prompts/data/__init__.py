"""Calibration prompts written for this project; see `holdfast.quantize.prompts.draw`."""
