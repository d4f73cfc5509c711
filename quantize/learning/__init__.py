"""Calibration that learns with the quantizer in the loop, and what it is pulled to and pushed from.

End to end: `contrastive`, `qat` (with `dpo` as an objective). Block by block: `blockwise`,
`block_learning`, `block_losses`. What they share: `learnable` (what is attached to a model), `start` (where
it starts, the optimizer), `losses`, `reference_cache`, `held_out` (how a candidate is judged), `rounding`
(AdaRound and SignRound as functions). `ablate` makes the unaligned twin where there is no base.
"""
