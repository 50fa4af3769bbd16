"""Model files to ONNX models of one form."""
