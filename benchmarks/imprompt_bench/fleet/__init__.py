"""Several servers behind Envoy: how to route requests (measured and simulated), and how many servers a load needs."""
