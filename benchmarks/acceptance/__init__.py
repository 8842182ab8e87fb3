"""What a first meeting with a GPU is to settle: correctness, memory, speed (benchmarks/gpu_acceptance.py)."""
