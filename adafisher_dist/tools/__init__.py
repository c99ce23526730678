"""The command line: what a checkpoint holds, what a model will cost."""
