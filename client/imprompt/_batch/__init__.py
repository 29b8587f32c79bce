"""Bulk generation from a file of requests (`imprompt batch`).

`jobs` reads the requests, `folder` keeps the results, `runner` sends one to a server with a bounded number in flight,
and `on_ray` does the same with several servers on a Ray cluster.
"""
