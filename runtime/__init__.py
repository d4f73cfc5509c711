"""The device side: run, serve and measure a decoder graph with ONNX Runtime and numpy alone."""
