"""One module a command; ``flows.command_line`` has the table of them."""
