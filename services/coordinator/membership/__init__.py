"""Who is alive, who holds which rank, and how one epoch follows another."""
