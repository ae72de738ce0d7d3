"""What the `clipcap` command can do; each module adds its part to the parser."""
