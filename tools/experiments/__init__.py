"""The report's experiments, as scripts with the report's own flags: see docs/protocol.md."""
