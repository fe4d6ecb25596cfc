"""The micro-world: a small closed world with its own student, teacher and judge."""
