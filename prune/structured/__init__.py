"""Structured pruning: attention heads, FFN channels and decoder blocks removed for real."""
