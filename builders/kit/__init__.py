"""What several tasks share: sources and their cells, options and letters, scoring."""
