"""What is to be written: which tensor gets which grid, and exact bytes."""
