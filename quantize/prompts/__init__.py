"""Calibration prompts: `data` holds the built-in ones, `draw` reads, mixes and splits them.

`coverage` and `near_duplicates` hold them against the suites; `sequences` makes token batches of them.
"""
