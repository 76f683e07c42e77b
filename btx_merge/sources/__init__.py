"""A model to be merged: located, opened, with its tokenizer and its distance from the seed."""
