"""What the tests share: matrices, native providers, subprocess scripts, leak counters."""
