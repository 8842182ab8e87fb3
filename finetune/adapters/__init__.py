"""How is it stored? PEFT's format, the base's fingerprint, merging and its verification."""
