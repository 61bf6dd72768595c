"""The report of a run: one self-contained HTML file of sections made from the stages' results."""
