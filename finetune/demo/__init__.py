"""Show me. A page in the browser on which base and adapters answer the same question, side by side."""
