"""The stages of the quickstart, one per file; each calls one tool."""
