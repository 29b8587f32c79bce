"""`python -m imprompt` is the `imprompt` command."""

from imprompt.cli import app

app(prog_name="imprompt")
