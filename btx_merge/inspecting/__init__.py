"""The verb `routing`: who gets which tokens of a merged model, and what each expert is worth."""
