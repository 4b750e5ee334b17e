"""Which pages are safe, where their parity lies, and how they come back. Of engines it knows the contract in `host`."""
