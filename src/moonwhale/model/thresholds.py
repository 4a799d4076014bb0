"""Sizes from which a GPU should compute in another way.

These are guesses: no GPU has measured them. `python benchmarks/gpu.py --only thresholds` prints the values to put here,
with the GPU and the date for `MEASURED_ON`.
"""

MEASURED_ON: str | None = None  # "GPU, YYYY-MM-DD" of the sweep, None while the values are guesses

LONG_CONTEXT = 8  # flex.py sorts queries by block in contexts of more than this many times topk * block_size tokens
CAPTURE_AFTER = 32  # decoding steps of one size before a CUDA graph is captured, which takes about as long as they do
MAX_TOKENS_FOR_ALL_EXPERTS = 256  # up to this many decoded tokens run through all experts
