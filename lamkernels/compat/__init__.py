"""Drop-in forms of the bottlenecks of other projects, one module per project."""
