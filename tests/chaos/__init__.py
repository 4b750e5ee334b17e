"""Random faults at random times under steady mixed load: `make chaos MINUTES=30 SEED=1`."""
