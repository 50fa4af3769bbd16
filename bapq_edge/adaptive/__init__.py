"""Precision by input: boundary models, policies, and the runs that they steer."""
