"""The verb `edit`: experts of a merged model added, dropped, replaced, renamed."""
