"""All collectives; host groups, timeouts that name missing ranks, and deferred errors."""
