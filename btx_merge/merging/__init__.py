"""The verbs `check` and `merge`: recipe, checks, plan, rows, files."""
