"""The bank format: reader and writer side by side. Specification: docs/bank_format.md."""
