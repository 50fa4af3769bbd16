"""A running session seen from outside: its status in numbers, and a socket that tells it."""
