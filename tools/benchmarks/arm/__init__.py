"""Instructions per inference on emulated boards: ONNX Runtime, ncnn and ours (`make bench-arm`)."""
