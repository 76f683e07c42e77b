"""The verb `push`: a model or an adapter to the Hub."""
