"""The command `btx`: it parses, calls the public functions and prints. Only this package prints."""
