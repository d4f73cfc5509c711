"""Measures the part on pruning of docs/results.md: scores, shapes, recovery, composition, latency.

rows       what is measured: a table of recipes
measure    one row: prune, recover, answer; where it is asked for, quantize the pruned model as well
device     bytes and decode latency of pruned graphs, interleaved in one process
figures    what was measured, read back      goals  yes or no, with figures
tables, plots, page                          what a person reads

Baseline, noise floor, perplexity and the counting of flips are those of `reference.results`.
"""
