"""Codes, scales and biases of the layers, and what their rounding costs the outputs."""
