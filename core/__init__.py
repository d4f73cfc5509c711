"""Holdfast: compress aligned language models to ONNX and prove that their safety survived."""

__version__ = "0.1.0"
