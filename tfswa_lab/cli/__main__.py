"""`python -m tfswa_lab.cli`, as `torchrun` needs it."""

from tfswa_lab.cli.main import app

app()
