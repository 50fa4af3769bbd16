"""One self-contained HTML page about a bank, and about a trace of it."""
