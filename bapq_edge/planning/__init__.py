"""Plans: which level every chunk runs at, and what stays in memory for it."""
