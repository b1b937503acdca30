"""Looking inside a stream: what the memory reads when it is written, and what reads the memory."""
