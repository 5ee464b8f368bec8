"""The whole regime on the bundled sample: its stages, what they left, and whether that is as it should be."""
