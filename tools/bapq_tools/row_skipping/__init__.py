"""Rows that inputs of one region can do without, and the gate that skips them."""
