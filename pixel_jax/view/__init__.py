"""Pages of runs, as a file and live, and the demo: one renderer, nothing fetched."""
