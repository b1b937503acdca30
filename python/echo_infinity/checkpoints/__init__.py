"""Other people's checkpoint files: read without trusting them, named as ours, written as a model folder."""
