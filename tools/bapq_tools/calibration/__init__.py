"""What the layers meet on calibration samples: forward passes and statistics of inputs."""
