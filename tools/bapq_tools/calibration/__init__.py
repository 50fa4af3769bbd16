"""The inputs that layers meet on calibration samples: forward passes and statistics."""
