"""What is trained? LoRALinear, its injection, NF4 below it, and the protocol for other methods."""
