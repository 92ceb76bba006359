"""How fast: a command for each kernel, lines of JSON with the machine beside the figures."""
