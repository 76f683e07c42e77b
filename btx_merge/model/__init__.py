"""A merged model's folder: opened, its experts, its records and its card."""
