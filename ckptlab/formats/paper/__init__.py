"""Models on paper."""
