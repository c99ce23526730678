"""What one rank keeps of some parameters: its blocks, stacked, and what can be told of them."""
