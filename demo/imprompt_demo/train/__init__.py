"""Train the bundle with `python -m imprompt_demo.train`; one module per stage."""
