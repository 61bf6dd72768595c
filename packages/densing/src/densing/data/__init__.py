"""The curated table's CSV files."""
