"""Files of tensors: read without loading, laid out, staged, copied. Nothing here knows a model."""
