"""Who computes the blocks: this process, worker processes, Ray, or one job of an array."""
