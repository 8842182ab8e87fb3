"""How does a step run? The Trainer, its batches, checkpoints and what resumes from them."""
