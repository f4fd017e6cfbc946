"""Plans: the grid of every tensor, and exact bytes."""
