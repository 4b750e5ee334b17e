"""Protection and restoration of pages of bytes, beside the model and without its knowledge."""
