"""One self-contained HTML page of a run; the demo draws with the same renderer."""
