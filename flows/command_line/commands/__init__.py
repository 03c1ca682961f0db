"""One module a command; ``holdfast.flows.command_line.group`` has the table of them."""
