"""What `onnxruntime.InferenceSession` has besides `run`, for banks."""
