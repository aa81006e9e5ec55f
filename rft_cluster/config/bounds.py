"""Upper bounds of numbers. They refuse slips, and a stranger's numbers, before memory is allocated for them."""

MOST_DECODED = 2_000_000_000  # pixels of an image file
MOST_BYTES = 4_000_000_000  # size of an image file
MOST_IMAGES = 100_000_000
MOST_STEPS = 100_000_000
LAST_STEP = 999_999  # the names of checkpoints, rollouts and evaluations have six digits
MOST_ACTORS = 10_000
MOST_GIB = 16_384
MOST_SECONDS = 30 * 86_400.0
MOST_IMAGE_TOKENS = 16_384  # the limit of Qwen2-VL's own processor
MOST_PIXELS = MOST_IMAGE_TOKENS * 32 * 32
MOST_TOP_K = 10_000_000
MOST_TOKENS = 1_048_576
