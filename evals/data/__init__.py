"""Built-in suites: prompts and preference pairs written for this project."""
