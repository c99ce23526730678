"""Which blocks a parameter has, who owns them, and what that costs: integers, no process group."""
