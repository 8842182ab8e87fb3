"""The tiny base checkpoint that the quickstart starts from, and the commands that made it."""
