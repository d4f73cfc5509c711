"""Quantization: what is decided of a model's weights and activations, and the graph that holds it.

Rooms: `prompts` (what calibration reads), `weights` (codes without gradients), `activations` (static
ranges), `learning` (contrastive, block-wise, QAT), `allocation` (bits by sensitivity under a budget),
`backends` (ONNX Runtime, Neural Compressor), `artifact` (the graph on disk, written and read back).

Here lies what they stand on: `formats` (a scheme's name), `plan` (which linears share an input),
`fakequant`, `folding`, `walk` (block by block), `decisions` and `record` (what was decided, as a folder),
`graph` (a quantized graph, read), `simulate` (the artifact in torch); and the wiring: `calibrate` and
`tuning`.
"""
