"""Which blocks a parameter has, who owns them, and what that costs: integers only, no process group."""
