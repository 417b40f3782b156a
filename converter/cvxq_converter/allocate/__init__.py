"""Statistics → clusters, worths, bit depths for a target, and the sizes that follow."""
