"""Texts by domain: what the user names, its records, and windows of tokens."""
