"""Host side of the boundary model: what is fitted, and what is pruned by region."""
