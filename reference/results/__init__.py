"""Measures docs/results.md: many quantizers on the reference pairs, each against full precision.

rows       what is measured: a table of recipes, by scheme
setup      what rows of one pair share: baseline, fp32 graph, noise floor, text for the perplexity
measure    one row: calibrate, export, quantize, answer, in a process of its own
closeness  KL and perplexity      flips  answers that changed      goals  yes or no, with figures
tables, plots, page               what a person reads
"""
