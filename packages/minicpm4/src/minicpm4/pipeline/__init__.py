"""The pipeline: stages from a YAML file, each run once, resumed after a kill, skipped when done."""
