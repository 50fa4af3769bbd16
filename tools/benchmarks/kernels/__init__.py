"""Speed of the kernels, and the inner loops of those for ARM (`make bench-kernels`)."""
