"""What the coordinator shows: status, metrics, the phases of recoveries, traces."""
