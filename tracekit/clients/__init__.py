"""Models that are asked rather than traced: they write questions and judge answers."""
