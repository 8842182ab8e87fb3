"""Will it fit and learn? The memory plan, timing, overfitting a few examples, inspecting them."""
