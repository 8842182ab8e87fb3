"""Data sets from their official addresses, as commands. Each writes into a directory outside of the checkout's code."""
