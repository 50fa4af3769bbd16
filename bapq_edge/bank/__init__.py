"""The bank format: reader and writer side by side. Specification: docs/reference/bank_format.md."""
