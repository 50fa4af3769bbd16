"""Precision by the device's state: sensor readings in, limits out."""
