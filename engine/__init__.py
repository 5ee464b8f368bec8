"""What trains any model: data, sharding, optimizer, step, checkpoint, loop."""
