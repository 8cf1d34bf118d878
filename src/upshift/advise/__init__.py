"""Which hardware a training should run on: predictions from what was seen of it, pure functions on records."""
