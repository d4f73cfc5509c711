"""Bits under a budget: which unit of a model gets which format.

`units` and their bytes, `sensitivity` of each (`brute_force` checks it, `sensitivity_plot` draws it),
`solve` by integer programming, `search` among the best few by measuring them.
"""
