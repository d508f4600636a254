"""How the bytes of a training step are counted, and what bench_memory.py tells about them."""
