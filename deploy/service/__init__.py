"""The server behind `deploy.serve`: models that answer in batches, and what guards them."""
