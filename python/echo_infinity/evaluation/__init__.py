"""Judges of generated video: recall of what was out of sight, and long rollouts."""
