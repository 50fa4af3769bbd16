"""The measurements behind the figures of README and docs/measuring.md."""
