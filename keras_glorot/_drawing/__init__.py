"""The random stream, distributions, and draws inside programs."""
