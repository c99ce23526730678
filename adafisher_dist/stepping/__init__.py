"""A step: the ranks agree, gradients reach the owners of their blocks, updates come back."""
