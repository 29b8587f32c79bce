"""Faults are injected into a real server under load: what callers see, and how long until pictures come again."""
