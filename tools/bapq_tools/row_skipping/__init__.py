"""Rows that the inputs of a region can do without, and the gate that skips them."""
