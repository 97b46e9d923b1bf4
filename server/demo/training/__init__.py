"""Training and evaluation of the demo model. They are only in the repository, not in the wheel."""
