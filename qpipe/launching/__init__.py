"""Starting a run: choose the processes, check what can be checked without them, and hand over to a launcher.

Launching itself is the work of torchrun and of DeepSpeed's launcher; this package builds their arguments, holds the run
directory while they work, and turns what went wrong in a worker into one message.
"""
