"""How well a bank answers: beside the float model, and beside labels."""
