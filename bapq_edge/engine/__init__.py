"""The engine: libbapq through ctypes, and the ONNX Runtime session that uses its operators."""
