"""Losses of models on texts by domain: windows of text, the losses of each token, and the models beside a merge."""
