"""What a program can see of its own commands."""
