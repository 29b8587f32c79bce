"""Training of the bundle: one module per stage, run by `python -m imprompt_demo.train`."""
