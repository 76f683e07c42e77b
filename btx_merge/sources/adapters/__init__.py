"""PEFT adapters as sources: which base, which modules, and the sum of both."""
