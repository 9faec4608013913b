"""The server with its page, the worker, and what both need to run: started and stopped as one thing."""
