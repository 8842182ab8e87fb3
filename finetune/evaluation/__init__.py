"""How good is it? Generating answers, and the VQA metric."""
