"""The stages of the host pipeline, one file each."""
