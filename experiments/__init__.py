"""Scripts that produce the results files."""
