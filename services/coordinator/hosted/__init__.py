"""A hosted engine: it schedules by itself, and speaks to the coordinator over the control channel."""
