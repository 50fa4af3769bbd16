"""The measurements behind the figures of README and docs/explanation/measuring.md."""
