"""The model as a graph: read, made canonical, its heavy layers found and replaced."""
