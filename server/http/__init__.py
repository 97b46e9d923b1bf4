"""The HTTP side: thin routes, the way of a body in and of an error out."""
