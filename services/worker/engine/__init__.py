"""The embedded engine's share on one device: model, weights, KV pool, steps."""
