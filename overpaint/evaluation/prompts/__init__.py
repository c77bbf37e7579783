"""Sets of prompts, and prompts from files."""
