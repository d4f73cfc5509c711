"""Static ranges of activations: `ranges` of a torch model, where learning starts; `calibrators` of a graph.

`thresholds` finds the ends of a range in a histogram: percentile, entropy, least squares.
"""
