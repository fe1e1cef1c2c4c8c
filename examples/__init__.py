"""Programs that a reader runs or copies; README.md says how to call them."""
