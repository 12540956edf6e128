"""Pictures on many machines: the engine is Ray, the output folder is the state."""
