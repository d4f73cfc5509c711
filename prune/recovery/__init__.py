"""Repair of what pruning broke: training back towards the aligned model, or restoring its weights."""
