"""What a merged model is worth: its losses on held-out text beside those of the models that it was made of."""
