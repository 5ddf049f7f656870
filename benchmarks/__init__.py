"""Side-by-side measurements; each prints a table and appends a line to results/."""
