"""The commands `bapq build` and `bapq fit`."""
