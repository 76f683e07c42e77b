"""The verbs `export` and `extract`: a merged model for other programs, and one expert of it."""
