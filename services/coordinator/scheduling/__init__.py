"""The embedded engine: requests, batches, and the page tables of its KV cache. A host of protection."""
