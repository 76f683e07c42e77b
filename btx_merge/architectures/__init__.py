"""Names and shapes of the models: Llama and BTX. Nothing here opens a file."""
