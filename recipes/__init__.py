"""From nothing to a run: what has to be there before train.py, as commands."""
