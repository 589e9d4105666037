"""The tolerances of all tests, named once."""

# Largest difference of outputs, relative to the largest output, in float32.
FUNCTION = 1e-4  # a rewrite that claims to keep the function
PERMUTATION = 1e-4  # the same sums in another order
STATISTIC = 1e-4  # streamed float32 sums against float64 numpy
EXACT = 1e-9  # the same float64 arithmetic, written twice
