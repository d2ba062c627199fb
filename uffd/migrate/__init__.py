"""Live migration of arrays and regions to another process or host."""
