"""What the machine gives: devices and their memory, processes, files written whole, locks, the terminal."""
