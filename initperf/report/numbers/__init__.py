"""What a run folder says, as numbers."""
