"""What runs, where and in which order. May import tasks and models."""
