"""Images with the sets of objects in them, and toy tasks.

Nothing is imported here: the commands of `setpred data` and their worker processes do not need Lightning.
"""
