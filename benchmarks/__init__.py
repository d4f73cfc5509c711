"""Speed and memory against Optimum and onnxruntime-genai; not installed."""
