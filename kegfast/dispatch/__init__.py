"""Which form of an operator runs, on what it was given and what was measured."""
