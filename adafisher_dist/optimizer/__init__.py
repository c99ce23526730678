"""AdaFisher as a torch.optim.Optimizer, and what stands behind its param groups and its state."""

from adafisher_dist.optimizer.adafisher import AdaFisher

__all__ = ["AdaFisher"]
